from __future__ import annotations

import os
import signal

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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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
