"""Prediction and reference rows: the only place where generation and scoring meet (contract C8).

A row is checked when it is made.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cloc_mllm.box import Box

BOX_FRAME = "normalized"


@dataclass(frozen=True)
class PredictionRow:
    """What a model answered to one query.

    Args:
        id: the query's id; the reference row has the same.
        prompt: what was asked: the text, or the box in normalised numbers.
        raw_text: the model's own words; "" for models that answer with numbers.
        boxes: xyxy, normalised to the original image. The first one is the answer.
        labels: names, texts or ids, best first, at most ten. The first one is the answer.
        scores: one per label, in the same order.
        failure: why the raw text could not be read; such a row is wrong and is counted.
    """

    id: str
    image_id: str
    task: str
    prompt: str = ""
    raw_text: str = ""
    boxes: list[Box] = field(default_factory=list)
    box_frame: str = BOX_FRAME
    confidence: float | None = None
    failure: str | None = None
    model: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.box_frame != BOX_FRAME:
            raise ValueError(
                f"prediction {self.id!r}: expected box_frame {BOX_FRAME!r}, got "
                f"{self.box_frame!r}; convert the boxes to the original image, 0..1, first"
            )
        if self.scores and len(self.scores) != len(self.labels):
            raise ValueError(
                f"prediction {self.id!r} has {len(self.labels)} labels but {len(self.scores)} "
                "scores; write one score per label"
            )
        name = f"prediction {self.id!r}"
        advice = "; declare what other numbers mean (--columns raw_text=boxes --format FORMAT)"
        boxes = [_checked_box(box, name, advice) for box in self.boxes]
        object.__setattr__(self, "boxes", boxes)


@dataclass(frozen=True)
class ReferenceRow:
    """What counts as right for one query.

    Args:
        boxes: xyxy, normalised to the original image; a match with any of them counts.
        labels: any of them counts.
        kind: what the query asks for, for the breakdown: `unique`, `size`, `relation`, ...
        num_candidates: size of the list that labels are ranked from (0: free text or box).
        choices: the answers that were offered, for questions that offer some.
        width: of the original image in pixels, for answers written in pixels; 0 is unknown.
        height: likewise.
        num_distractors: other things of the same kind in the image; None is unknown.
    """

    id: str
    image_id: str
    task: str
    boxes: list[Box] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    kind: str = ""
    num_candidates: int = 0
    choices: list[str] = field(default_factory=list)
    width: int = 0
    height: int = 0
    num_distractors: int | None = None

    def __post_init__(self) -> None:
        if not self.boxes and not self.labels:
            raise ValueError(f"reference {self.id!r} has neither a box nor a label: drop the query")
        name = f"reference {self.id!r}"
        advice = "; declare what other numbers mean (--reference_format)"
        boxes = [_checked_box(box, name, advice) for box in self.boxes]
        object.__setattr__(self, "boxes", boxes)
        for x1, y1, x2, y2 in self.boxes:
            if not (x1 < x2 and y1 < y2):
                raise ValueError(
                    f"{name}: expected a box with x1 < x2 and y1 < y2, got {[x1, y1, x2, y2]}, "
                    f"which is inverted or empty{advice}, or drop the query"
                )


def _checked_box(box: Sequence[float], name: str, advice: str) -> Box:
    tolerance = 1e-6
    inside = len(box) == 4 and all(
        math.isfinite(value) and -tolerance <= value <= 1 + tolerance for value in box
    )
    if not inside:
        raise ValueError(
            f"{name}: expected a box of four numbers 0..1 of the original image, got {list(box)}"
            f"{advice}"
        )
    x1, y1, x2, y2 = (min(max(float(value), 0.0), 1.0) + 0.0 for value in box)  # -0.0 is 0.0
    return x1, y1, x2, y2


@dataclass(frozen=True)
class ScoredPair:
    """A reference and the prediction of the same id."""

    prediction: PredictionRow
    reference: ReferenceRow


def merge_by_id(
    predictions: Sequence[PredictionRow], references: Sequence[ReferenceRow]
) -> list[ScoredPair]:
    """Pairs in the order of the references; every id must be there exactly once on both sides.

    Raises:
        ValueError: an id is missing, unknown or there twice; the message names it. A score over
            only those answers that arrived would be too good.
    """
    for name, rows in (("predictions", predictions), ("references", references)):
        twice = [item for item, count in Counter(row.id for row in rows).items() if count > 1]
        _refuse(twice, f"are there more than once in the {name}; keep one row per id")
    by_id = {row.id: row for row in predictions}
    expected = {row.id for row in references}
    without = [row_id for row_id in expected if row_id not in by_id]
    unknown = [row_id for row_id in by_id if row_id not in expected]
    advice = "; add them, or count them as wrong answers (--missing wrong)"
    if unknown:
        advice = f"; among those of the predictions is {min(unknown)!r}"
    _refuse(without, "have a reference but no prediction", advice)
    _refuse(unknown, "have a prediction but no reference")
    pairs = [ScoredPair(by_id[reference.id], reference) for reference in references]
    _refuse(
        [p.reference.id for p in pairs if _query(p.prediction) != _query(p.reference)],
        "have another task or image_id in the prediction than in the reference",
    )
    return pairs


def _query(row: PredictionRow | ReferenceRow) -> tuple[str, str]:
    return row.task, row.image_id


def _refuse(ids: Sequence[str], problem: str, advice: str = "") -> None:
    if ids:
        shown = ", ".join(repr(item) for item in sorted(ids)[:5])
        more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
        raise ValueError(f"{len(ids)} ids {problem}: {shown}{more}{advice}")
