"""Rows, records and queries as tests of the evaluation need them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cloc_mllm.box import Box
from cloc_mllm.data.records import Record, Region
from cloc_mllm.evaluation.config import EvalConfig
from cloc_mllm.evaluation.queries import QuerySet
from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow, ScoredPair
from cloc_mllm.evaluation.stats.bootstrap import QueryScores
from cloc_mllm.evaluation.tasks import EvalData, Task

LEFT, RIGHT, ALL = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)


def pair(
    prediction: Mapping[str, Any] | None = None,
    *,
    query_id: str = "q",
    image_id: str = "i1",
    task: str = "t",
    **reference: Any,
) -> ScoredPair:
    """Fields of a prediction beside fields of its reference."""
    return ScoredPair(
        PredictionRow(query_id, image_id, task, **(prediction or {})),
        ReferenceRow(query_id, image_id, task, **reference),
    )


def means(scores: Mapping[str, QueryScores]) -> dict[str, float]:
    return {name: metric.mean() for name, metric in scores.items()}


def record(
    record_id: str,
    regions: Sequence[Region] = (),
    captions: Sequence[str] = (),
    source: str = "photos",
) -> Record:
    return Record(record_id, b"", 100, 100, list(captions), list(regions), source)


def query_sets(task: Task, records: Sequence[Record] = ()) -> list[QuerySet]:
    return task.query_sets(EvalData(lambda: records))


def by_prompt(asked: QuerySet) -> dict[tuple[str, str | Box | None], ReferenceRow]:
    """(image, asked text or box) -> reference."""
    return {
        (query.image_id, query.text or (query.boxes[0] if query.boxes else None)): reference
        for query, reference in zip(asked.queries, asked.references, strict=True)
    }


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def cloc_config(cloc_dir: Path, out: Path, **settings: Any) -> EvalConfig:
    """A short evaluation of a CLOC model alone."""
    base = EvalConfig(
        cloc=str(cloc_dir),
        mllm="none",
        output_dir=str(out),
        device="cpu",
        bootstrap_samples=5,
        num_examples=1,
    )
    return replace(base, **settings)
