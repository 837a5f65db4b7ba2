"""Runs a command and finds all its processes, those of its ranks and of their loaders included."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

PATIENCE_S = 600.0  # for a start on a busy machine
_ROOT = Path(__file__).resolve().parents[2]


class Job:
    """A command whose processes have a mark in their environment, so that all can be found:
    torchrun gives each rank a session of its own."""

    def __init__(self, argv: Sequence[str], log: Path) -> None:
        self.log = log
        of_ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # which this process may have been given
        environment = {k: v for k, v in os.environ.items() if k not in of_ranks}
        environment |= {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1", "FAULTS_JOB": str(log)}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                argv,
                cwd=_ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def said(self) -> str:
        return self.log.read_text(errors="replace").replace("\r", "\n")

    def last_line(self, sign: str = "") -> str:
        lines = [line for line in self.said().splitlines() if line.strip() and sign in line]
        return lines[-1].strip() if lines else "nothing"

    def members(self) -> list[int]:
        """The processes of the command that run."""
        found = []
        mark = f"FAULTS_JOB={self.log}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state = (process / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
                if state not in "ZX" and mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
        return found

    def rank(self, number: int) -> int:
        """The process of a rank."""
        for process in self.members():
            with contextlib.suppress(OSError):
                settings = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
                command = Path(f"/proc/{process}/cmdline").read_bytes()
                parent = int(
                    Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1]
                )
                ours = b"training/stage1.py" in command and b"launch" not in command
                if ours and f"RANK={number}".encode() in settings and not self._is_rank(parent):
                    return process
        raise AssertionError(f"no process of rank {number}: {self.last_line()}")

    @staticmethod
    def _is_rank(process: int) -> bool:
        """A loader's worker looks like the rank that is its parent."""
        settings = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        return any(setting.startswith(b"LOCAL_RANK=") for setting in settings)

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)

    def seconds_to_end(self, within: float) -> tuple[float, int]:
        """Waits for all processes; returns the seconds and how many are left, and ends those."""
        started = time.monotonic()
        while (left := self.members()) and time.monotonic() - started < within:
            self.process.poll()
            time.sleep(0.05)
        seconds = time.monotonic() - started
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait(PATIENCE_S)
        while self.members():  # a signal takes a moment
            time.sleep(0.05)
        return seconds, len(left)
