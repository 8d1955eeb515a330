"""Make a training's failure happen again: from the file that it left when a loss or gradient became infinite or NaN.

    python -m tools.replay OUTPUT_DIR/failure_epoch3_step120_process0.pth

The training goes on from its last checkpoint before the failure, or starts where it started, up to the step that failed;
nothing is written. Ends with the failure's line and status 3, as the training did; with status 1 if nothing fails.
"""
import argparse
import json
import os
import sys
from typing import Any, Dict

import main
from util.checkpoint import load_checkpoint
from util.distributed import print_main
from util.errors import InputError, Stopped, run_program
from util.resumable import has, is_count, is_dict, is_epoch, is_list
from util.ranges import TOOL_RANGES, check_ranges

_is_text = (lambda value: isinstance(value, str))
_is_source = has(checkpoint=_is_text, epoch=is_epoch, step=is_count)
is_bundle = has(message=_is_text, epoch=is_count, step=is_count, image_ids=is_list(is_count), args=has(epochs=is_count),
                losses=is_dict(lambda value: isinstance(value, (int, float))), given=is_dict(lambda value: True),
                source=lambda value: value == {} or _is_source(value), world_size=is_count)


def get_args_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser("python -m tools.replay", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="failure_….pth that the training left")
    parser.add_argument("--device", help="instead of the training's")
    parser.add_argument("--num_workers", type=int, help="instead of the training's")
    parser.add_argument("--show", action="store_true", help="only print what the file says")
    return parser


def read_bundle(path: str) -> Dict[str, Any]:
    """What a failed training left.

    Raises:
        InputError: if it is something else.
    """
    bundle = load_checkpoint(path, flag="bundle=")
    if not is_bundle(bundle):
        raise InputError(f"{path} isn't a file that a failed training left (failure_epoch…_step…_process….pth)")
    return bundle


def describe(bundle: Dict[str, Any]) -> str:
    """What the file says of the failure, in a few lines."""
    source = bundle["source"]
    before = "the start" if not source else f"{source['checkpoint']} (epoch {source['epoch'] + 1}, step {source['step']})"
    losses = {name: value for name, value in bundle["losses"].items() if not name.startswith("cardinality")}
    return "\n".join([f"failure: {bundle['message']}", f"images: {', '.join(map(str, bundle['image_ids']))}",
                      f"losses: {json.dumps(losses)}", f"goes on from: {before}"])


def flags_of(bundle: Dict[str, Any], options: argparse.Namespace) -> argparse.Namespace:
    """The training's flags, changed so that it goes on from its checkpoint and writes nothing."""
    parser = main.get_args_parser()
    args = parser.parse_args([])
    flags = {action.dest: action for action in parser._actions}
    for name, value in bundle["given"].items():
        if name not in flags or not could_be_given(flags[name], value):
            raise InputError(f"{options.bundle} has the flag {name} {value!r}, which main.py doesn't take")
    vars(args).update(bundle["given"])
    args.output_dir, args.tensorboard, args.save_every_steps, args.random_seed = "", False, None, False
    args.eval_every = bundle["args"]["epochs"]  # evaluations take nothing of the random state
    if bundle["source"]:
        args.resume = bundle["source"]["checkpoint"]
    for name in ("device", "num_workers"):
        if getattr(options, name) is not None:
            setattr(args, name, getattr(options, name))
    return args


def could_be_given(action: argparse.Action, value: Any) -> bool:
    """Whether a flag's value is one that the parser may have made."""
    if action.nargs == 0:  # a switch
        return isinstance(value, bool) or value is action.default is None
    kinds = {int: int, float: (int, float)}.get(action.type, str)
    several = action.nargs is not None and action.nargs != "?"
    if value is None:
        return action.default is None
    return isinstance(value, list) == several and value != [] and all(
        isinstance(item, kinds) and not isinstance(item, bool) and (not action.choices or item in action.choices)
        for item in (value if several else [value]))


def require_source(bundle: Dict[str, Any]) -> None:
    """Raise InputError if the checkpoint isn't the one any more that the failed training would have gone on from."""
    source = bundle["source"]
    if source:
        found = load_checkpoint(source["checkpoint"], flag="checkpoint=")
        so_far = found.get("so_far")
        if has(step=is_count)(so_far) and (found.get("epoch"), so_far["step"]) != (source["epoch"], source["step"]):
            raise InputError(f"{source['checkpoint']} was overwritten after the failure, it can't be replayed from there")


def replay(options: argparse.Namespace) -> None:
    """Train up to the failure."""
    check_ranges(options, TOOL_RANGES)
    bundle = read_bundle(options.bundle)
    print(describe(bundle), flush=True)
    if options.show:
        return
    require_source(bundle)
    args = flags_of(bundle, options)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes != bundle["world_size"]:
        raise InputError(f"the training had {bundle['world_size']} processes: start as many, by torchrun "
                         f"--nproc_per_node={bundle['world_size']} -m tools.replay {options.bundle}")
    try:
        main.main(args, last_step=(bundle["epoch"], bundle["step"]))
    except FloatingPointError as error:
        if str(error) == bundle["message"]:
            print_main("the same failure again")
        raise
    except Stopped:
        print_main(f"nothing failed up to step {bundle['step']} of epoch {bundle['epoch']}")
        sys.exit(1)


if __name__ == "__main__":
    run_program(lambda: replay(get_args_parser().parse_args()))
