"""Ends Python code that takes too long, such as a template that never ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_HURRY_SECONDS = 0.2
_WORK_SECONDS = _PAUSE_SECONDS = 0.001


class TimeLimitExceeded(ValueError):
    """Code took longer than it may."""


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raises `TimeLimitExceeded` in the block once this thread has computed for so long.

    It looks at the clock at each line of Python that the block calls (templates of Jinja become
    Python), in this thread alone, so a single call of C code is not interrupted. The time that
    other processes take from this one does not count. What takes longer than usual pauses for as
    long as it works: other threads of a server wait for the interpreter.

    Args:
        what: what takes too long, for the error.
    """
    started = rested = time.thread_time()

    def check(frame: Any, event: str, argument: Any) -> Any:
        nonlocal rested
        now = time.thread_time()
        if now - started > seconds:
            raise TimeLimitExceeded(f"stopped after {seconds:g} s: {what}")
        if now - started > _HURRY_SECONDS and now - rested > _WORK_SECONDS:
            time.sleep(_PAUSE_SECONDS)
            rested = time.thread_time()
        return check

    before = sys.gettrace()
    sys.settrace(check)
    try:
        yield
    finally:
        sys.settrace(before)
