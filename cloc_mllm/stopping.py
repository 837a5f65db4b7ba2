"""Ctrl-C and SIGTERM ask the loop to stop at the end of the step."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

# A launcher forwards the signal that its whole process group has got already, so one Ctrl-C
# arrives twice; only a later one is a second request.
_SAME_REQUEST_SECONDS = 2.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, the first signal sets `signal_number`, a later one exits at once.

    Usable in the main thread only, as Python's signal handlers are.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._first_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signal_number != 0

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.signal_number:
            self.signal_number, self._first_at = number, time.monotonic()
        elif time.monotonic() - self._first_at > _SAME_REQUEST_SECONDS:
            os._exit(128 + number)


def ignore_stop_signals(worker_id: int = 0) -> None:
    """For loader workers: the main process ends them when it has saved."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
