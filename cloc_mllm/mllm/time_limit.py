"""Ends Python code that takes too long, such as a template that never ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_HURRY_SECONDS, _PAUSE_SECONDS = 0.2, 0.001


class TimeLimitExceeded(ValueError):
    """Code took longer than it may."""


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raises `TimeLimitExceeded` in the block once it has run for so long.

    It looks at the clock at each line of Python that the block calls (templates of Jinja become
    Python), in this thread alone, so a single call of C code is not interrupted. What takes longer
    than usual pauses at each line: other threads of a server wait for the interpreter.

    Args:
        what: what takes too long, for the error.
    """
    started = time.monotonic()

    def check(frame: Any, event: str, argument: Any) -> Any:
        passed = time.monotonic() - started
        if passed > seconds:
            raise TimeLimitExceeded(f"stopped after {seconds:g} s: {what}")
        if passed > _HURRY_SECONDS:
            time.sleep(_PAUSE_SECONDS)
        return check

    before = sys.gettrace()
    sys.settrace(check)
    try:
        yield
    finally:
        sys.settrace(before)
