"""The start of the quickstart; the whole road is `cloc-mllm quickstart --budget 0.02`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cloc_mllm import quickstart
from cloc_mllm.cli import main
from cloc_mllm.extras import install_command
from cloc_mllm.quickstart import Command, Display, Phase


@pytest.mark.parametrize(("package", "extra"), [("matplotlib", "eval"), ("deepspeed", "train")])
def test_a_missing_package_is_named_before_anything_is_done(
    package: str,
    extra: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails from now on
    assert main(["quickstart", "--budget", "0.001", "--output_dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err == (
        f"cloc-mllm: error: {package} is not installed; run: {install_command(extra)}\n"
    )
    assert said.out == "" and not (tmp_path / "out").exists()


def test_another_budget_in_the_same_directory_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "budget.json").write_text("0.5")
    assert main(["quickstart", "--budget", "0.001", "--output_dir", str(tmp_path)]) == 2
    assert f"{tmp_path} was begun with --budget 0.5, not 0.001" in capsys.readouterr().err


MLLM = Command("MLLM", (), (Phase(400.0, 100, "cells"), Phase(200.0, 50)))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("starting", (0.0, "...")),
        ("step     25 train: loss 2.1  cells 1.0  regions 1.1", (100.0, "25/100")),
        ("step     25 train: loss 2.1  lr 0.1", (500.0, "25/50")),
        ("step     60 eval: rec 0.1", (600.0, "50/50")),
        ("wrote step 3", (0.0, "...")),
    ],
)
def test_progress_is_read_off_the_log(line: str, expected: tuple[float, str]) -> None:
    assert MLLM.progress(line) == expected


def test_one_line_shows_what_runs_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1000.0]
    monkeypatch.setattr(quickstart.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(quickstart, "_EVALUATION_SECONDS", 90.0)
    cloc = Command("CLOC", (), (Phase(310.0, 100),))
    display = Display([MLLM, cloc])  # 1,000 seconds of work with the evaluation's 90
    display.note(cloc, "step     50 train: loss 1")  # done by an earlier start
    assert capsys.readouterr().out == ""  # nothing is known before some time has passed
    now[0] += 240
    display.note(MLLM, "step     50 train: loss 2  cells 1")
    assert capsys.readouterr().out.strip() == "CLOC 50/100, MLLM 50/100 | 4 min passed"
    now[0] += 60
    display.end(cloc)
    display.note(MLLM, "step     50 train: loss 2  cells 1")
    # 155 of 1,000 seconds were learnt in 5 minutes, 490 are left
    shown = "MLLM 50/100 | 5 min passed, about 16 min left"
    assert capsys.readouterr().out.strip() == shown
