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


def test_it_leaves_no_trace() -> None:
    before = sys.gettrace()
    with time_limit(60, "nothing"):
        assert sum(range(10)) == 45
    assert sys.gettrace() is before
    with pytest.raises(KeyError), time_limit(60, "nothing"):
        raise KeyError
    assert sys.gettrace() is before
