"""A disk that refuses is one line, and nothing half-written looks whole."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cloc_mllm.cli import run
from cloc_mllm.data.storage import new_directory, whole_directory, write_whole
from cloc_mllm.disk import disk_problem


def chained() -> Exception:
    try:
        try:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        except OSError as error:
            raise RuntimeError("could not write") from error
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/a/b"),
            "No space left on device (/a/b): make room on it",
        ),
        (RuntimeError("I/O error: Read-only file system (os error 30)"), "Read-only file system: "),
        (chained(), "Disk quota exceeded: make room within your quota"),
        (OSError(errno.ENOENT, "No such file or directory"), ""),
        (KeyError("No space"), ""),
    ],
    ids=["os", "rust", "cause", "absent", "other"],
)
def test_what_a_disk_refuses_is_told_with_what_to_do(error: Exception, expected: str) -> None:
    actual = disk_problem(error)
    assert actual.startswith(expected) and bool(actual) == bool(expected)


def test_a_command_tells_it_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def command(arguments: list[str]) -> int:
        raise RuntimeError("PytorchStreamWriter failed: No space left on device")

    assert run(command, []) == 2
    expected = "No space left on device: make room on it, then the same command goes on"
    assert capsys.readouterr().err == f"cloc-mllm: error: {expected}\n"


def test_a_failed_directory_leaves_nothing_and_the_old_one_stays(tmp_path: Path) -> None:
    final = tmp_path / "model"
    for content in ("old", "new"):
        with whole_directory(final) as partial:
            (partial / "weights").write_text(content)
        assert (final / "weights").read_text() == content
    for make in (whole_directory, new_directory):
        target = final if make is whole_directory else tmp_path / "other"
        with pytest.raises(OSError, match="full"), make(target) as partial:
            (partial / "weights").write_text("half")
            raise OSError("the disk is full")
    assert (final / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from cloc_mllm.data.storage import new_directory
with new_directory(Path(sys.argv[1])) as partial:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_command_left_is_removed_by_the_next(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", _KILLED, tmp_path / "set"])
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    with new_directory(tmp_path / "set"):
        with new_directory(tmp_path / "set") as second:  # a second one at the same time
            (second / "a").write_text("")
        assert len(list(tmp_path.iterdir())) == 2  # the first's folder is not taken for a left one
        (tmp_path / "set" / "a").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_file_is_written_whole_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "metrics.json", "{}")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "metrics.json", "[]")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
    assert (tmp_path / "metrics.json").read_text() == "{}"
