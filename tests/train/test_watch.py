"""The limits of the watch; lost and stopped ranks are tried in `tests/bench/test_faults.py`."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from cloc_mllm.train import watch as watch_module
from cloc_mllm.train.watch import COMPUTING, EVALUATING, WAITING, Note, RankWatch, _is_gone, _Others


def watch_with(step_timeout: float = 0.0) -> RankWatch:
    return RankWatch(step_timeout, Path("nowhere"), lambda: None)


def test_a_step_includes_the_wait_for_its_data() -> None:
    watch = watch_with(step_timeout=5)
    watch.now(WAITING, 3)
    watch._clock += 3
    watch.now(COMPUTING, 3)
    watch._clock += 2
    assert watch._overdue(None) == ""
    watch._clock += 0.1
    expected = "step 3: the step takes more than 5 s (rank 0 is computing); if it may take so long"
    assert watch._overdue(None).startswith(expected)


def test_evaluating_has_a_limit_of_its_own() -> None:
    watch = watch_with(step_timeout=5)
    watch.now(EVALUATING, 3)
    watch._clock += 1799
    assert watch._overdue(None) == ""
    watch._clock += 2
    assert watch._overdue(None).startswith("step 3: evaluating takes more than 1800 s")


def test_the_limit_is_ten_times_the_median_step_and_at_least_a_minute() -> None:
    watch = watch_with()
    watch.now(WAITING, 1)
    watch._clock += 1e6
    assert watch._overdue(None) == ""  # the first steps start workers and compile
    for median, limit in ((1.0, 60), (30.0, 300)):
        watch._durations.extend([median] * 200)
        watch.now(WAITING, 11)
        watch._clock += limit
        assert watch._overdue(None) == ""
        watch._clock += 1
        assert watch._overdue(None).startswith(f"step 11: the step takes more than {limit} s")


def test_a_process_that_nobody_waits_for_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.read()  # its end, after which it is a zombie
    while not _is_gone(child.pid):
        assert child.returncode is None
    child.wait()
    assert not _is_gone(os.getpid())


@pytest.mark.parametrize(("step_timeout", "ends"), [(0.0, False), (0.5, True)])
def test_a_lone_rank_is_only_warned_of_a_long_step_unless_told_a_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, step_timeout: float, ends: bool
) -> None:
    watch = watch_with(step_timeout)
    watch._durations.extend([0.0] * 200)
    ended = threading.Event()
    monkeypatch.setattr(watch_module, "_LEAST_SECONDS", 0.5)
    monkeypatch.setattr(watch_module, "_EVERY_SECONDS", 0.05)
    monkeypatch.setattr(watch_module.os, "_exit", lambda code: ended.set())
    with watch:
        watch.now(WAITING, 11)
        assert ended.wait(3.0) == ends
    said = capsys.readouterr().err
    assert ("warning: step 11: the step takes more than" in said) == (not ends)
    assert said.count("warning:") == (not ends)


@pytest.mark.parametrize(
    ("noted", "expected"),
    [
        (12, "rank 1 on host there was lost in step 12, while computing: gone"),
        (3, "rank 1 on host there was lost in step 12: gone"),
    ],
    ids=["new note", "old note"],
)
def test_a_rank_is_lost_in_the_step_of_the_others_whatever_its_last_note(
    noted: int, expected: str
) -> None:
    others = object.__new__(_Others)
    others._notes = {1: Note("there", "machine", 1, beat=1, step=noted, doing=COMPUTING)}
    assert others._missing(1, 12, "gone") == expected
