"""The models of hubconf.py: published architectures, and weights by `torch.hub.load` from a file or a web server."""
import functools
import hashlib
import http.server
import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
import torch

import hubconf
from commands import ROOT
from models import build_model
from models.backbone import Backbone, Joiner
from models.detr import DETR, PostProcess
from models.position_encoding import PositionEmbeddingSine
from models.segmentation import PostProcessPanoptic
from models.transformer import Transformer
from util.errors import InputError

DETECTORS = ["detr_resnet50", "detr_resnet50_dc5", "detr_resnet101", "detr_resnet101_dc5"]
# DC5 changes no tensor.
PANOPTIC = {"detr_resnet50_panoptic": "detr_resnet50_panoptic", "detr_resnet50_dc5_panoptic": "detr_resnet50_panoptic",
            "detr_resnet101_panoptic": "detr_resnet101_panoptic"}
UPDETR = {"updetr_resnet50": "updetr_finetune", "updetr_resnet50_pretraining": "updetr_pretrain"}


def on_meta(name: str, *arguments: Any, **options: Any) -> Any:
    """Call an entry point without memory for the tensors."""
    with torch.device("meta"):
        return getattr(hubconf, name)(*arguments, **options)


def numbered(shapes: Dict[str, List[int]]) -> Dict[str, torch.Tensor]:
    """Tensors of these shapes, each filled with a number of its own, that take no space in a file."""
    return {name: torch.tensor(1 + i / 16).expand(shape) for i, (name, shape) in enumerate(shapes.items())}


@pytest.fixture
def shapes(published: Dict[str, Any]) -> Callable[[str], Dict[str, List[int]]]:
    """Names and shapes of the tensors of a published model."""

    def find(name: str) -> Dict[str, List[int]]:
        facts = published["models"][name]
        found = {**(find(facts["like"]) if facts["like"] else {}), **facts["add"]}
        return {key: shape for key, shape in found.items() if key not in facts["remove"]}

    return find


def shapes_of(model: torch.nn.Module) -> Dict[str, List[int]]:
    return {name: list(value.shape) for name, value in model.state_dict().items()}


# Architectures.


@pytest.mark.parametrize("name, recorded", [*zip(DETECTORS, DETECTORS), *PANOPTIC.items(), *UPDETR.items()])
def test_models_have_the_published_tensors(name: str, recorded: str, shapes: Callable) -> None:
    assert shapes_of(on_meta(name)) == shapes(recorded)


