"""Treats Ctrl-C, SIGTERM and SIGHUP as a request to stop, for loops that finish their step first.

SIGHUP comes when a terminal is closed or ssh is lost. SIGQUIT (Ctrl-\\) keeps its meaning: it ends
the process at once, which is the way out of one that hangs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

# A launcher forwards a signal that its whole process group has already received, so one Ctrl-C
# arrives twice. Only a later one is a second request.
_SAME_REQUEST_SECONDS = 2.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_WATCH_EVERY_SECONDS = 1.0
_LOOK_EVERY_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_told = threading.Event()  # set once this process was asked to stop


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
        heard = [n for n in _SIGNALS if n != signal.SIGHUP or not _survives_hangup()]
        self._previous = {number: signal.signal(number, self._receive) for number in heard}
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
            _told.set()
        elif time.monotonic() - self._first_at > _SAME_REQUEST_SECONDS:
            os._exit(128 + number)


def wait_for(
    process: subprocess.Popen[bytes], stop: StopRequest, show: Callable[[], None] = lambda: None
) -> None:
    """Waits for a process that was started here, hands a request to stop on to it, and calls `show`
    once a second."""
    told, looked = False, 0.0
    while process.poll() is None:
        time.sleep(_LOOK_EVERY_SECONDS)
        if stop.requested and not told:
            process.terminate()
            told = True
        if time.monotonic() - looked > 1.0:
            looked = time.monotonic()
            show()


def take_hangup_for_sigterm() -> None:
    """Makes a SIGHUP a SIGTERM, for libraries that handle that alone."""
    if not _survives_hangup():
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))


def _survives_hangup() -> bool:
    """Whether `nohup` started this process."""
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def become_loader_worker(worker_id: int = 0) -> None:
    """Makes a loader's worker ignore the signals; the main process ends it after saving. Where that
    is killed, the kernel kills the worker, too (on Linux; elsewhere torch notices in 5 s)."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def stop_with_launcher() -> None:
    """Asks this process to stop, by SIGTERM, when the launcher that started it is gone.

    torchrun hands signals on before it ends. Of the `deepspeed` launcher, which is two processes,
    the outer hands nothing on, so its ranks would train on for nobody.
    """
    launchers = _launchers()

    def watch() -> None:
        while _launchers() == launchers:
            time.sleep(_WATCH_EVERY_SECONDS)
        if not _told.is_set():  # after a Ctrl-C it would be a second request
            print("the launcher is gone, so this rank stops", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher watch", daemon=True).start()


def _launchers() -> tuple[int, ...]:
    """The id of the process that started this one and, where both are deepspeed's, of its own."""
    parent = os.getppid()
    try:
        if b"deepspeed.launcher.launch" not in _command_line(parent):
            return (parent,)
        status = Path(f"/proc/{parent}/stat").read_text(encoding="utf-8", errors="replace")
        grandparent = int(status.rpartition(")")[2].split()[1])
        # a shell may have started the inner launcher by itself, and may go
        return (parent, grandparent) if b"deepspeed" in _command_line(grandparent) else (parent,)
    except OSError:  # no Linux, or it has just ended
        return (parent,)


def _command_line(process: int) -> bytes:
    return Path(f"/proc/{process}/cmdline").read_bytes()
