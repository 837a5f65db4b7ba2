"""Ends a run that a rank has left, or that hangs, with a line that says who is missing."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from cloc_mllm.distributed import NoticeBoard, is_lost_connection, rank, world_size
from cloc_mllm.train.health import newest

WAITING, COMPUTING = "waiting for its data", "computing"
EVALUATING, SAVING = "evaluating", "saving"

_EVERY_SECONDS = 1.0
_LEAST_SECONDS = 60.0
_TIMES_MEDIAN = 10
_STEPS_TO_KNOW = 10  # the first ones start workers and compile
_LONG_SECONDS = 1800.0  # for what the main rank does alone
_SUSPICIOUS_SECONDS = 5.0  # of silence, once a connection to another rank has broken
_EXPLAIN_SECONDS = 15.0  # to find out whose
_FAREWELL_SECONDS = 2.5  # for the other ranks to read why, before rank 0 takes the board with it


@dataclass(frozen=True)
class Note:
    """What a rank tells the others about once a second.

    Attributes:
        machine: same for processes that see each other's ids.
        beat: grows with each note.
        step: the step it is in, from 1.
        doing: one of the words above.
    """

    host: str
    machine: str
    process: int
    beat: int
    step: int
    doing: str


class RankWatch:
    """A thread beside the training loop, which tells it what it does by `now`.

    It ends this process if another rank is gone or silent, or if a step takes too long. A lone
    rank, for which nobody waits, is only warned of a long step, unless it was told a limit. Time in
    which the whole process was suspended does not count. When a collective call of the loop fails,
    the watch says whose fault that was.

    Args:
        step_timeout: see `RunConfig`.
        before_end: called before the process ends.
    """

    def __init__(
        self, step_timeout: float, checkpoints: Path, before_end: Callable[[], None]
    ) -> None:
        self.step_timeout = step_timeout
        self.checkpoints = checkpoints
        self.before_end = before_end
        self._clock = 0.0  # seconds that the thread has seen pass
        self._doing, self._step, self._since = WAITING, 0, math.inf
        self._step_started = time.monotonic()
        self._durations: deque[float] = deque(maxlen=200)
        self._suspicious = False
        self._warned_of = 0  # a step
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rank watch", daemon=True)

    def now(self, doing: str, step: int) -> None:
        """Notes what the loop does from now on, and in which step, from 1."""
        at = time.monotonic()
        if self._doing == COMPUTING != doing:
            self._durations.append(at - self._step_started)
        if doing == WAITING:
            self._step_started = at
        if doing != COMPUTING:  # a step includes the wait for its data
            self._since = self._clock
        self._doing, self._step = doing, step

    def __enter__(self) -> RankWatch:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and world_size() > 1 and is_lost_connection(error):
            self._suspicious = True
            self._thread.join(_EXPLAIN_SECONDS)
        self._left.set()
        self._thread.join()

    def _watch(self) -> None:
        others = _Others() if world_size() > 1 else None
        last = time.monotonic()
        while True:  # the first note at once: a rank may be lost in its first second
            at = time.monotonic()
            self._clock += min(at - last, 2 * _EVERY_SECONDS)
            last = at
            patience = _SUSPICIOUS_SECONDS if self._suspicious else self._step_limit(_LEAST_SECONDS)
            fault = self._missing(others, patience)
            if not fault and (late := self._overdue(others)):
                # a rank that has just fallen silent is the reason
                fault = self._missing(others, _SUSPICIOUS_SECONDS) or late
            if fault and not self._left.is_set():
                if others or self.step_timeout:
                    self._end(fault, others)
                else:
                    self._warn(fault)
            if self._left.wait(_EVERY_SECONDS):
                return

    def _missing(self, others: _Others | None, patience: float) -> str:
        return others.fault(self._clock, patience, self._step, self._doing) if others else ""

    def _step_limit(self, unknown: float) -> float:
        if self.step_timeout:
            return self.step_timeout
        if len(self._durations) < _STEPS_TO_KNOW:
            return unknown
        return max(_LEAST_SECONDS, _TIMES_MEDIAN * statistics.median(self._durations))

    def _overdue(self, others: _Others | None) -> str:
        long = self._doing in (EVALUATING, SAVING)
        limit = _LONG_SECONDS if long else self._step_limit(math.inf)
        if self._clock - self._since <= limit:
            return ""
        doings = {rank(): self._doing} | (others.doings() if others else {})
        listed = ", ".join(f"rank {number} is {doing}" for number, doing in sorted(doings.items()))
        what = self._doing if long else "the step"
        advice = "" if long else "; if it may take so long, raise run.step_timeout"
        return f"step {self._step}: {what} takes more than {limit:.0f} s ({listed}){advice}"

    def _warn(self, fault: str) -> None:
        if self._warned_of != self._step:
            self._warned_of = self._step
            print(f"warning: {fault}", file=sys.stderr, flush=True)

    def _end(self, fault: str, others: _Others | None) -> None:
        if others:
            others.tell(fault)
        print(
            f"cloc-mllm: error: {fault}; newest checkpoint: {newest(self.checkpoints)}. The same "
            "command goes on from there",
            file=sys.stderr,
            flush=True,
        )
        self.before_end()
        if others:
            time.sleep(_FAREWELL_SECONDS)
            others.kill_silent()
        os._exit(1)


class _Others:
    """The notes of the other ranks."""

    _num_watches = 0  # of this process, the same on all ranks: each has names of its own

    def __init__(self) -> None:
        _Others._num_watches += 1
        self._board = NoticeBoard(f"watch {_Others._num_watches}")
        self._notes: dict[int, Note] = {}
        self._heard: dict[int, float] = {}  # when each note was new, by the watch's clock
        self._beat = 0
        self._silent: list[Note] = []

    def fault(self, clock: float, patience: float, step: int, doing: str) -> str:
        """Exchanges notes; says which rank is missing, "" if none is.

        Args:
            patience: seconds that a rank may be silent.
            step: in which this rank is.
        """
        self._beat += 1
        note = Note(socket.gethostname(), _machine(), os.getpid(), self._beat, step, doing)
        answers = True
        try:
            if said := self._board.read("fault"):
                return said
            self._board.post(str(rank()), json.dumps(asdict(note)))
            self._read(clock)
        except ConnectionError:
            answers = False
        for number, theirs in self._notes.items():
            if theirs.machine == note.machine and _is_gone(theirs.process):
                return self._missing(number, step, "its process is gone")
        silent = [number for number in self._notes if clock - self._heard[number] > patience]
        keeper = NoticeBoard.keeper()
        if not answers and keeper is not None:  # without its board nobody is heard
            silent = [number for number in silent if number == keeper]
        if not silent:
            return ""
        self._silent = [self._notes[number] for number in silent]
        seconds = clock - self._heard[silent[0]]
        return self._missing(silent[0], step, f"no sign of life for {seconds:.0f} s")

    def doings(self) -> dict[int, str]:
        return {number: note.doing for number, note in self._notes.items()}

    def tell(self, fault: str) -> None:
        try:
            self._board.post("fault", fault)
        except ConnectionError:  # gone with rank 0; each rank finds the fault by itself
            return

    def kill_silent(self) -> None:
        """A stopped process would stay, with its port, until its launcher loses patience."""
        for note in self._silent:
            if note.machine == _machine() and not _is_gone(note.process):
                os.kill(note.process, signal.SIGKILL)

    def _read(self, clock: float) -> None:
        for number in range(world_size()):
            text = self._board.read(str(number)) if number != rank() else None
            if text is None:
                continue
            note = Note(**json.loads(text))
            if self._notes.get(number) != note:
                self._notes[number], self._heard[number] = note, clock

    def _missing(self, number: int, step: int, why: str) -> str:
        """Tells of a rank. The ranks step together, so it is in our step if its note is older."""
        note = self._notes[number]
        place = f"{step}" if step > note.step else f"{note.step}, while {note.doing}"
        return f"rank {number} on host {note.host} was lost in step {place}: {why}"


def _machine() -> str:
    """Tells machines and containers apart."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return f"{socket.gethostname()} {os.getppid()}"


def _is_gone(process: int) -> bool:
    """Whether a process of this machine has ended, also if nobody has asked for its status yet."""
    try:
        os.kill(process, 0)
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except ProcessLookupError:
        return True
    except OSError:  # another user's, or no Linux
        return False
    return status.rpartition(")")[2].split()[0] in ("Z", "X")
