"""Reports a run: `log.jsonl`, TensorBoard if it is installed, and lines in the terminal."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm


class TrainLog:
    """Writes rows on the main rank. On other ranks (`enabled=False`) every call does nothing.

    Rows after `first_step` are dropped from `log.jsonl` at the start: a resumed run repeats them.
    """

    def __init__(self, output_dir: Path, first_step: int, num_steps: int, *, enabled: bool) -> None:
        self.enabled = enabled
        if not enabled:
            return
        output_dir.mkdir(parents=True, exist_ok=True)
        path = output_dir / "log.jsonl"
        _drop_rows_after(path, first_step)
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = _tensorboard_writer(output_dir / "tensorboard", first_step)
        self._bar = tqdm(
            total=num_steps,
            initial=first_step,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def row(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Writes the row `{"step": step, "kind": kind, **values}`; `step` counts finished steps."""
        if not self.enabled:
            return
        row = {"step": step, "kind": kind} | {key: _json_safe(v) for key, v in values.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        numbers = {key: v for key, v in values.items() if isinstance(v, (int, float))}
        if self._tensorboard is not None:
            for key, number in numbers.items():
                self._tensorboard.add_scalar(f"{kind}/{key}", number, step)
        self.message(f"step {step:>6} {kind}: {_pretty(values)}")

    def advance(self) -> None:
        """Moves the progress bar by one step."""
        if self.enabled:
            self._bar.update(1)

    def message(self, text: str) -> None:
        """Writes one line to the terminal, above the progress bar if there is one."""
        if self.enabled:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Closes the files; nothing can be written afterwards."""
        if not self.enabled:
            return
        self._bar.close()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


class Pace:
    """Measures images per second and seconds since it was last asked."""

    def __init__(self, images_per_step: int, first_step: int) -> None:
        self.images_per_step = images_per_step
        self._step = first_step
        self._at = time.monotonic()

    def since_last(self, step: int) -> dict[str, float]:
        """Measures since the last call; `step` counts finished steps."""
        now = time.monotonic()
        seconds, images = now - self._at, (step - self._step) * self.images_per_step
        self._step, self._at = step, now
        return {"images_per_second": images / seconds, "seconds": seconds}


def read_log(path: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Reads the rows of one kind from a `log.jsonl`."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["kind"] == kind]


def _drop_rows_after(path: Path, step: int) -> None:
    """Drops the rows after a step, and sets those aside that are no rows."""
    if not path.exists():
        return
    kept, damaged = [], []
    text = path.read_bytes().decode(errors="backslashreplace")
    *lines, last = text.split("\n")  # a kill may have cut the last line
    for line in (*lines, *([last] if _step_of(last) is not None else [])):
        row_step = _step_of(line)
        if row_step is None:
            damaged.append(line + "\n")
        elif row_step <= step:
            kept.append(line + "\n")
    if damaged:
        aside = path.with_name("log.damaged.jsonl")
        with aside.open("a", encoding="utf-8") as file:
            file.writelines(damaged)
        print(f"note: {len(damaged)} damaged row(s) of {path} were moved to {aside}", flush=True)
    rewritten = path.with_suffix(".partial")
    rewritten.write_text("".join(kept), encoding="utf-8")
    os.replace(rewritten, path)


def _step_of(line: str) -> int | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    step = row.get("step") if isinstance(row, dict) and "kind" in row else None
    return step if isinstance(step, int) else None


def _tensorboard_writer(directory: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # tensorboard is optional; log.jsonl has everything
        return None
    return SummaryWriter(str(directory), purge_step=first_step + 1)


def _json_safe(value: Any) -> Any:
    """Turns NaN and infinity, which JSON does not have, into words."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def _pretty(values: dict[str, Any]) -> str:
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in values.items()
    )
