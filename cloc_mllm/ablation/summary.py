"""Sums up cells in tables: means over seeds, intervals, differences, and the paper's signs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import stdev

import numpy as np
from scipy.stats import t as student_t

from cloc_mllm.ablation.cells import METRICS, Cell, read_scores
from cloc_mllm.ablation.config import AblationArm, AblationConfig
from cloc_mllm.evaluation.report.table import metric_title
from cloc_mllm.evaluation.stats.bootstrap import CONFIDENCE, QueryScores, bootstrap_interval

_TITLES = {
    "image_to_text": "image→text",
    "text_to_image": "text→image",
    "region_to_text": "region→text",
    "text_to_region": "text→region",
    "region_classification": "region class",
    "text_to_box": "text→box",
}


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval, as shares in 0..1."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """The sign of the mean, -1 or 1; 0 if the interval holds 0."""
        return (self.low > 0) - (self.high < 0)


@dataclass(frozen=True)
class Row:
    """One arm: its scores and its differences to `arm.against`, by task."""

    arm: AblationArm
    num_seeds: int
    seconds: list[float]
    scores: dict[str, Estimate] = field(default_factory=dict)
    differences: dict[str, Estimate] = field(default_factory=dict)


def title(task: str) -> str:
    return f"{_TITLES[task]} {metric_title(METRICS[task])}"


def summarize(config: AblationConfig, cells: Sequence[Cell]) -> list[Row]:
    """Makes a row for each arm that has at least one finished cell."""
    done = {(cell.arm, cell.seed): cell for cell in cells if cell.is_done()}
    scores = {key: read_scores(cell) for key, cell in done.items()}
    rows = []
    for arm in config.arms:
        seeds = [seed for seed in config.seeds if (arm.name, seed) in done]
        if not seeds:
            continue
        own = [scores[arm.name, seed] for seed in seeds]
        both = [seed for seed in seeds if (arm.against, seed) in done]
        row = Row(arm, len(seeds), [_seconds(done[arm.name, seed]) for seed in seeds])
        for task in own[0]:
            row.scores[task] = estimate([by_task[task] for by_task in own])
            pairs = [(scores[arm.name, s][task], scores[arm.against, s][task]) for s in both]
            if pairs:
                row.differences[task] = estimate([_minus(*pair) for pair in pairs])
        rows.append(row)
    return rows


def estimate(by_seed: Sequence[QueryScores]) -> Estimate:
    """Estimates the mean over seeds. Its interval joins two independent sources in quadrature: the
    images that are asked (bootstrap over images of the seeds' mean) and the seed of the training
    (Student's t)."""
    first = by_seed[0]
    mean = np.mean([scores.values for scores in by_seed], 0)
    images = bootstrap_interval(QueryScores(mean, first.image_ids, first.groups))
    num = len(by_seed)
    seeds = 0.0
    if num > 1:
        spread = stdev(scores.mean() for scores in by_seed)
        seeds = float(student_t.ppf((1 + CONFIDENCE) / 2, num - 1)) * spread / math.sqrt(num)
    return Estimate(
        images.value,
        images.value - math.hypot(images.value - images.ci_low, seeds),
        images.value + math.hypot(images.ci_high - images.value, seeds),
    )


def _minus(a: QueryScores, b: QueryScores) -> QueryScores:
    assert list(a.image_ids) == list(b.image_ids)
    return QueryScores(a.values - b.values, a.image_ids, a.groups)


def _seconds(cell: Cell) -> float:
    return float(json.loads((cell.directory / "result.json").read_text())["seconds"])


def write_summary(rows: Sequence[Row], config: AblationConfig, directory: Path) -> None:
    """Writes `ablation.md` (tables) and `ablation.json` (the same numbers)."""
    tasks = [task for task in METRICS if any(task in row.scores for row in rows)]
    parts = [
        f"Means over seeds {', '.join(map(str, config.seeds))}, in percent, with 95 % intervals "
        "(images by bootstrap, seeds by Student's t, joined in quadrature).",
        _score_table(rows, tasks),
        "Differences in points. In brackets the paper's own difference, where it has that row. "
        "`=` same sign, `≠` opposite sign, `?` the interval holds 0.",
        _difference_table(rows, tasks),
        f"Verdicts: {_verdicts(rows)}.",
    ]
    (directory / "ablation.md").write_text("\n\n".join(parts) + "\n")
    numbers = [asdict(row) for row in rows]
    (directory / "ablation.json").write_text(json.dumps(numbers, indent=2) + "\n")


def _score_table(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    lines = _header(["arm", "seeds", "s a cell", *map(title, tasks)])
    for row in rows:
        cells = [_with_interval(row.scores[task]) for task in tasks]
        seconds = f"{np.mean(row.seconds):.0f}"
        lines.append(_line([row.arm.name, str(row.num_seeds), seconds, *cells]))
    return "\n".join(lines)


def _difference_table(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    lines = _header(["arm", "against", "the paper's row", *map(title, tasks)])
    for row in rows:
        if row.differences:
            cells = [_difference(row, task) for task in tasks]
            lines.append(_line([row.arm.name, row.arm.against, row.arm.paper_row or "-", *cells]))
    return "\n".join(lines)


def _difference(row: Row, task: str) -> str:
    text = _with_interval(row.differences[task], sign="+")
    if task not in row.arm.paper:
        return text
    return f"{text} ({row.arm.paper[task]:+.1f} {verdict(row, task)})"


def verdict(row: Row, task: str) -> str:
    """Compares our sign with the paper's: `=`, `≠`, or `?` if ours is undecided."""
    ours, theirs = row.differences[task].sign, row.arm.paper[task]
    if ours == 0:
        return "?"
    return "=" if ours * theirs > 0 else "≠"


def _verdicts(rows: Sequence[Row]) -> str:
    found = [
        verdict(row, task) for row in rows for task in row.arm.paper if task in row.differences
    ]
    names = {"=": "same sign", "≠": "opposite sign", "?": "not decided"}
    return ", ".join(f"{found.count(mark)} {name}" for mark, name in names.items())


def _with_interval(estimate: Estimate, sign: str = "") -> str:
    value, low, high = (
        f"{100 * number:{sign}.1f}" for number in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} [{low}, {high}]"


def _header(names: Sequence[str]) -> list[str]:
    return [_line(names), _line(["---"] * len(names))]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
