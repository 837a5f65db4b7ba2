"""Every option of every command and script, in one style."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cloc_mllm.cli import SUBCOMMANDS, main
from cloc_mllm.data.commands import build_parser
from cloc_mllm.evaluation.tasks import task_names
from tests.test_scripts import SCRIPTS, run_script

DATA = ["build scenes", "build coco", "stats", "inspect", "export coco", "validate", "split"]
DATA += ["merge", "filter", "leak-check", "doctor", "fetch-report"]
COMMANDS = [
    *(name for name in SUBCOMMANDS if name != "data"),
    *(f"data {name}" for name in DATA),
    *(f"eval {name}" for name in ("score", "compare", *task_names())),
    "export --mllm RUN",
]
# those that write one file; all others write a folder, or nothing
ONE_FILE = {"ground", "refer", "ask", "data inspect", "data doctor", "eval score"}

_OPTION = re.compile(r"^ +(?:-\w, )?(--[^ ,=\[]+)", re.MULTILINE)


def options_of(help_text: str) -> list[str]:
    return sorted(set(_OPTION.findall(help_text)) - {"--help"})


def check_style(options: list[str], *, one_file: bool) -> None:
    odd = [name for name in options if not re.fullmatch(r"--[a-z0-9_]+(\.[a-z0-9_]+)*", name)]
    assert odd == []
    # one of the two, so that --out is short for either
    outputs = [name for name in options if name.startswith(("--out", "--dest", "--save"))]
    assert outputs in ([], ["--output"] if one_file else ["--output_dir"])
    assert not {"--force", "--replace", "--clobber", "--yes"} & set(options)


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_commands(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    check_style(options_of(capsys.readouterr().out), one_file=command in ONE_FILE)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_options_of_scripts(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(script, ["--help"], monkeypatch) == 0
    options = options_of(capsys.readouterr().out)
    check_style(options, one_file=script.parent.name == "bench" and "--output" in options)


def test_all_data_commands_are_listed() -> None:
    (action,) = [a for a in build_parser()._actions if isinstance(a.choices, dict)]
    assert action.choices.keys() == {name.split()[0] for name in DATA}


@pytest.mark.parametrize("option", ["--out", "--output_dir", "--output-dir"])
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("export --to hf-clip --cloc nowhere", "nowhere is no CLOC model directory"),
        ("export --mllm nowhere", "nowhere is neither a stage-2 output directory"),
        ("eval text_to_box --cloc nowhere", "nowhere is no CLOC model directory"),
        ("eval compare nowhere nowhere", "nowhere/predictions.jsonl is missing"),
        ("data merge nowhere", "nowhere"),
        ("label --images nowhere", "no such folder or archive: nowhere"),
    ],
)
def test_a_folder_however_its_option_is_typed(
    command: str, message: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The option is understood: what is wrong is something else."""
    assert main([*command.split(), option, str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--out", "--output"])
@pytest.mark.parametrize(
    "command",
    ["data doctor nowhere", "data inspect nowhere", "ground nowhere x", "refer nowhere 1 2 3 4",
     "ask nowhere x",
     "eval score --task rec --predictions nowhere --references nowhere"],
)  # fmt: skip
def test_a_file_however_its_option_is_typed(
    command: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), option, "written.png"]) == 2
    assert "nowhere" in capsys.readouterr().err
