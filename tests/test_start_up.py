"""What the commands that people type most may import, where each library takes up to a second, and
how they end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cloc_mllm.cli import ONE_SHOT, SUBCOMMANDS
from cloc_mllm.shipped import ASSETS

_PROGRAM = """
import sys
from cloc_mllm.cli import main
try:
    status = main(sys.argv[2:])
except SystemExit as end:  # after --help
    status = end.code
print("LOADED", *(name for name in sys.argv[1].split(",") if name in sys.modules))
sys.exit(status)
"""
_NEVER = "datasets,deepspeed,gradio,matplotlib,pandas,peft,pyarrow,ray,sklearn,spacy,tensorboard"
_PHOTO = str(min((ASSETS / "photos" / "examples").glob("*.jpg")))


@pytest.mark.parametrize(
    ("forbidden", "command"),
    [
        ("torch,transformers,numpy,PIL", ["--help"]),
        ("torch,transformers", ["ground", "--help"]),
        (_NEVER, ["ground", _PHOTO, "the bus", "--output", "found.png"]),
    ],
    ids=["help", "help of ground", "ground"],
)
def test_a_command_imports_only_what_it_uses(
    forbidden: str, command: list[str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, forbidden, *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["LOADED"]


_ENTRY = """
import atexit, sys, tempfile
from cloc_mllm import cli

def command(argv):
    global folder
    folder = tempfile.TemporaryDirectory(dir=".")
    atexit.register(print, "end")
    print("answered")
    if argv[-1] == "raise":
        raise RuntimeError("ours")
    return int(argv[-1])

cli._dispatch = command
sys.exit(cli.entry())
"""


@pytest.mark.parametrize("command", ["ground", "serve"], ids=["one shot", "another"])
@pytest.mark.parametrize(("last", "status"), [("0", 0), ("3", 3), ("raise", 1)])
def test_an_end_at_once_leaves_nothing_behind(
    command: str, last: str, status: int, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ENTRY, command, last], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == status
    assert done.stdout.split() == ["answered", "end"]
    assert ("RuntimeError: ours" in done.stderr) == (last == "raise")
    assert list(tmp_path.iterdir()) == []


def test_the_one_shot_commands_exist() -> None:
    assert set(ONE_SHOT) <= SUBCOMMANDS.keys()
