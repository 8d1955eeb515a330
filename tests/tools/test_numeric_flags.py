"""Odd numbers are one sentence that names the flag, in every program."""
import importlib
import re
from unittest import mock

import pytest

from datasets import toy_scene
from util.errors import InputError
from util.ranges import TOOL_RANGES

PROGRAMS = {name: "main" for name in (
    "tools.benchmark.__main__", "tools.cache_proposals", "tools.check_data", "tools.convert_airbus", "tools.demo",
    "tools.export", "tools.find_patch", "tools.fuzz", "tools.plot_logs", "tools.predict", "tools.pretrain_toy_backbone",
    "tools.proposal_recall", "tools.reproduce.__main__", "tools.show_attention", "tools.show_regions",
    "tools.torture.__main__", "datasets.toy")}
PROGRAMS.update({"tools.replay": "replay", "run_with_submitit": "split_args"})
VALUES = ("-1", "0", "1e30", str(10 ** 30), "nan", "inf", "abc")


def _is_in_range(action, text, ranges):
    try:
        return not ranges[action.dest].fault(action.type(text))
    except (KeyError, ValueError):
        return False


@pytest.mark.parametrize("program", PROGRAMS)
def test_odd_numbers_are_refused(program, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", mock.Mock())
    module = importlib.import_module(program)
    ranges = {**TOOL_RANGES, **(toy_scene.RANGES if program == "datasets.toy" else {})}
    needed = []
    for action in module.get_args_parser()._actions:
        if action.required:
            needed += [*action.option_strings[:1], next(iter(action.choices or ["nothing-there"]))]
    numeric = [action for action in module.get_args_parser()._actions if action.type in (int, float)]
    assert numeric
    for action in numeric:
        for text in VALUES:
            if _is_in_range(action, text, ranges):
                continue
            option = action.option_strings[0]
            rest = [text] * (action.nargs - 1) if isinstance(action.nargs, int) else []
            try:
                args = module.get_args_parser().parse_args([*needed, f"{option}={text}", *rest] if not rest else
                                                           [*needed, option, text, *rest])
            except SystemExit:
                assert f"argument {option}" in capsys.readouterr().err
                continue
            with pytest.raises(InputError, match=f"^{re.escape(option)}\\b.* (must|is|exceed)\\b"):
                getattr(module, PROGRAMS[program])(args)
