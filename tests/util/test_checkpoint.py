"""A checkpoint on disk is whole or absent, reading one never executes code, and every mistake is one sentence."""
import argparse
import concurrent.futures
import copy
import hashlib
import http.server
import io
import os
import pathlib
import pickle
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from models import build_model
from util import download
from util.checkpoint import (checkpoint_args, counts_from_centre, describe_kind, load_checkpoint, load_model_strictly,
                             load_pretrained, model_state, random_state, save_checkpoint, set_random_state)
from util.errors import InputError


def content(checkpoint):
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


# Writing.


def test_round_trip(tmp_path):
    checkpoint = {"model": {"weight": torch.arange(3.0)}, "epoch": 4,
                  "args": {"lr": 1e-4, "sizes": [1, 2], "amp": None}}
    path = tmp_path / "new" / "folder" / "checkpoint.pth"
    save_checkpoint(checkpoint, str(path))
    loaded = load_checkpoint(str(path))
    assert torch.equal(loaded["model"].pop("weight"), checkpoint["model"].pop("weight"))
    assert loaded == checkpoint
    assert os.listdir(path.parent) == ["checkpoint.pth"]


def test_a_checkpoint_gets_the_permissions_of_any_new_file(tmp_path):
    save_checkpoint({"epoch": 1}, str(tmp_path / "checkpoint.pth"))
    (tmp_path / "other").touch()
    assert (tmp_path / "checkpoint.pth").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("tensors", ["one large tensor", "many small tensors"])
def test_no_space_leaves_the_old_checkpoint(tmp_path, tensors, root):
    """A process that may write files of 100 kB only: the write fails half-way, as on a full disk."""
    path = str(tmp_path / "checkpoint.pth")
    save_checkpoint({"epoch": 7}, path)
    before = pathlib.Path(path).read_bytes()
    script = textwrap.dedent(f"""
        import resource, torch
        from util.checkpoint import save_checkpoint
        from util.errors import run_program
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        many = {tensors!r}.startswith("many")
        state = {{str(i): torch.zeros(500) for i in range(100)}} if many else {{"a": torch.zeros(100_000)}}
        run_program(lambda: save_checkpoint(state, {path!r}))
    """)
    result = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == (f"error: could not write the checkpoint {path} ([Errno 27] File too large); "
                             f"the earlier {path} is intact\n")
    assert os.listdir(tmp_path) == ["checkpoint.pth"]
    assert pathlib.Path(path).read_bytes() == before


def test_a_process_killed_while_writing_leaves_the_old_checkpoint(tmp_path, root):
    path = str(tmp_path / "checkpoint.pth")
    save_checkpoint({"epoch": 7}, path)
    script = textwrap.dedent(f"""
        import os, signal, torch
        from util.checkpoint import save_checkpoint

        class Killer:
            def __reduce__(self):
                os.kill(os.getpid(), signal.SIGKILL)

        save_checkpoint({{"a": torch.zeros(100_000), "b": Killer()}}, {path!r})
    """)
    result = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True)
    assert result.returncode == -9
    assert load_checkpoint(path) == {"epoch": 7}


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    path = str(tmp_path / "file" / "checkpoint.pth")
    with pytest.raises(InputError, match=rf"^could not write the checkpoint {path} \(\[Errno \d+\] [^;]*\)$"):
        save_checkpoint({"epoch": 1}, path)


# Reading: files.


