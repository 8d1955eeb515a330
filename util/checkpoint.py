"""Reading and writing checkpoints: whole or absent on disk, plain types only, nothing executed on loading."""
import argparse
import http.client
import os
import pathlib
import re
import tarfile
import zipfile
from typing import Any, Dict, List, Optional

import torch
from torch import Tensor, nn

from util.distributed import print_main
from util.download import fetch, forget
from util.errors import InputError
from util.files import shown
from util.unwrap import find_weights, numpy_globals

# Besides tensors and plain containers, published checkpoints hold the flags of their training as a Namespace, some with
# paths; other programs keep numbers of numpy. All are inert; everything else a pickle could name is refused by torch's weights-only loader.
torch.serialization.add_safe_globals([argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath, *numpy_globals()])

IS_URL = re.compile("https?://", re.IGNORECASE)
MOST_UNPACKED = 4  # times a file's size that its content may have in memory
VOC_OUTPUTS = 21  # of detectors of VOC's 20 classes
MASKED = "detr."  # precedes the names of a detector that has a mask head
EMBEDDING_HEAD = "feature_embed.layers.0.weight"  # only DETReg's pre-training models have it
# How torch's weights-only loader says that a pickle names something it would have to import or call.
NAMED = re.compile(r"(?:GLOBAL|global:?|class) ([a-zA-Z_][\w.]*\.[\w.]*\w)")  # … and which it is
NOT_PLAIN = re.compile(r"Unsupported (global|class)|unsupported GLOBAL|unrecognized function", re.IGNORECASE)
NO_MEMORY = re.compile(r"(can\'t|Cannot|could not) allocate memory|not enough memory|bad_alloc", re.IGNORECASE)


def load_checkpoint(location: str, flag: str = "--resume") -> Dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        location: a file, or an http(s) URL, which is downloaded once into torch.hub's cache; a hash in its name
            (`detr-r50-e632da11.pth`) is checked.
        flag: how the user named the checkpoint, used in error messages: a flag, or an argument with its "=".

    Raises:
        InputError: if it can't be had, isn't whole, or holds anything but tensors and plain data.
    """
    downloaded = IS_URL.match(str(location)) is not None
    path = _download(location, flag) if downloaded else str(location)
    given = _given(flag, location if downloaded else path)
    if not os.path.isfile(path):
        raise InputError(f"{given}: {'is not a regular file' if os.path.exists(path) else 'no such file'}")
    try:
        checkpoint = load_plain(path)
    except Exception as error:  # a damaged file can make the unpickler raise anything
        if NOT_PLAIN.search(str(error)):
            named = NAMED.search(str(error))
            raise InputError(f"{_given(flag, path)}: refused, since it holds Python objects other than tensors and plain data, "
                             f"which could execute code when loaded{f' ({named[1]})' if named else ''}") from error
        unread = _why_unread(path, error)
        if unread:
            raise InputError(f"{given}: can't be read now ({unread})") from error
        if downloaded:  # else the next run would find the same broken file
            forget(path)
        raise InputError(f"{given}: not a checkpoint, or damaged "
                         f"({type(error).__name__}: {first_sentence(error)})") from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"{_given(flag, path)}: a checkpoint is a dict, this holds a {type(checkpoint).__name__}")
    return checkpoint


def _why_unread(path: str, error: Exception) -> str:
    """Why a file that could not be loaded can't be read just now; "" if it can, so that what is in it is wrong."""
    if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
        return "memory ran out"
    try:
        _read_through(path)
    except OSError as now:
        return now.strerror or str(now)
    return ""


def load_plain(path: str, mmap: bool = False) -> Any:
    """Read what torch saved, tensors and plain data alone, onto the CPU; the only way in which the programs do.

    Torch before 2.6 hands TorchScript programs on to a loader that runs parts of them, and reads archives of its first
    format, whatever `weights_only` says: both are refused here. A damaged file raises nearly anything.
    """
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if "constants.pkl" in torch._C.PyTorchFileReader(path).get_all_records() if is_zip else tarfile.is_tarfile(path):
        raise RuntimeError("Unsupported global: the file is a program, or of torch's first format")
    if is_zip:
        _refuse_larger_content(path)
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    _refuse_repeated_elements(content)
    return content


