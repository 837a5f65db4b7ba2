"""Peak memory of a piece of work, in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


def extra_peak_mib(prepare: Callable[[], Callable[[], object]]) -> float:
    """How far a fresh process's peak resident memory (VmHWM, so Linux only) rises while the work
    runs that `prepare` returns, above the peak after `prepare`. `prepare` must be picklable."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
        return process.submit(_extra_peak_mib, prepare).result()


def _extra_peak_mib(prepare: Callable[[], Callable[[], object]]) -> float:
    work = prepare()
    before = _peak_kib()
    work()
    return (_peak_kib() - before) / 1024


def _peak_kib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise OSError("/proc/self/status has no VmHWM")