class RunsCommand:
    """Unpickling it naively creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("writer", ["zip", "legacy", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_executed(tmp_path, writer):
    trace, path = tmp_path / "executed", tmp_path / "checkpoint.pth"
    malicious = {"model": {"weight": torch.zeros(1)}, "args": RunsCommand(trace)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(malicious, protocol=2))
    else:
        torch.save(malicious, path, _use_new_zipfile_serialization=writer == "zip")
    with pytest.raises(InputError) as caught:
        load_checkpoint(str(path))
    assert not trace.exists()
    if writer != "pickle":  # a bare pickle with tensors isn't a file of torch's at all
        assert str(caught.value).removesuffix(" (posix.system)") == (f"--resume {path}: refused, since it holds Python objects other than tensors and "
                                     "plain data, which could execute code when loaded")
    torch.load(path, weights_only=False) if writer != "pickle" else pickle.loads(path.read_bytes())
    assert trace.exists(), "the trap works"


def test_a_pickled_model_is_refused(tmp_path):
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "model.pth")
    with pytest.raises(InputError, match="--pretrain .*model.pth: refused, since it holds Python objects"):
        load_checkpoint(str(tmp_path / "model.pth"), flag="--pretrain")


def test_official_checkpoints_with_a_namespace_load(tmp_path):
    args = argparse.Namespace(lr=1e-4, backbone="resnet50", output_dir=pathlib.PosixPath("/checkpoint/out"))
    torch.save({"model": {"weight": torch.ones(2)}, "args": args, "epoch": 3}, tmp_path / "official.pth")
    checkpoint = load_checkpoint(str(tmp_path / "official.pth"))
    assert checkpoint_args(checkpoint, "official.pth") == args
    assert checkpoint_args({"args": {"lr": 0.1}}, "ours.pth") == argparse.Namespace(lr=0.1)
    with pytest.raises(InputError, match="^weights.pth holds weights without the flags they were trained with$"):
        checkpoint_args({"model": {}}, "weights.pth")


def test_a_checkpoint_loads_to_the_cpu_without_its_device(tmp_path):
    save_checkpoint({"model": {"weight": torch.ones(2)}}, str(tmp_path / "a.pth"))
    assert load_checkpoint(str(tmp_path / "a.pth"))["model"]["weight"].device.type == "cpu"


@pytest.mark.parametrize("name, data", [
    ("truncated.pth", content({"a": torch.zeros(1000)})[:2000]),
    ("cut.pth", content({"a": torch.zeros(1000)})[:-40]),
    ("text.pth", b"hello, I am text\n"),
    ("page.pth", b"<html>404 not found</html>\n"),
    ("empty.pth", b"")])
def test_what_is_no_checkpoint(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        load_checkpoint(str(path))
    assert str(caught.value).startswith(f"--resume {path}: not a checkpoint, or damaged (")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(path)) + 200


def test_a_missing_file_and_a_folder(tmp_path):
    for path, words in ((tmp_path / "missing.pth", "no such file"), (tmp_path, "is not a regular file")):
        with pytest.raises(InputError, match=f"^--load_backbone {path}: {words}$"):
            load_checkpoint(str(path), flag="--load_backbone")


def test_a_list_is_no_checkpoint(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(InputError, match=r"list.pth: a checkpoint is a dict, this holds a list$"):
        load_checkpoint(str(tmp_path / "list.pth"))


# Reading: URLs.

WHOLE = content({"model": {"weight": torch.full((5000,), 2.0)}})
DIGEST = hashlib.sha256(WHOLE).hexdigest()


class Files(http.server.BaseHTTPRequestHandler):
    """Serves one checkpoint under several names; `/cut` promises more than it sends, `/drip` takes its time."""

    requests = []

    def do_GET(self):
        self.requests.append(self.path)
        if self.path.startswith("/missing"):
            self.send_error(404)
            return
        body = {"/page.pth": b"<html>please log in</html>", "/b/checkpoint.pth": content({"epoch": 2}),
                "/a/checkpoint.pth": content({"epoch": 1})}.get(self.path, WHOLE)
        self.send_response(200)
        if self.path.startswith("/drip"):
            self.end_headers()
            for byte in body:
                self.wfile.write(bytes([byte]))
                time.sleep(0.02)
            return
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if self.path.startswith("/cut") else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A web server on this machine, and an empty cache; yields the server's address."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Files.requests.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def cached_files(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache" / "hub" / "checkpoints").glob("*.pth*")
                  if path.suffix != ".url")


def test_a_url_is_downloaded_once_and_its_hash_checked(server, tmp_path):
    name = f"detr-{DIGEST[:8]}.pth"
    for _ in range(2):
        assert load_checkpoint(f"{server}/{name}")["model"]["weight"].sum() == 10000
    assert Files.requests == [f"/{name}"]
    assert cached_files(tmp_path) == [name], "where torch.hub keeps it too"


def test_a_wrong_hash_is_refused_and_nothing_kept(server, tmp_path):
    url = f"{server}/detr-00000000.pth"
    with pytest.raises(InputError) as caught:
        load_checkpoint(url)
    assert str(caught.value) == (
        f'--resume: {url} could not be downloaded (invalid hash value (expected "00000000", got "{DIGEST}")); '
        "fetch it on another machine and pass --resume FILE")
    assert cached_files(tmp_path) == []


def test_a_missing_url(server, tmp_path):
    url = f"{server}/missing.pth"
    with pytest.raises(InputError, match=rf"^--pretrain: {url} could not be downloaded \(HTTP Error 404: Not Found\); "
                                         "fetch it on another machine and pass --pretrain FILE$"):
        load_checkpoint(url, flag="--pretrain")
    assert cached_files(tmp_path) == []


def test_no_network(server):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/a.pth"  # nobody listens there any more
    with pytest.raises(InputError, match=rf"^--load_backbone: {url} could not be downloaded \(.*refused.*\); fetch it "
                                         "on another machine and pass --load_backbone FILE$"):
        load_checkpoint(url, flag="--load_backbone")


@pytest.mark.parametrize("name", ["cut.pth", f"cut-{DIGEST[:8]}.pth", "page.pth"])
def test_a_broken_download_does_not_stay(server, tmp_path, name):
    """A connection that ends too early, or a log-in page: the next run must not find it in the cache."""
    with pytest.raises(InputError, match=rf"^--resume:? {server}/{name}"):
        load_checkpoint(f"{server}/{name}")
    assert cached_files(tmp_path) == []


def test_files_of_one_name_from_different_places_are_told_apart(server):
    assert [load_checkpoint(f"{server}/{folder}/checkpoint.pth")["epoch"] for folder in "aabba"] == [1, 1, 2, 2, 1]
    assert Files.requests == ["/a/checkpoint.pth", "/b/checkpoint.pth"]


def test_a_file_put_into_the_cache_by_hand_is_used(server, tmp_path):
    """As torch.hub or a user without network puts it there."""
    save_checkpoint({"epoch": 8}, str(tmp_path / "cache" / "hub" / "checkpoints" / "swav_800ep_pretrain.pth.tar"))
    assert load_checkpoint(f"{server}/deepcluster/swav_800ep_pretrain.pth.tar") == {"epoch": 8}
    assert Files.requests == []


def test_a_file_put_there_by_hand_is_never_removed(server, tmp_path):
    file = tmp_path / "cache" / "hub" / "checkpoints" / "a.pth"
    file.parent.mkdir(parents=True)
    file.write_text("no checkpoint")
    with pytest.raises(InputError, match="not a checkpoint, or damaged"):
        load_checkpoint(f"{server}/a.pth")
    assert file.read_text() == "no checkpoint"


def test_the_note_beside_a_cached_file(server, tmp_path):
    file = tmp_path / "cache" / "hub" / "checkpoints" / "a.pth"
    save_checkpoint({"epoch": 8}, str(file))
    file.with_name("a.pth.url").write_text(f"{server}/a.pth\n")
    assert load_checkpoint(f"{server}/a.pth") == {"epoch": 8}
    file.with_name("a.pth.url").unlink()
    os.mkfifo(file.with_name("a.pth.url"))
    with pytest.raises(InputError, match="a.pth.url is a named pipe"):
        load_checkpoint(f"{server}/a.pth")


def test_a_server_that_drips_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "STALL_S", 0.3)
    with pytest.raises(InputError, match=r"could not be downloaded \(timed out: \d+ bytes came within 0.3 seconds\)"):
        load_checkpoint(f"{server}/drip.pth")
    assert not [path for path in (tmp_path / "cache").rglob("*drip*")]


def test_a_cached_file_that_changed_since_is_fetched_anew(server, tmp_path):
    name = f"detr-{DIGEST[:8]}.pth"
    load_checkpoint(f"{server}/{name}")
    (tmp_path / "cache" / "hub" / "checkpoints" / name).write_bytes(content({"model": {"weight": torch.zeros(3)}}))
    assert load_checkpoint(f"{server}/{name}")["model"]["weight"].sum() == 10000
    assert Files.requests == [f"/{name}"] * 2


def test_one_of_several_downloads_and_the_others_wait(server):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(download.fetch, [f"{server}/weights.pth"] * 4))
    assert len(set(found)) == 1 and Files.requests == ["/weights.pth"]


@pytest.mark.parametrize("url", ["http://[bad", "http://", "https://host/", "http://host:port/a.pth", "http://host/a/..",
                                 "http://ho st/a.pth", "http://127.0.0.1:1/\u00e4.pth", "http://127.0.0.1:1/" + "a" * 300,
                                 "http://127.0.0.1:1/a\0b.pth", "HTTP://127.0.0.1:1/\udc80.pth", "http://.../a.pth"])
def test_malformed_addresses(server, url):
    with pytest.raises(InputError, match=r"^--resume: .* could not be downloaded \(.+\); fetch it on another machine"):
        load_checkpoint(url)


def test_a_cache_that_cannot_be_written(server, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(InputError, match=r"could not be downloaded \(\[Errno \d+\].*\); fetch it on another machine"):
        load_checkpoint(f"{server}/a.pth")


# From checkpoint to model.


@pytest.mark.parametrize("checkpoint",
                         [{"epoch": 3}, {"model": {}}, {"model": [1]}, {"model": {"weight": 3}}, {}], ids=str)
def test_checkpoints_without_a_model(checkpoint):
    with pytest.raises(InputError, match="^a.pth holds no model weights under 'model'$"):
        model_state(checkpoint, "a.pth")


def test_a_bare_state_dict_is_a_model():
    state = {"weight": torch.zeros(2)}
    assert model_state(state, "a.pth") == state and model_state({"model": state, "epoch": 1}, "a.pth") == state


@pytest.fixture
def models(tiny_args):
    """Tiny models of each kind."""
    kinds = {"detr": {}, "pre_norm": dict(pre_norm=True), "other_classes": dict(num_classes=7),
             "updetr": dict(pretraining=True, pre_norm=True), "cut": dict(backbone_last_layer="layer3"),
             "masks": dict(masks=True), "deformable": dict(model="deformable_detr"),
             "two_stage": dict(model="deformable_detr", two_stage=True, with_box_refine=True, num_feature_levels=1),
             "detreg": dict(dataset_file="regions", model="detr", object_embedding_loss=True),
             "detreg_two_stage": dict(dataset_file="regions", model="deformable_detr", two_stage=True,
                                      with_box_refine=True, num_feature_levels=1, object_embedding_loss=True)}
    built = {}

    def get(kind):
        if kind not in built:
            torch.manual_seed(len(built))
            built[kind] = build_model(tiny_args(**kinds[kind]))[0]
        return built[kind]

    return get


def test_kinds_of_models_in_words(models):
    words = {kind: describe_kind(models(kind).state_dict()) for kind in ("detr", "pre_norm", "other_classes", "updetr")}
    assert words == {"detr": "a post-norm DETR with 5 classes", "pre_norm": "a pre-norm DETR with 5 classes",
                     "other_classes": "a post-norm DETR with 7 classes", "updetr": "an UP-DETR pre-training model"}
    assert describe_kind(models("masks").state_dict()) == "a post-norm DETR with 5 classes and a mask head"
    assert describe_kind({"mask_head.lay1.weight": torch.zeros(1)}) == "a DETR with a mask head"
    assert describe_kind(models("deformable").state_dict()) == "a Deformable DETR with 4 feature levels and 5 classes"
    assert describe_kind(models("two_stage").state_dict()) == (
        "a two-stage Deformable DETR with box refinement, with 1 feature level and 5 classes")
    assert describe_kind(models("detreg").state_dict()) == (
        "a DETReg pre-training model: a post-norm DETR with 5 classes")
    assert describe_kind({"weight": torch.zeros(1)}) == "something else than a detector"


@pytest.mark.parametrize("held, wanted, difference", [
    ("other_classes", "detr", r"2 tensors differ, first class_embed.weight, of shape \[8, 32\] in the file and of shape "
                              r"\[6, 32\] in the model; to start a fine-tuning from it use --pretrain"),
    ("detr", "pre_norm", "2 tensors differ, first transformer.encoder.norm.weight, absent in the file and of shape .*"),
    ("updetr", "pre_norm", r"\d+ tensors differ, first patch2query.weight, .*; to start a fine-tuning from it use "
                           "--pretrain"),
    ("detr", "masks", r"\d+ tensors differ, first detr.transformer.encoder.layers.0.self_attn.in_proj_weight, .*"),
    ("pre_norm", "updetr", r"\d+ tensors differ, first patch2query.weight, .*")])
def test_loading_strictly_refuses_any_difference(models, held, wanted, difference):
    words = {"detr": "a post-norm DETR with 5 classes", "pre_norm": "a pre-norm DETR with 5 classes",
             "other_classes": "a post-norm DETR with 7 classes", "updetr": "an UP-DETR pre-training model",
             "masks": "a post-norm DETR with 5 classes and a mask head"}
    message = f"^a.pth holds {words[held]} but the flags describe {words[wanted]}: {difference}$"
    with pytest.raises(InputError, match=message):
        load_model_strictly(models(wanted), {"model": models(held).state_dict()}, "a.pth")


def test_loading_strictly_takes_every_tensor(models, tiny_args):
    model = build_model(tiny_args())[0]
    load_model_strictly(model, {"model": models("detr").state_dict()}, "a.pth")
    assert all(torch.equal(value, models("detr").state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("pretraining, finetuning", [("detreg", "detr"), ("detreg_two_stage", "two_stage")])
@pytest.mark.parametrize("reset", [True, False])
def test_a_detregs_class_stays_behind_unless_it_is_to_be_kept(pretraining, finetuning, reset, models, tiny_args):
    """Whatever its shape, and under every name that it has."""
    model = copy.deepcopy(models(finetuning))
    state = models(pretraining).state_dict()
    report = load_pretrained(model, {"model": state}, "detreg.pth", reset_classes=reset)
    assert {name.split(".")[0] for name in report["skipped"]} - {"class_embed", "transformer"} == {"feature_embed"}
    assert all("class_embed" in name for name in report["missed"]) and bool(report["missed"]) == reset
    for name, value in model.state_dict().items():
        if not name.endswith("bias"):  # biases may start alike
            assert torch.equal(value, state[name]) == (not reset or "class_embed" not in name), name


@pytest.mark.parametrize("pretraining, model, words", [
    ("deformable", "detr", "a Deformable DETR with 4 feature levels and 5 classes but the flags describe a post-norm "
     "DETR with 5 classes; is --model the one"),
    ("detreg", "deformable", "a DETReg pre-training model: a post-norm DETR with 5 classes but the flags describe a "
     "Deformable DETR")])
def test_a_detector_doesnt_start_from_another_kind_of_detector(pretraining, model, words, models):
    with pytest.raises(InputError, match=f"^--pretrain a.pth holds {words}"):
        load_pretrained(models(model), {"model": models(pretraining).state_dict()}, "a.pth")


def test_a_pre_training_without_embeddings_is_told_by_its_flags(models):
    state, model = models("other_classes").state_dict(), copy.deepcopy(models("other_classes"))
    for dataset_file, count in (("coco", 0), ("regions", 2)):
        report = load_pretrained(model, {"model": state, "args": {"dataset_file": dataset_file}}, "a.pth")
        assert len(report["missed"]) == count


@pytest.mark.parametrize("checkpoint, from_centre", [
    ({}, False), ({"args": {"lr": 1}}, False), ({"args": {"position_from_centre": True}}, True),
    ({"args": {"position_from_centre": None, "obj_embedding_head": "head"}}, False),
    # DETReg's own program kept its flags like this.
    ({"args": argparse.Namespace(obj_embedding_head="intermediate", model="detr")}, True)])
def test_how_a_checkpoints_detr_counts_positions(checkpoint, from_centre):
    assert counts_from_centre(checkpoint) == from_centre


def test_fine_tuning_starts_from_whatever_fits(models, tiny_args, capsys):
    model = build_model(tiny_args(pre_norm=True))[0]
    fresh_head = model.class_embed.weight.clone()
    state = models("updetr").state_dict()
    report = load_pretrained(model, {"model": state}, "updetr.pth")
    assert report["missed"] == ["class_embed.bias", "class_embed.weight"]
    assert {name.split(".")[0] for name in report["skipped"]} == {"class_embed", "patch2query", "feature_align"}
    assert torch.equal(model.class_embed.weight, fresh_head)
    assert torch.equal(model.query_embed.weight, state["query_embed.weight"])
    assert capsys.readouterr().out.splitlines() == [
        f"pretrain: loaded {len(model.state_dict()) - 2} tensors",
        "pretrain: skipped 8 tensors: class_embed.bias, class_embed.weight, feature_align.layers.0.bias, "
        "feature_align.layers.0.weight, feature_align.layers.1.bias, feature_align.layers.1.weight, patch2query.bias, "
        "patch2query.weight",
        "pretrain: missed 2 tensors: class_embed.bias, class_embed.weight"]


def test_a_detector_with_other_classes_gives_all_but_its_class_head(models, tiny_args):
    report = load_pretrained(build_model(tiny_args())[0], {"model": models("other_classes").state_dict()}, "a.pth")
    assert report["missed"] == report["skipped"] == ["class_embed.bias", "class_embed.weight"]


@pytest.mark.parametrize("start, missed", [("updetr", ["class_embed.bias", "class_embed.weight"]), ("pre_norm", [])])
def test_masks_start_from_a_detector(models, tiny_args, start, missed):
    """All of it finds its place under `detr.`, except for the patch classes of a pre-training; the mask head is new."""
    model = build_model(tiny_args(masks=True, pre_norm=True))[0]
    state = models(start).state_dict()
    report = load_pretrained(model, {"model": state}, "a.pth")
    own = model.state_dict()
    head = [name for name in own if not name.startswith("detr.")]
    assert head and report["missed"] == sorted(head + [f"detr.{name}" for name in missed])
    assert all(torch.equal(own[name], state[name.removeprefix("detr.")]) for name in report["loaded"])


def test_a_detector_starts_from_a_model_with_masks(models, tiny_args):
    report = load_pretrained(build_model(tiny_args())[0], {"model": models("masks").state_dict()}, "a.pth")
    assert report["missed"] == []
    assert {name.split(".")[0] for name in report["skipped"]} == {"bbox_attention", "mask_head"}


def test_continuing_a_pre_training_keeps_its_classes(models, tiny_args):
    report = load_pretrained(build_model(tiny_args(pretraining=True, pre_norm=True))[0],
                             {"model": models("updetr").state_dict()}, "a")
    assert report["missed"] == report["skipped"] == []


def test_pretrain_refuses_what_fits_nowhere(models):
    with pytest.raises(InputError, match="^--pretrain a.pth holds something else than a detector; none of its tensors "
                                         "fits a post-norm DETR with 5 classes$"):
        load_pretrained(models("detr"), {"model": {"weight": torch.zeros(3)}}, "a.pth")


def test_pretrain_refuses_a_checkpoint_that_leaves_the_backbone_empty(models):
    """The backbone's own weights weren't loaded because this checkpoint was to bring them."""
    with pytest.raises(InputError, match=r"^--pretrain a.pth doesn't fill the backbone \(first missing: backbone\.0\."
                                         r"body\.layer4\.0\..*\); is --backbone the one that it was trained with\?$"):
        load_pretrained(models("detr"), {"model": models("cut").state_dict()}, "a.pth")


def test_random_state_goes_on_where_it_was(tmp_path):
    torch.manual_seed(3)
    torch.rand(5)
    save_checkpoint({"random": random_state()}, str(tmp_path / "a.pth"))
    expected = torch.rand(4), torch.randn(3)
    torch.manual_seed(99)
    set_random_state(load_checkpoint(str(tmp_path / "a.pth"))["random"])
    assert torch.equal(torch.rand(4), expected[0]) and torch.equal(torch.randn(3), expected[1])
