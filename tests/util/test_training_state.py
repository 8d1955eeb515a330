"""What a run carries on: saved and resumed state, the log's lines, and which checkpoint `--resume` means."""
import argparse
import copy
import json
import os

import pytest
import torch
from torch import nn

from util.checkpoint import load_checkpoint, save_checkpoint
from util.errors import InputError
from util.schedule import DropAfterEpochs, build_scheduler
from util.training_state import TrainingState, append_log, find_resume, lay_out_like_parameters, open_log


def make_state(seed=0, lr_drop=2, parts=2):
    """A run of a small network with two optimizer groups, as a detector's."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    groups = [{"params": model[1].parameters()}, {"params": model[0].parameters(), "lr": 0.01}][:parts]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    return TrainingState(model, optimizer, DropAfterEpochs(optimizer, range(lr_drop, 10, lr_drop)),
                         torch.amp.GradScaler("cpu", enabled=False), {1: "cat"})


def train_epoch(state):
    """An epoch of one step on random data, which takes the random state along."""
    state.optimizer.zero_grad()
    state.model(torch.randn(5, 3)).square().sum().backward()
    state.optimizer.step()
    state.lr_scheduler.step()


def rates(state):
    return [group["lr"] for group in state.optimizer.param_groups]


def test_resumed_training_goes_on_as_if_never_stopped(tmp_path):
    args = argparse.Namespace(output_dir=str(tmp_path), lr=0.1, sizes=(1, 2), device=torch.device("cpu"))
    straight = make_state()
    train_epoch(straight)
    straight.best = 0.25
    straight.save(args, 0, ["checkpoint.pth", "checkpoint0000.pth"])
    for _ in range(2):
        train_epoch(straight)

    resumed = make_state(seed=5)
    resumed.resume(load_checkpoint(str(tmp_path / "checkpoint.pth")), "checkpoint.pth")
    assert (resumed.epoch, resumed.best) == (1, 0.25)
    for _ in range(2):
        train_epoch(resumed)
    for name, value in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert rates(resumed) == rates(straight) == pytest.approx([0.01, 0.001]), "dropped once, after the second epoch"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pth", "checkpoint0000.pth"]


def test_checkpoints_hold_plain_types(tmp_path):
    args = argparse.Namespace(output_dir=str(tmp_path), lr=0.1, sizes=(1, 2), device=torch.device("cpu"), amp=None)
    make_state().save(args, 3, ["checkpoint.pth"])
    checkpoint = load_checkpoint(str(tmp_path / "checkpoint.pth"))
    assert checkpoint["args"] == {"output_dir": str(tmp_path), "lr": 0.1, "sizes": [1, 2], "device": "cpu", "amp": None}
    assert checkpoint["epoch"] == 3 and checkpoint["class_names"] == {1: "cat"}
    assert {"model", "optimizer", "lr_scheduler", "epoch", "args"} <= set(checkpoint)


def test_another_step_drop_counts_from_now_on(tmp_path):
    args = argparse.Namespace(output_dir=str(tmp_path))
    make_state(lr_drop=2).save(args, 0, ["checkpoint.pth"])
    state = make_state(lr_drop=1)
    state.resume(load_checkpoint(str(tmp_path / "checkpoint.pth")), "checkpoint.pth")
    train_epoch(state)
    assert rates(state) == pytest.approx([0.01, 0.001])


def test_rates_fall_after_named_epochs_whatever_a_checkpoint_did(tmp_path):
    args = argparse.Namespace(output_dir=str(tmp_path), lr_drop_epochs=[1, 3], lr_drop=None)
    state = make_state(lr_drop=2)
    first = rates(state)
    state.lr_scheduler = build_scheduler(state.optimizer, args)
    seen = []
    for epoch in range(4):
        train_epoch(state)
        seen.append(rates(state)[0] / first[0])
        assert (epoch + 1 in state.lr_scheduler.drop_epochs) == (epoch in (0, 2))
    assert seen == pytest.approx([0.1, 0.1, 0.01, 0.01])

    make_state(lr_drop=1).save(args, 0, ["checkpoint.pth"])
    for epochs, expected in (([3], 1), ([1], 0.1)):
        resumed = make_state()
        resumed.lr_scheduler = build_scheduler(resumed.optimizer, argparse.Namespace(lr_drop_epochs=epochs))
        resumed.resume(load_checkpoint(str(tmp_path / "checkpoint.pth")), "checkpoint.pth")
        before = rates(resumed)
        train_epoch(resumed)
        assert rates(resumed) == pytest.approx([rate * expected for rate in before]), epochs


def test_weights_alone_start_at_epoch_0(capsys):
    source, state = make_state(seed=1), make_state(seed=2)
    state.resume({"model": source.model.state_dict()}, "detr.pth")
    assert state.epoch == 0 and torch.equal(state.model[0].weight, source.model[0].weight)
    assert capsys.readouterr().out == "resume: detr.pth holds weights only; training starts at epoch 0\n"


def test_an_original_checkpoint_resumes_without_our_additions(tmp_path):
    """The originals store neither random states nor a best figure nor a scaler."""
    args = argparse.Namespace(output_dir=str(tmp_path))
    make_state().save(args, 7, ["checkpoint.pth"])
    checkpoint = load_checkpoint(str(tmp_path / "checkpoint.pth"))
    original = {name: checkpoint[name] for name in ("model", "optimizer", "lr_scheduler", "epoch", "args")}
    their_scheduler = torch.optim.lr_scheduler.StepLR(make_state().optimizer, step_size=3)
    their_scheduler.last_epoch = 7
    original["lr_scheduler"] = their_scheduler.state_dict()
    state = make_state(seed=3, lr_drop=4)
    state.resume(original, "checkpoint.pth")
    assert state.epoch == 8 and state.best is None
    train_epoch(state)
    assert rates(state) == pytest.approx([0.01, 0.001]), "8 is a multiple of --lr_drop 4, not of their 3"


@pytest.mark.parametrize("saved_fused", [None, True])
def test_the_optimizer_steps_as_this_run_has_it(saved_fused):
    """Not as the run that saved the checkpoint: the same numbers, faster."""
    saved, resumed = make_state(), make_state(seed=5)
    for state, fused in ((saved, saved_fused), (resumed, True)):
        groups = [{name: group[name] for name in ("params", "lr")} for group in state.optimizer.param_groups]
        state.optimizer = torch.optim.AdamW(groups, lr=0.1, fused=fused)
        state.lr_scheduler = DropAfterEpochs(state.optimizer, [5])
    train_epoch(saved)
    checkpoint = {"model": saved.model.state_dict(), "optimizer": copy.deepcopy(saved.optimizer.state_dict()),
                  "lr_scheduler": saved.lr_scheduler.state_dict(), "epoch": 0}
    resumed.resume(checkpoint, "checkpoint.pth")
    assert all(group["fused"] for group in resumed.optimizer.param_groups)
    for state in (saved, resumed):
        torch.manual_seed(3)
        train_epoch(state)
    for name, value in saved.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value)


@pytest.mark.parametrize("theirs, ours", [(torch.contiguous_format, torch.channels_last),
                                          (torch.channels_last, torch.contiguous_format)])
def test_moments_are_paired_with_their_weights_whatever_the_memory_layout(theirs, ours):
    """A fused step goes through weight and moments in the order of memory."""
    first, then = torch.randn(2, 4, 3, 3, 3)
    saved = one_weight(theirs)
    step(saved, first)
    resumed = one_weight(ours)
    with torch.no_grad():
        resumed.param_groups[0]["params"][0].copy_(saved.param_groups[0]["params"][0])
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    lay_out_like_parameters(resumed)
    torch.testing.assert_close(step(resumed, then), step(saved, then))


def one_weight(layout):
    weight = torch.nn.Parameter(torch.zeros(4, 3, 3, 3).contiguous(memory_format=layout))
    return torch.optim.AdamW([weight], lr=0.1, fused=True)


def step(optimizer, gradient):
    """Take one step with this gradient; returns the weight."""
    weight = optimizer.param_groups[0]["params"][0]
    weight.grad = torch.empty_like(weight).copy_(gradient)
    optimizer.step()
    return weight


def test_an_optimizer_of_other_parameters_is_refused(tmp_path):
    args = argparse.Namespace(output_dir=str(tmp_path))
    make_state(parts=1).save(args, 0, ["checkpoint.pth"])
    with pytest.raises(InputError, match=r"^--resume a.pth: its optimizer state doesn't fit the flags \(.*\); "
                                         r"does --lr_backbone or --frozen_weights freeze other layers now\?$"):
        make_state().resume(load_checkpoint(str(tmp_path / "checkpoint.pth")), "a.pth")


def test_which_checkpoint_resume_means(tmp_path, capsys):
    given = argparse.Namespace(resume="some.pth", output_dir="")
    assert find_resume(given) == "some.pth"
    auto = argparse.Namespace(resume="auto", output_dir=str(tmp_path))
    path = tmp_path / "checkpoint.pth"
    assert find_resume(auto) == "" and capsys.readouterr().out == f"resume: no checkpoint in {tmp_path} yet, starting fresh\n"
    save_checkpoint({"epoch": 1}, str(path))
    assert find_resume(auto) == str(path)
    with pytest.raises(InputError, match="^--resume auto needs --output_dir"):
        find_resume(argparse.Namespace(resume="auto", output_dir=""))


def test_log_lines_of_epochs_that_are_redone_go(tmp_path):
    folder = str(tmp_path)
    for epoch in range(4):
        append_log(folder, {"epoch": epoch, "train_loss": 0.5})
    with open(tmp_path / "log.txt", "a") as file:
        file.write('{"epoch": 4, "train_lo')  # cut off by a crash
    open_log(folder, first_epoch=2)
    append_log(folder, {"epoch": 2, "train_loss": 0.25})
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert lines == [{"epoch": 0, "train_loss": 0.5}, {"epoch": 1, "train_loss": 0.5}, {"epoch": 2, "train_loss": 0.25}]


def test_odd_bytes_in_the_log_are_lines_that_go(tmp_path):
    odd = [b"\xff\xfe\x00", b'{"epoch": "1"}', b'{"epoch": null}', b"[1]", b"7", b'{"epoch": NaN}', b"[" * 5000, b"", b"\x00" * 9]
    lines = [b'{"epoch": 0}', *odd, b'{"epoch": 1}']
    (tmp_path / "log.txt").write_bytes(b"\n".join(lines))  # the last has no line end
    open_log(str(tmp_path), first_epoch=5)
    append_log(str(tmp_path), {"epoch": 5})
    assert (tmp_path / "log.txt").read_bytes() == b'{"epoch": 0}\n{"epoch": 1}\n{"epoch": 5}\n'


def test_a_log_that_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "log.txt")
    with pytest.raises(InputError, match="log.txt is a named pipe, not a regular file"):
        open_log(str(tmp_path), first_epoch=0)


def test_a_new_log_needs_nothing(tmp_path):
    open_log(str(tmp_path / "new" / "folder"), first_epoch=0)
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_a_log_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (lambda folder: open_log(folder, 0), lambda folder: append_log(folder, {"epoch": 0})):
        with pytest.raises(InputError, match=r"^could not write .*/file/log.txt \((File exists|Not a directory)\)$"):
            write(str(tmp_path / "file"))


def resumed(first, later, epoch=4):
    """The state of flags `later` after resuming a checkpoint of flags `first`, and what was trained with."""
    import main
    from models import build_model
    from util.schedule import build_scheduler

    def state(flags):
        args = main.get_args_parser().parse_args([
            *"--device cpu --backbone resnet18 --load_backbone none --enc_layers 1 --dec_layers 1 --hidden_dim 32 --num_classes 3 "
            "--dim_feedforward 32 --num_queries 5 --epochs 9 --lr_drop 3".split(), *map(str, flags)])
        model = build_model(args)[0]
        optimizer = main.build_optimizer(model, args)
        return TrainingState(model, optimizer, build_scheduler(optimizer, args),
                             torch.amp.GradScaler("cpu", enabled=False), epoch=args.start_epoch)
    before = state(first)
    for _ in range(epoch):
        before.lr_scheduler.step()
    checkpoint = {"model": before.model.state_dict(), "optimizer": before.optimizer.state_dict(),
                  "lr_scheduler": before.lr_scheduler.state_dict(), "epoch": epoch - 1}
    after = state(later)
    after.resume(checkpoint, "a.pth")
    return after


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_given_rates_count_more_than_the_checkpoints(capsys):
    after = resumed((), ("--lr", 1e-6, "--weight_decay", 0.5))
    assert [group["lr"] for group in after.optimizer.param_groups] == pytest.approx([1e-7, 1e-6])  # one drop is past
    assert [group["weight_decay"] for group in after.optimizer.param_groups] == [0.5, 0.5]
    assert "resume: --weight_decay 0.5 counts more than the checkpoint's 0.0001; --lr 1e-06 counts more than the " \
        "checkpoint's 0.0001\n" in capsys.readouterr().out
    after = resumed(("--lr", 1e-6), ("--lr", 1e-6))
    assert "counts more" not in capsys.readouterr().out
    assert resumed(("--lr", 1e-6), ()).optimizer.param_groups[0]["lr"] == pytest.approx(1e-7)  # none is given


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_a_given_first_epoch_counts_more_than_the_checkpoints():
    after = resumed((), ("--start_epoch", 2))
    assert after.epoch == 2 and after.optimizer.param_groups[0]["lr"] == 1e-4
    assert resumed((), ()).epoch == 4


def test_another_optimizer_is_refused():
    for first, later, words in (((), ("--sgd",), "AdamW, .* without --sgd"), (("--sgd",), (), "SGD, .* with --sgd")):
        with pytest.raises(InputError, match=f"^--resume a.pth was trained by {words}"):
            resumed(first, later, epoch=0)


@pytest.mark.parametrize("published", [True, False])
def test_moments_of_class_heads_follow_labels_that_counted_from_zero(published):
    """DETReg's program counts VOC's labels from 0 to 19; of a checkpoint of ours nothing is shifted."""
    def make():
        model = nn.Module()
        model.class_embed = nn.ModuleList([nn.Linear(2, 21)])
        model.transformer = nn.Module()
        model.transformer.level_embed = nn.Parameter(torch.zeros(4, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return TrainingState(model, optimizer, DropAfterEpochs(optimizer, [1]),
                             torch.amp.GradScaler("cpu", enabled=False), {})

    stored = make()
    for number, parameter in enumerate(stored.model.parameters()):
        parameter.grad = (torch.arange(len(parameter), dtype=torch.float32) + number)[(...,) + (None,) * (parameter.dim() - 1)] \
            .expand_as(parameter).clone()
    stored.optimizer.step()
    checkpoint = {"model": copy.deepcopy(stored.model.state_dict()), "optimizer": stored.optimizer.state_dict(), "epoch": 3,
                  "lr_scheduler": stored.lr_scheduler.state_dict(), "args": {"dataset": "voc"}}
    resumed = make()
    resumed.resume(copy.deepcopy(checkpoint if published else {**checkpoint, "class_names": {}}), "a.pth")
    rows = [20, *range(20)] if published else list(range(21))  # the unused output becomes label 0
    for name, parameter in resumed.model.named_parameters():
        was = dict(stored.model.named_parameters())[name]
        order = rows if name.startswith("class_embed") else list(range(len(was)))
        assert torch.equal(parameter, was[order])
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(resumed.optimizer.state[parameter][moment], stored.optimizer.state[was][moment][order])
