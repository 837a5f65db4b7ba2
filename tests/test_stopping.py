from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from cloc_mllm import stopping
from cloc_mllm.stopping import StopRequest


class Exited(BaseException):
    """Stands for os._exit."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in its only element; leaving the process raises `Exited` with the status."""

    def leave(status: int) -> None:
        raise Exited(status)

    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "_exit", leave)
    return now


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_only_asks(clock: list[float], number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        assert stop.signal_number == number


def test_the_launchers_echo_is_ignored_and_a_later_signal_exits_at_once(clock: list[float]) -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        clock[0] += 0.1
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal_number == signal.SIGINT
        clock[0] += 5
        with pytest.raises(Exited) as exit_info:
            signal.raise_signal(signal.SIGTERM)
    assert exit_info.value.args == (128 + signal.SIGTERM,)


def test_nohup_is_respected(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


_RANK = """
import sys, time
from cloc_mllm.stopping import StopRequest, stop_with_launcher
with StopRequest() as stop:
    stop_with_launcher()
    print("ready", flush=True)
    deadline = time.monotonic() + 60
    while not stop.requested and time.monotonic() < deadline:
        time.sleep(0.05)
    print("stopped by", stop.signal_number, flush=True)
"""
# the launcher of deepspeed is two processes, which tell by their names
_INNER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[2]])"
# a shell starts its background jobs with SIGINT ignored, and they pass that on
_OUTER = (
    "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "subprocess.run([sys.executable, '-c', *sys.argv[2:]])"
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_rank_stops_when_its_launcher_is_gone(number: signal.Signals) -> None:
    outer = [sys.executable, "-c", _OUTER, "deepspeed", _INNER, "deepspeed.launcher.launch", _RANK]
    with subprocess.Popen(outer, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == b"ready\n"
        launcher.send_signal(number)
        assert launcher.stdout.readline() == b"stopped by 15\n"
