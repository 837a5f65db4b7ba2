from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from cloc_mllm.mllm import processing
from cloc_mllm.mllm.processing import ClocMllmProcessor
from cloc_mllm.mllm.time_limit import TimeLimitExceeded, time_limit

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_never_ends_is_stopped(
    mllm_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = ClocMllmProcessor.from_pretrained(mllm_dir)
    processor.chat_template = ENDLESS
    monkeypatch.setattr(processing, "_RENDER_SECONDS", 0.2)
    started = time.monotonic()
    with pytest.raises(TimeLimitExceeded, match=r"stopped after 0\.2 s: the chat template"):
        processor.render([{"role": "user", "content": "Hello."}])
    assert time.monotonic() - started < 30


def test_a_wait_for_other_processes_does_not_count() -> None:
    with time_limit(0.05, "nothing"):
        waited_by_a_line_of_python(0.1)
        assert sum(range(10)) == 45


def waited_by_a_line_of_python(seconds: float) -> None:
    time.sleep(seconds)
    assert seconds  # a line behind the wait, at which the clock is looked at


def test_what_takes_long_pauses_as_long_as_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling a template on a busy machine is thousands of lines, each of which would pause."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    started = time.thread_time()
    with time_limit(60, "nothing"):
        num_lines = counted_lines(started + 0.5)
    assert 10 < len(pauses) < min(num_lines, 600)


def counted_lines(until: float) -> int:
    num_lines = 0
    while time.thread_time() < until:
        num_lines += 1
    return num_lines


def test_it_leaves_no_trace() -> None:
    before = sys.gettrace()
    with time_limit(60, "nothing"):
        assert sum(range(10)) == 45
    assert sys.gettrace() is before
    with pytest.raises(KeyError), time_limit(60, "nothing"):
        raise KeyError
    assert sys.gettrace() is before
