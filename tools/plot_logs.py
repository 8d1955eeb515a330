"""Learning curves of several runs in one picture: `python -m tools.plot_logs RUN… [--output curves.png]`."""
import argparse
from pathlib import Path
from typing import Dict, List, Sequence

from tools.output import refuse_others, remember, require_ending, writing
from util.errors import InputError, run_program
from util.plot_utils import Line, field_curves, known_fields, plot_logs, pyplot, read_log, run_labels
from util.ranges import TOOL_RANGES, check_ranges

FORMATS = (".png", ".pdf", ".svg", ".jpg")
DEFAULT_FIELDS = ("loss", "AP", "AP50", "AP_per_class", "maskAP", "PQ", "patch_iou")


def get_args_parser() -> argparse.ArgumentParser:
    """The program's flags."""
    parser = argparse.ArgumentParser("python -m tools.plot_logs", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a training, with its log.txt")
    parser.add_argument("--output", default="curves.png",
                        help="picture to write; its ending says the format (curves.png)")
    parser.add_argument("--fields", nargs="+",
                        help="what to draw: names in log.txt without train_ or test_, or AP, AP50, AP75, APs, APm, "
                        "APl, AR100, …, maskAP, …, PQ, PQ_th, PQ_st, AP_per_class, AP50_per_class, … "
                        f"(those of {', '.join(DEFAULT_FIELDS)} that the runs have)")
    parser.add_argument("--ewm_col", type=float, default=0, metavar="C",
                        help="smooth with an exponentially weighted average of centre of mass C epochs (0: don't)")
    return parser


def default_fields(runs: Dict[str, List[Line]]) -> Sequence[str]:
    """Those of `DEFAULT_FIELDS` that any of the runs has.

    Raises:
        InputError: if there are none.
    """
    fields = [field for field in DEFAULT_FIELDS if any(field_curves(lines, field) for lines in runs.values())]
    if not fields:
        raise InputError(f"the runs have none of {', '.join(DEFAULT_FIELDS)}; "
                         f"choose --fields among {', '.join(known_fields(runs))}")
    return fields


def main(args: argparse.Namespace) -> None:
    """Read the logs, draw, and say where the picture is."""
    check_ranges(args, TOOL_RANGES)
    plt = pyplot()
    plt.switch_backend("agg")  # works where there is no screen
    require_ending(args.output, FORMATS, "--output")
    refuse_others("--output", [Path(args.output)])
    labels = run_labels([Path(run) for run in args.runs])
    fields = args.fields or default_fields({label: read_log(folder) for label, folder in labels.items()})
    figure = plot_logs(list(labels.values()), fields, args.ewm_col)
    with writing("--output", args.output):
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.output, dpi=150)
        remember([Path(args.output)])
    plt.close(figure)
    print(f"{', '.join(fields)} of {', '.join(labels)}: {args.output}")


if __name__ == "__main__":
    run_program(lambda: main(get_args_parser().parse_args()))