def test_every_callable_without_underscore_is_an_entry_point() -> None:
    """`torch.hub.list` shows these, and nothing that was imported."""
    entries = {name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")}
    assert entries == {*DETECTORS, *PANOPTIC, *UPDETR}
    assert all(getattr(hubconf, name).__doc__ for name in entries)


def test_dilation_and_number_of_classes() -> None:
    """DC5 keeps the stride of the last map at 16."""
    image = torch.zeros(1, 3, 64, 64)
    for name, size in (("detr_resnet50", 2), ("detr_resnet50_dc5", 4)):
        model = getattr(hubconf, name)(num_classes=7)
        assert model.class_embed.out_features == 8
        with torch.no_grad():
            assert model.backbone[0].body(image)["0"].shape == (1, 2048, size, size)


def test_post_processors() -> None:
    assert isinstance(on_meta("detr_resnet50", return_postprocessor=True)[1], PostProcess)
    assert isinstance(on_meta("updetr_resnet50", return_postprocessor=True)[1], PostProcess)
    panoptic = on_meta("detr_resnet50_panoptic", return_postprocessor=True)[1]
    assert isinstance(panoptic, PostProcessPanoptic) and panoptic.threshold == 0.85
    # COCO: 1 person … 90 toothbrush are things; 92 banner … 200 rug are stuff.
    assert [panoptic.is_thing_map[label] for label in (1, 90, 92, 200)] == [True, True, False, False]
    assert on_meta("detr_resnet50_panoptic", threshold=0.5, return_postprocessor=True)[1].threshold == 0.5


def test_a_hub_model_is_what_main_builds(tiny_args: Callable, images: List[torch.Tensor]) -> None:
    """At the published sizes, with the same weights: the same predictions."""
    torch.manual_seed(1)
    model = hubconf.detr_resnet50(num_classes=5).eval()
    built = build_model(tiny_args(backbone="resnet50", hidden_dim=256, nheads=8, enc_layers=6, dec_layers=6,
                                  dim_feedforward=2048, num_queries=100, aux_loss=False))[0].eval()
    built.load_state_dict(model.state_dict())
    with torch.no_grad():
        out, expected = model(images), built(images)
    assert sorted(out) == ["pred_boxes", "pred_logits"]
    torch.testing.assert_close(out, expected, atol=0, rtol=0)


# Weights from files.


def test_up_detr_weights_tell_their_classes_and_patches(shapes: Callable, tmp_path: Path) -> None:
    state = numbered({**shapes("updetr_finetune"), "class_embed.weight": [22, 256], "class_embed.bias": [22]})
    torch.save({"model": state}, tmp_path / "voc.pth")
    model = hubconf.updetr_resnet50(str(tmp_path / "voc.pth"))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.class_embed.out_features == 22
    state = numbered(shapes("updetr_pretrain_no_recon"))
    torch.save({"model": state, "args": {"num_patches": 5}}, tmp_path / "pre.pth")
    model = hubconf.updetr_resnet50_pretraining(str(tmp_path / "pre.pth"))
    assert (model.num_patches, model.queries_per_patch, model.feature_align) == (5, 20, None)
    assert hubconf.updetr_resnet50_pretraining(str(tmp_path / "pre.pth"), num_patches=20).num_patches == 20
    with pytest.raises(InputError, match="pre.pth holds an UP-DETR pre-training model: load it with updetr_resnet50_p"):
        hubconf.updetr_resnet50(str(tmp_path / "pre.pth"))
    with pytest.raises(InputError, match="voc.pth holds a pre-norm DETR with 21 classes but the flags describe"):
        hubconf.updetr_resnet50(str(tmp_path / "voc.pth"), num_classes=91)
    with pytest.raises(InputError, match="^checkpoint=missing.pth: no such file$"):
        hubconf.updetr_resnet50("missing.pth")


def test_construction_by_hand_takes_an_up_detr_checkpoint(images: List[torch.Tensor], tmp_path: Path) -> None:
    """What tutorials show, word for word, at full size; the hub's model of the same file predicts the same."""
    torch.manual_seed(2)
    torch.save({"model": hubconf.updetr_resnet50().state_dict(), "epoch": 3}, tmp_path / "checkpoint.pth")

    hidden_dim = 256
    backbone = Backbone("resnet50", train_backbone=False, return_interm_layers=False, dilation=False)
    pos_enc = PositionEmbeddingSine(hidden_dim // 2, normalize=True)
    backbone_with_pos_enc = Joiner(backbone, pos_enc)
    backbone_with_pos_enc.num_channels = backbone.num_channels
    transformer = Transformer(d_model=hidden_dim, normalize_before=True, return_intermediate_dec=True)
    model = DETR(backbone_with_pos_enc, transformer, num_classes=91, num_queries=100)
    checkpoint = torch.load(tmp_path / "checkpoint.pth", map_location="cpu", weights_only=True)
    model.load_state_dict(checkpoint["model"])

    hub = hubconf.updetr_resnet50(str(tmp_path / "checkpoint.pth"))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), hub.eval()(images), atol=0, rtol=0)


def test_other_classes_than_the_published_ones_are_refused_before_anything_is_fetched() -> None:
    with pytest.raises(InputError, match=r"^num_classes=5: the published detr_resnet50 has 91 classes; to train it on "
                                         r"others, start main.py with --pretrain https://\S+/detr-r50-e632da11.pth$"):
        hubconf.detr_resnet50(pretrained=True, num_classes=5)


# Weights from a web server, through torch.hub in a process of its own.


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Tuple[str, Path]]:
    """A web server on this machine: its address, and the folder that it serves."""
    folder = tmp_path / "web"
    folder.mkdir()
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/", folder
        running.shutdown()
        thread.join()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


def published_at(address: str, files: Dict[str, str], folder: Path) -> Path:
    """A copy of the project as if its weights were published at this address under other names."""
    text = (ROOT / "hubconf.py").read_text().replace("https://dl.fbaipublicfiles.com/detr/", address)
    for official, name in files.items():
        assert official in text
        text = text.replace(official, name)
    folder.mkdir()
    (folder / "hubconf.py").write_text(text)
    for package in ("models", "util"):
        (folder / package).symlink_to(ROOT / package)
    return folder


