"""Treats Ctrl-C and SIGTERM as a request to stop, for loops that finish their step first."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

# A launcher forwards a signal that its whole process group has already received, so one Ctrl-C
# arrives twice. Only a later one is a second request.
_SAME_REQUEST_SECONDS = 2.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A context in which the first signal sets `signal_number`; a later one exits at once.

    It works in the main thread only, as all of Python's signal handlers.
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
    """Makes a loader's worker ignore the signals; the main process ends it after saving."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
