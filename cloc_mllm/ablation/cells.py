"""Runs one cell: an arm is trained with one seed in a process of its own, then scored.

`cells/ARM-seedN/` holds `arguments.json`, `model/`, `train.log`, `scores.npz` (the score of every
query) and, once the cell is done, `result.json`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cloc_mllm.ablation.config import AblationConfig
from cloc_mllm.data.records import Record
from cloc_mllm.evaluation.predictors.cloc import ClocSettings
from cloc_mllm.evaluation.quick import cloc_scores
from cloc_mllm.evaluation.stats.bootstrap import QueryScores
from cloc_mllm.models.build import load_cloc
from cloc_mllm.stopping import StopRequest, wait_for

# the metric that the table shows of each task
METRICS = {
    "image_to_text": "r_at_1",
    "text_to_image": "r_at_1",
    "region_to_text": "r_at_10",
    "text_to_region": "r_at_10",
    "region_classification": "macro_acc",
    "text_to_box": "acc_at_0_5",
}
_TRAIN_SCENES = 10_000


@dataclass(frozen=True)
class Cell:
    """An arm with a seed; `arguments` are those of `cloc-mllm stage1` but the output directory."""

    arm: str
    seed: int
    directory: Path
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    def is_done(self) -> bool:
        """Whether it was trained and scored with exactly these arguments."""
        return (self.directory / "result.json").is_file() and self.is_same()

    def is_same(self) -> bool:
        """Whether the content of the directory was made with exactly these arguments."""
        path = self.directory / "arguments.json"
        return path.is_file() and json.loads(path.read_text()) == list(self.arguments)


def build_cells(config: AblationConfig, train: str) -> list[Cell]:
    """Lists the cells seed by seed, so that a table of one seed is there early.

    Raises:
        ValueError: there is no arm, a name comes twice, or an arm is compared with an unknown one.
    """
    names = [arm.name for arm in config.arms]
    wrong = {arm.against for arm in config.arms} - {*names, ""} | set(config.only) - {*names}
    if not names or len({*names}) < len(names) or wrong:
        raise ValueError(
            f"an ablation needs arms of different names, compared with each other; got {names}"
            + (f", and not among them: {sorted(wrong)}" if wrong else "")
        )
    cells = []
    for seed in config.seeds:
        for arm in config.arms:
            settings = {**config.settings, **arm.settings, "data.train": train, "run.seed": seed}
            pairs = ((f"--{key}", _as_argument(value, seed)) for key, value in settings.items())
            arguments = ("--config", config.base, *(part for pair in pairs for part in pair))
            slug = re.sub(r"[^a-z0-9]+", "_", arm.name.lower()).strip("_")
            directory = Path(config.output_dir) / "cells" / f"{slug}-seed{seed}"
            cells.append(Cell(arm.name, seed, directory, arguments))
    return cells


def _as_argument(value: Any, seed: int) -> str:
    """Writes a setting as an argument; `{seed}` in a text becomes the cell's seed."""
    return value.replace("{seed}", str(seed)) if isinstance(value, str) else json.dumps(value)


def prepare_training_data(directory: Path, stop: StopRequest) -> None:
    """Builds 10,000 built-in scenes, unless they are there."""
    if not directory.exists():
        arguments = ("--num", str(_TRAIN_SCENES), "--workers", str(os.cpu_count() or 1))
        _cloc_mllm(("data", "build", "scenes", *arguments, "--output_dir", str(directory)), stop)


def run_cell(
    cell: Cell, test: Sequence[Record], stop: StopRequest, *, share: float = 1.0
) -> dict[str, Any] | None:
    """Trains (from the cell's last checkpoint, if it has one) and scores a cell.

    Returns:
        the content of `result.json`: `seconds` of this call and the `means` by task; None if the
        training was asked to stop.
    """
    started = time.monotonic()
    _clear_if_other(cell)
    output = ("--run.output_dir", str(cell.directory))
    log = cell.directory / "train.log"
    _cloc_mllm(("stage1", *cell.arguments, *output), stop, log=log, share=share)
    if stop.requested:
        return None
    scores = _score(cell.directory / "model", test)
    _save_scores(scores, cell.directory / "scores.npz")
    shutil.rmtree(cell.directory / "checkpoints")
    result = {
        "seconds": round(time.monotonic() - started, 1),
        "means": {task: values.mean() for task, values in scores.items()},
    }
    partial = cell.directory / "result.json.partial"
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.rename(cell.directory / "result.json")
    return result


def read_scores(cell: Cell) -> dict[str, QueryScores]:
    """Reads what `run_cell` measured, by task."""
    with np.load(cell.directory / "scores.npz", allow_pickle=False) as arrays:
        return {
            task: QueryScores(
                arrays[f"{task}/values"],
                arrays[f"{task}/image_ids"].tolist(),
                arrays[f"{task}/groups"].tolist() if f"{task}/groups" in arrays else None,
            )
            for task in METRICS
            if f"{task}/values" in arrays
        }


def _clear_if_other(cell: Cell) -> None:
    """Empties the cell's directory if other settings made its content."""
    path = cell.directory / "arguments.json"
    if path.is_file() and not cell.is_same():
        print(f"{cell.name}: its settings changed, so it is trained anew", flush=True)
        shutil.rmtree(cell.directory)
    cell.directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(cell.arguments))


def _score(model_directory: Path, test: Sequence[Record]) -> dict[str, QueryScores]:
    model, tokenizer, _ = load_cloc(model_directory)
    scores = cloc_scores(model, tokenizer, test, ClocSettings())
    return {task: scores[task][metric] for task, metric in METRICS.items() if task in scores}


def _save_scores(scores: dict[str, QueryScores], path: Path) -> None:
    arrays: dict[str, np.ndarray] = {}
    for task, values in scores.items():
        arrays[f"{task}/values"] = values.values.astype(np.float32)
        arrays[f"{task}/image_ids"] = np.array(values.image_ids)
        if values.groups is not None:
            arrays[f"{task}/groups"] = np.array(values.groups)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def _cloc_mllm(
    arguments: Sequence[str], stop: StopRequest, *, log: Path | None = None, share: float = 1.0
) -> None:
    """Runs a command in a process of its own, on `share` of the cores. Hands a request to stop on.

    Raises:
        ValueError: the command failed; says where its output lies.
    """
    threads = str(max(1, int((os.cpu_count() or 1) * share)))
    environment = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive", **os.environ}
    argv = [sys.executable, "-m", "cloc_mllm.cli", *arguments]
    with open(log or os.devnull, "ab") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=output, env=environment)
        wait_for(process, stop)
    status = process.returncode
    if status and not stop.requested:
        where = f"; see {log}" if log else ""
        raise ValueError(f"cloc-mllm {arguments[0]} failed with status {status}{where}")