def in_new_process(script: str, tmp_path: Path) -> Any:
    """Run a script far from the project, with an empty cache; what it prints last, read as JSON."""
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment.update(TORCH_HOME=str(tmp_path / "cache"), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", "import json, torch\n" + textwrap.dedent(script)], cwd=tmp_path,
                          env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_pretrained_models_through_torch_hub(web: Tuple[str, Path], shapes: Callable, tmp_path: Path) -> None:
    """Detectors and a panoptic model: downloaded, hash checked, every tensor in its place, kept in torch's cache."""
    address, folder = web
    files = {}
    for name, official in (("detr_resnet50", "detr-r50-e632da11.pth"),
                           ("detr_resnet50_panoptic", "detr-r50-panoptic-00ce5173.pth")):
        torch.save({"model": numbered(shapes(name))}, folder / "new")
        digest = hashlib.sha256((folder / "new").read_bytes()).hexdigest()
        files[official] = f"{official[:-12]}{digest[:8]}.pth"
        (folder / "new").rename(folder / files[official])
    torch.save({"model": numbered(shapes("updetr_finetune"))}, folder / "checkpoint.pth")
    found = in_new_process(f"""
        folder = {str(published_at(address, files, tmp_path / "copy"))!r}
        detector, postprocess = torch.hub.load(folder, "detr_resnet50", source="local", pretrained=True,
                                               return_postprocessor=True)
        panoptic = torch.hub.load(folder, "detr_resnet50_panoptic", source="local", pretrained=True)
        again = torch.hub.load(folder, "detr_resnet50", source="local",
                               pretrained={address + files["detr-r50-e632da11.pth"]!r})
        updetr = torch.hub.load({str(ROOT)!r}, "updetr_resnet50", source="local",
                                checkpoint={address + "checkpoint.pth"!r})
        states = [model.state_dict().items() for model in (detector, panoptic, again, updetr)]
        ranges = [{{name: [value.min().item(), value.max().item()] for name, value in state}} for state in states]
        print(json.dumps([type(postprocess).__name__, ranges]))
        """, tmp_path)
    assert found[0] == "PostProcess"
    for name, filled in zip(("detr_resnet50", "detr_resnet50_panoptic", "detr_resnet50", "updetr_finetune"), found[1]):
        expected = {key: [value.flatten()[0].item()] * 2 for key, value in numbered(shapes(name)).items()}
        assert filled == expected
    cache = tmp_path / "cache" / "hub" / "checkpoints"
    kept = [path.name for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert sorted(kept) == sorted([*files.values(), "checkpoint.pth"]) and not (cache / "checkpoint.pth").exists()


def test_wrong_files_and_no_network_are_told_in_a_sentence(web: Tuple[str, Path], shapes: Callable,
                                                           tmp_path: Path) -> None:
    """Another file under the official name; nobody at that address."""
    address, folder = web
    torch.save({"model": numbered(shapes("detr_resnet50"))}, folder / "detr-r50-e632da11.pth")
    copy = published_at(address, {}, tmp_path / "copy")
    unreachable = published_at("http://127.0.0.1:9/", {}, tmp_path / "offline")
    found = in_new_process(f"""
        told = []
        for folder, name in (({str(copy)!r}, "detr_resnet50"), ({str(unreachable)!r}, "detr_resnet101")):
            try:
                torch.hub.load(folder, name, source="local", pretrained=True)
            except ValueError as error:
                told.append(str(error))
        print(json.dumps(told))
        """, tmp_path)
    wrong, offline = found
    assert wrong.startswith(f"pretrained: {address}detr-r50-e632da11.pth could not be downloaded (invalid hash value")
    assert offline.startswith("pretrained: http://127.0.0.1:9/detr-r101-2c7b67e5.pth could not be downloaded (<urlopen")
    assert all(sentence.endswith("; fetch it on another machine and pass pretrained=FILE") for sentence in found)
    kept = [path for path in (tmp_path / "cache" / "hub" / "checkpoints").rglob("*") if path.suffix != ".lock"]
    assert not kept, "a wrong file is not kept"


@pytest.mark.parametrize("given, sentence", [
    ("missing.pth", "^pretrained=missing.pth: no such file$"),
    ("text.pth", r"^pretrained=.*text.pth: not a checkpoint, or damaged \("),
    ("other.pth", "other.pth holds a pre-norm DETR with 91 classes but the flags describe a post-norm DETR with")])
def test_files_that_do_not_fit(given: str, sentence: str, shapes: Callable, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.pth").write_text("hello\n")
    torch.save({"model": numbered(shapes("updetr_finetune"))}, "other.pth")
    with pytest.raises(InputError, match=sentence):
        hubconf.detr_resnet50(pretrained=given)
