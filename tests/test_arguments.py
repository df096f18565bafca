"""What commands say of words that they do not take, and where options may stand."""

from __future__ import annotations

from importlib import import_module

import pytest

from lcbench.__main__ import commands
from lcbench.commands.arguments import add_plan_arguments, add_sweep_arguments, command_parser
from lcbench.report.ending import BAD_INPUT

PARSED = sorted(set(commands()) - {"sweep"})  # a sweep's words are read by grid/command_line.py


def refused(command: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as ended:
        import_module(f"lcbench.commands.{command}").main(words)
    assert ended.value.code == BAD_INPUT
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("command", PARSED)
def test_an_option_that_a_command_does_not_have_is_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    # What a command cannot do without is asked for first.
    said = refused(command, ["--nothing-so"], capsys)
    assert "'--nothing-so' is no argument of this command" in said or "are required" in said
    assert f"python -m lcbench.{command} --help" in said


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["mine", "results=/else"], "'results=/else' is no argument of this command (did you mean --results /else?)"),
        (["mine", "--result=/else", "--resluts"], "'--resluts' is no argument of this command (did you mean --results?)"),
        (["mine", "--gate"], "'--gate' is no argument of this command;"),
        (["mine", "yours"], "'yours' is no argument of this command;"),
        (["--results"], "argument --results: expected one argument;"),
        ([], "the following arguments are required: sweep;"),
        (["mine", "x\x1b[2J"], "is no argument of this command;"),
    ],
)
def test_what_was_meant_is_guessed_only_where_it_is_near(words: list[str], meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert meant in (said := refused("collect", words, capsys))
    assert "\x1b" not in said


def test_options_may_stand_between_overrides() -> None:
    parser = command_parser("masks", "", "")
    add_plan_arguments(parser, "")
    parser.add_argument("--json", action="store_true")
    read = parser.parse_args(["--config-dir", "a", "mask=causal", "--json", "seqlen=4k", "--config-dir", "b", "heads=1x1x8"])
    assert read.overrides == ["mask=causal", "seqlen=4k", "heads=1x1x8"]
    assert read.json
    assert [str(folder) for folder in read.config_dir] == ["a", "b"]
    parser = command_parser("status", "", "")
    add_sweep_arguments(parser, optional=True)
    assert parser.parse_args([]).sweep is None
    assert parser.parse_args(["--results", "r", "mine"]).sweep == "mine"
