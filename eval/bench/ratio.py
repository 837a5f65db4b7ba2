"""Times ours against theirs: interleaved pairs in one process, raw samples kept."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_QUIET_LOAD = 0.5  # one-minute load average before the start


@dataclass(frozen=True)
class Samples:
    """Seconds of each pair."""

    ours: list[float]
    theirs: list[float]

    @property
    def ratios(self) -> list[float]:
        return [ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest ratio of a pair."""
        return min(self.ratios), max(self.ratios)


@dataclass(frozen=True)
class Ratio:
    """ours / theirs in wall time and in CPU time (of the process, its threads, its ended children).

    CPU time is the one to trust where others share the cores.
    """

    wall: Samples
    cpu: Samples


def interleaved_ratio(
    ours: Callable[[], object], theirs: Callable[[], object], *, pairs: int = 7, warmups: int = 2
) -> Ratio:
    """Times both in the order ours, theirs, theirs, ours, ..., after `warmups` untimed calls of
    each. Check that both give the same answer first: a ratio of different work says nothing."""
    for _ in range(warmups):
        ours()
        theirs()
    wall, cpu = Samples([], []), Samples([], [])
    for pair in range(pairs):
        sides = [(ours, wall.ours, cpu.ours), (theirs, wall.theirs, cpu.theirs)]
        for call, wall_samples, cpu_samples in sides if pair % 2 == 0 else reversed(sides):
            wall_start, cpu_start = time.perf_counter(), cpu_seconds()
            call()
            cpu_samples.append(cpu_seconds() - cpu_start)
            wall_samples.append(time.perf_counter() - wall_start)
    return Ratio(wall, cpu)


def report(title: str, ratio: Ratio) -> str:
    """One line: median ratio and spread in wall and CPU time, median seconds of both sides."""
    columns = []
    for name, samples in (("wall", ratio.wall), ("cpu", ratio.cpu)):
        low, high = samples.spread
        ours, theirs = statistics.median(samples.ours), statistics.median(samples.theirs)
        columns.append(
            f"{name} {samples.median:.2f} ({low:.2f}-{high:.2f}; {ours:.3f} s / {theirs:.3f} s)"
        )
    return f"{title}: " + ", ".join(columns)


def machine_state() -> dict[str, Any]:
    """Describes the machine, so that a reader can judge a time; call it before the work starts."""
    load = os.getloadavg()[0]
    return {
        "load": round(load, 2),
        "noisy": load > _QUIET_LOAD,
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def save_samples(path: str | Path, machine: dict[str, Any], results: dict[str, Any]) -> None:
    """Machine and raw samples (a `Ratio` or plain JSON under each title) as JSON."""
    plain = {
        title: dataclasses.asdict(result) if isinstance(result, Ratio) else result
        for title, result in results.items()
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({"machine": machine, "results": plain}, indent=1) + "\n")


def cpu_seconds() -> float:
    """The processor time of this process and of the ended ones that it started."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