def _refuse_larger_content(path: str) -> None:
    """Raise ValueError for an archive that unpacks to much more than its size. torch itself packs nothing."""
    with zipfile.ZipFile(path) as archive:
        unpacked, size = sum(entry.file_size for entry in archive.infolist()), os.path.getsize(path)
    if unpacked > MOST_UNPACKED * size + 2 ** 20:
        raise ValueError(f"its {size} bytes unpack to {unpacked}")


def _refuse_repeated_elements(content: Any) -> None:
    """Raise ValueError for a tensor that shows many elements where few are stored: whatever uses it would make them all."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            needed = value.numel() * value.element_size()
            if value.layout == torch.strided and needed > MOST_UNPACKED * value.untyped_storage().nbytes() + 2 ** 28:
                raise ValueError(f"a tensor of shape {list(value.shape)} is stored as {value.untyped_storage().nbytes()} bytes")
        elif isinstance(value, (dict, list, tuple, argparse.Namespace)) and id(value) not in seen:
            seen.add(id(value))
            value = vars(value) if isinstance(value, argparse.Namespace) else value
            waiting.extend(value.values() if isinstance(value, dict) else value)


def _download(url: str, flag: str) -> str:
    try:
        return fetch(url)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InputError(f"{flag.rstrip('=')}: {shown(url)} could not be downloaded ({first_sentence(error)}); "
                         f"fetch it on another machine and pass {_given(flag, 'FILE')}") from error


def _given(flag: str, value: str) -> str:
    """How the user wrote it: `--resume FILE` on a command line, `pretrained=FILE` in a call."""
    return f"{flag}{value}" if flag.endswith("=") else f"{flag} {value}"


def first_sentence(error: BaseException) -> str:
    """The first sentence of what an error says, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]


