"""What a server does while clients abuse it: its memory, how long a health check waits, what each
client is told, and what a normal client sees meanwhile. `serve_abuse` and `demo_abuse` say how."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

PATIENCE_S = 600
HEALTH_BAR_S = 0.5
_PEAK_BAR_MB, _KEPT_BAR_MB = 300, 100
# in a process of its own, which does not wait for the attackers' threads, and from an address of
# its own, which does not lose its connections for theirs
_PROBE = f"""
import http.client, select, sys, time
worst, is_over = 0.0, False
while not is_over:
    started = time.perf_counter()
    own = ("127.0.0.3", 0)
    line = http.client.HTTPConnection(sys.argv[1], timeout={PATIENCE_S}, source_address=own)
    line.request("GET", sys.argv[2])
    line.getresponse().read()
    line.close()
    worst = max(worst, time.perf_counter() - started)
    print(worst, flush=True)
    is_over = bool(select.select([sys.stdin], [], [], 0.02)[0])
"""


class Process:
    """A running server.

    Args:
        command: of `cloc-mllm`; it prints its address.
        health: path that tells whether it lives.
    """

    def __init__(self, package: Path, command: Sequence[str], health: str) -> None:
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115  the process writes it, to its end
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cloc_mllm.cli", *command],
            cwd=package,
            env={**os.environ, "PYTHONPATH": str(package), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert self.process.stdout is not None
        lines = map(re.compile(r"http://[\w.:]+").search, self.process.stdout)
        found = next((line for line in lines if line), None)
        if found is None:
            log.seek(0)
            raise AssertionError(f"no server: {log.readlines()[-1:]}")
        self.address = found.group()
        self.health = f"{self.address}{health}"

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()

    def health_seconds(self) -> float:
        started = time.perf_counter()
        urlopen(self.health, timeout=PATIENCE_S).read()
        return time.perf_counter() - started

    def megabytes(self, name: str) -> int:
        """`VmRSS` is the memory now, `VmHWM` its peak."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split(f"{name}:")[1].split()[0]) // 1024

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def num_files(self) -> int:
        """Counts what it holds open, connections included."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


@dataclass(frozen=True)
class Attack:
    """What attackers do at once; each returns what it was told.

    Args:
        expected: regular expression of what they should be told.
    """

    attackers: Sequence[Callable[[], str]]
    expected: str


@dataclass(frozen=True)
class Borne:
    """What came of an attack.

    Attributes:
        told: what the attackers were told.
        as_expected: whether they should be.
        peak_mb: memory at most, above that before; `kept_mb` is that after it.
        normal: what a normal client was told; it asked again and again.
    """

    told: list[str]
    as_expected: bool
    seconds: float
    worst_health_s: float
    peak_mb: int
    kept_mb: int
    normal: list[str]
    normal_worst_s: float

    def is_good(self, health_bar_s: float = HEALTH_BAR_S) -> bool:
        """Whether a server should bear it like this; the default is for a quiet machine."""
        return (
            self.as_expected
            and self.worst_health_s <= health_bar_s
            and self.peak_mb <= _PEAK_BAR_MB
            and self.kept_mb <= _KEPT_BAR_MB
            and self.normal in (["200"], ["answered"])
        )


def under_attack(server: Process, attack: Attack, normal: Callable[[], str]) -> Borne:
    """Lets attackers do what they do at once, and asks for the health meanwhile, as a normal client
    does its own thing."""
    before = server.megabytes("VmRSS")
    server.forget_peak()
    over = threading.Event()
    with _probed(server) as waits, ThreadPoolExecutor(len(attack.attackers) + 1) as pool:
        started = time.perf_counter()
        attacks = [pool.submit(attacker) for attacker in attack.attackers]
        visits = pool.submit(_visits, normal, over)
        wait(attacks)
        seconds = time.perf_counter() - started
        over.set()
        answers = visits.result()
    time.sleep(0.5)  # until freed memory is given back
    told = sorted({attack.result() for attack in attacks})
    return Borne(
        told=told,
        as_expected=all(re.match(attack.expected, one) for one in told),
        seconds=round(seconds, 2),
        worst_health_s=round(max(waits), 3),
        peak_mb=server.megabytes("VmHWM") - before,
        kept_mb=server.megabytes("VmRSS") - before,
        normal=sorted({answer for answer, _ in answers}),
        normal_worst_s=round(max(wait for _, wait in answers), 2),
    )


def _visits(normal: Callable[[], str], over: threading.Event) -> list[tuple[str, float]]:
    """What a normal client is told, and how long that takes, until it is over."""
    answers: list[tuple[str, float]] = []
    while not (answers and over.is_set()):
        started = time.perf_counter()
        answers.append((normal(), time.perf_counter() - started))
    return answers


@contextmanager
def _probed(server: Process) -> Iterator[list[float]]:
    """Asks for the health during the block; gives the seconds of the worst checks after it, which
    are infinite if one was not answered."""
    url = urlsplit(server.health)
    waits: list[float] = []
    with subprocess.Popen(
        [sys.executable, "-c", _PROBE, url.netloc, url.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as probe:
        assert probe.stdout is not None
        waits.append(float(probe.stdout.readline()))  # it has started
        yield waits
        waits += map(float, probe.communicate()[0].split())
    if probe.returncode:
        waits.append(math.inf)