def save_checkpoint(checkpoint: Dict[str, Any], path: str, previous: str = "") -> None:
    """Write a checkpoint so that at any moment `path` is either the old file or the whole new one, on the disk and read
    back.

    Args:
        previous: if given, the old file stays under this name.

    Raises:
        InputError: if it can't be written; an earlier file of that name is then untouched.
    """
    folder = os.path.dirname(os.path.abspath(path))
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(folder, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # not on macOS
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # to be read from the disk, not from memory
        if not is_whole(temporary):
            raise OSError("what was written could not be read back")
        if previous and os.path.exists(path):
            _keep(path, previous)
        os.replace(temporary, path)
        _fsync_folder(folder)
    except (OSError, RuntimeError) as error:
        # torch's writer hides the system's reason behind one of its own.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        good = next((name for name in (path, previous) if name and os.path.exists(name)), None)
        kept = f"; the earlier {good} is intact" if good else ""
        raise InputError(f"could not write the checkpoint {path} ({first_sentence(reason)}){kept}") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def is_whole(path: str) -> bool:
    """Whether every part of a file that torch wrote is there and has the checksum that was stored with it. In the format
    of before torch 1.6, which has no checksums: whether it can be loaded.

    Raises:
        OSError, MemoryError: if the file can't be read just now, which says nothing of what is in it.
    """
    try:
        with open(path, "rb") as file:
            if file.read(2) != b"PK":
                load_plain(path)
                return True
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except MemoryError:
        raise
    except Exception:  # a damaged file can make the readers raise anything, OSError too
        _read_through(path)
        return False


def _read_through(path: str) -> None:
    """Read every byte of a file.

    Raises:
        OSError: if it can't be read.
    """
    with open(path, "rb", buffering=0) as file:
        while file.read(2 ** 20):
            pass


def _keep(path: str, previous: str) -> None:
    """Let a file also be called `previous`, or only so where a file can't have two names. There always is one of them."""
    if os.path.exists(previous) and os.path.samefile(path, previous):  # so left by a run that was killed right here
        return
    temporary = f"{previous}.{os.getpid()}.tmp"
    try:
        os.link(path, temporary)
        os.replace(temporary, previous)
    except OSError:
        os.replace(path, previous)


def _fsync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_args(checkpoint: Dict[str, Any], location: str) -> argparse.Namespace:
    """Flags that a checkpoint was trained with.

    Raises:
        InputError: if it holds none, as official weight files do.
    """
    if checkpoint.get("args") is None:
        raise InputError(f"{location} holds weights without the flags they were trained with")
    return argparse.Namespace(**stored_flags(checkpoint))


def stored_flags(checkpoint: Dict[str, Any]) -> Dict[str, Any]:
    """Flags that a checkpoint was trained with, by name; none if it holds none."""
    stored = checkpoint.get("args") or {}
    if isinstance(stored, argparse.Namespace):
        return vars(stored)
    return stored if isinstance(stored, dict) else {}


def counts_from_centre(checkpoint: Dict[str, Any]) -> bool:
    """Whether a checkpoint's DETR was trained with positions counted to pixels' centres, as in DETReg's program."""
    stored = stored_flags(checkpoint)
    if "position_from_centre" in stored:
        return bool(stored["position_from_centre"])
    return "obj_embedding_head" in stored


def model_state(checkpoint: Dict[str, Any], location: str) -> Dict[str, Tensor]:
    """The model's tensors of a checkpoint, which may also be a bare state_dict.

    Raises:
        InputError: if there are none.
    """
    state = {name: value for name, value in find_weights(checkpoint).items() if not name.endswith(".num_batches_tracked")}
    if not state:
        raise InputError(f"{location} holds no model weights under 'model'")
    if not counts_voc_from_zero(checkpoint):
        return state
    outputs = VOC_OUTPUTS if is_deformable(state) else VOC_OUTPUTS + 1  # softmax has no object on top
    return {name: voc_labels_from_one(value) if is_class_head(name) and len(value) == outputs else value
            for name, value in state.items()}


def counts_voc_from_zero(checkpoint: Dict[str, Any]) -> bool:
    """Whether DETReg's program fine-tuned a checkpoint's model on VOC: it counts labels from 0, this one from 1."""
    stored = stored_flags(checkpoint)
    ours = "class_names" in checkpoint or "load_embedding" in stored  # the one is in our checkpoints, the other a flag of ours
    return not ours and "voc" in (stored.get("dataset"), stored.get("dataset_file"))


def voc_labels_from_one(rows: Tensor) -> Tensor:
    """Shift the rows of such a model's class head, or of their moments, from labels 0 … 19 to 1 … 20.

    Of its 21 outputs the last is then unused, which becomes label 0. UP-DETR's VOC models have 20 and count from 1.
    """
    return torch.cat([rows[:VOC_OUTPUTS].roll(1, 0), rows[VOC_OUTPUTS:]])


def is_deformable(state: Dict[str, Tensor]) -> bool:
    """Whether the tensors are a Deformable DETR's."""
    return "transformer.level_embed" in state


def describe_kind(state: Dict[str, Tensor]) -> str:
    """What kind of model a state_dict belongs to, in words."""
    if "patch2query.weight" in state:
        return "an UP-DETR pre-training model"
    if any(name.startswith("mask_head.") for name in state):
        detector = detector_of(state)
        return "a DETR with a mask head" if detector is state else describe_kind(detector) + " and a mask head"
    if EMBEDDING_HEAD in state:
        rest = {name: value for name, value in state.items() if name != EMBEDDING_HEAD}
        return "a DETReg pre-training model: " + describe_kind(rest)
    if is_deformable(state):
        return _describe_deformable(state)
    if "transformer.decoder.norm.weight" in state:
        norm = "pre" if "transformer.encoder.norm.weight" in state else "post"
        return f"a {norm}-norm DETR with {num_outputs(state) - 1} classes" if num_outputs(state) else "a DETR"
    return "something else than a detector"


def _describe_deformable(state: Dict[str, Tensor]) -> str:
    levels, classes = len(state["transformer.level_embed"]), len(state.get("class_embed.0.weight", ()))
    stages = "two-stage " if "transformer.enc_output.weight" in state else ""
    refined = any(name.startswith("transformer.decoder.bbox_embed.") for name in state)
    return (f"a {stages}Deformable DETR {'with box refinement, ' if refined else ''}with {levels} feature "
            f"level{'s' if levels > 1 else ''} and {classes} classes")


def num_outputs(state: Dict[str, Tensor]) -> int:
    """How many classes a detector tells apart, no object included; 0 for other models."""
    return len(detector_of(state).get("class_embed.weight", ()))


def detector_of(state: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """The tensors of the detector inside a model with a mask head, named as in the detector alone; those of another
    model as they are."""
    inner = {name.removeprefix(MASKED): value for name, value in state.items() if name.startswith(MASKED)}
    return inner or state


def load_model_strictly(model: nn.Module, checkpoint: Dict[str, Any], location: str) -> None:
    """Load every tensor, accepting no difference.

    Raises:
        InputError: naming both kinds of model and the first tensor that differs.
    """
    state, own = model_state(checkpoint, location), model.state_dict()
    differing = [name for name in own if name not in state] + [name for name in state if name not in own] + \
                [name for name in own if name in state and own[name].shape != state[name].shape]
    if differing:
        pretext = "patch2query.weight" in state or EMBEDDING_HEAD in state or all(map(is_class_head, differing))
        hint = "; to start a fine-tuning from it use --pretrain" if pretext else ""
        kind, described = describe_kind(state), describe_kind(own)
        kinds = f"{kind}, as the flags describe" if kind == described else f"{kind} but the flags describe {described}"
        number = "1 tensor differs" if len(differing) == 1 else f"{len(differing)} tensors differ"
        raise InputError(f"{location} holds {kinds}: {number}, first {differing[0]}, "
                         f"{_shape(state, differing[0])} in the file and {_shape(own, differing[0])} in the model{hint}")
    model.load_state_dict(state)


def _shape(state: Dict[str, Tensor], name: str) -> str:
    return f"of shape {list(state[name].shape)}" if name in state else "absent"


def load_pretrained(model: nn.Module, checkpoint: Dict[str, Any], location: str,
                    reset_classes: bool = True) -> Dict[str, List[str]]:
    """Start a training from another model's weights: load what fits by name and shape, and say what didn't.

    A detector finds its place in a model with a mask head, and the other way round. The patch classes of an UP-DETR
    pre-training never enter another kind of model, whatever their shape; nor does the class of a DETReg pre-training
    with `reset_classes`.

    Returns:
        names of tensors `loaded`, `skipped` (in the checkpoint, not used) and `missed` (in the model, not filled).

    Raises:
        InputError: if nothing fits, if one of the two is a Deformable DETR and the other isn't, or if the model's
            backbone would stay without weights.
    """
    state, own = model_state(checkpoint, location), model.state_dict()
    pretext_only = "patch2query.weight" in state and "patch2query.weight" not in own
    if EMBEDDING_HEAD in state or stored_flags(checkpoint).get("dataset_file") == "regions":
        pretext_only = pretext_only or reset_classes
    state = _named_like(own, state)
    fits = {name: value for name, value in state.items()
            if name in own and own[name].shape == value.shape and not (pretext_only and is_class_head(name))}
    report = {"loaded": sorted(fits), "skipped": sorted(set(state) - set(fits)), "missed": sorted(set(own) - set(fits))}
    if is_deformable(state) != is_deformable(own):
        raise InputError(f"--pretrain {location} holds {describe_kind(state)} but the flags describe "
                         f"{describe_kind(own)}; is --model the one that it was trained with? "
                         "(for its backbone alone: --load_backbone)")
    if not fits:
        raise InputError(f"--pretrain {location} holds {describe_kind(state)}; none of its tensors fits {describe_kind(own)}")
    if any(_is_backbone(name) for name in report["missed"]):
        raise InputError(f"--pretrain {location} doesn't fill the backbone (first missing: "
                         f"{next(name for name in report['missed'] if _is_backbone(name))}); "
                         "is --backbone the one that it was trained with?")
    model.load_state_dict(fits, strict=False)
    for outcome in ("loaded", "skipped", "missed"):
        print_main(f"pretrain: {outcome} {len(report[outcome])} tensors{_summary(report[outcome], outcome)}")
    return report


def _named_like(own: Dict[str, Tensor], state: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """The tensors of a model with a mask head under the names of one without where `own` is such, and the reverse."""
    masked, wanted = (any(name.startswith(MASKED) for name in names) for names in (state, own))
    if masked and not wanted:
        return {name.removeprefix(MASKED): value for name, value in state.items()}
    if wanted and not masked:
        return {MASKED + name: value for name, value in state.items()}
    return state


def is_class_head(name: str) -> bool:
    """Tell whether a tensor's name is that of a class head, in any detector."""
    # A two-stage Deformable DETR names them twice.
    return name.removeprefix(MASKED).removeprefix("transformer.decoder.").startswith("class_embed.")


def _is_backbone(name: str) -> bool:
    return name.removeprefix(MASKED).startswith("backbone.")


def _summary(names: List[str], outcome: str) -> str:
    return "" if outcome == "loaded" or not names else ": " + ", ".join(names)


def random_state() -> Dict[str, Optional[Tensor]]:
    """State of this process's random generators: CPU, and CUDA's current device if there is one."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


def set_random_state(state: Dict[str, Optional[Tensor]]) -> None:
    """Put this process's random generators into a state from `random_state`."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
