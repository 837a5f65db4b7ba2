"""Prediction rows that hold only an answer's text -> rows with boxes, strictly and leniently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from cloc_mllm.data.values import size_of
from cloc_mllm.evaluation.answers.formats import AnswerFormat
from cloc_mllm.evaluation.answers.frames import Size, smart_resize
from cloc_mllm.evaluation.answers.reading import Reading, read_lenient, read_strict
from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow, ScoredPair

ResizedSize = Size | Literal["qwen2.5-vl"] | None


def is_unread(row: PredictionRow) -> bool:
    """A row whose boxes, if it has any, are only in its text."""
    return bool(row.raw_text) and not row.boxes


def read_rows(
    pairs: Sequence[ScoredPair],
    declared: AnswerFormat,
    resized_size: ResizedSize = None,
    *,
    lenient: bool = False,
) -> list[ScoredPair]:
    """The pairs with boxes read from `raw_text` where there are none; rows with boxes stay.

    A row that already says it failed keeps that failure in the strict reading.

    Raises:
        ValueError: a frame of pixels, and rows whose image size is not known; names them.
    """
    sizes = _sizes(pairs, declared, resized_size)
    read = read_lenient if lenient else read_strict
    return [
        ScoredPair(_read(pair.prediction, declared, size, read), pair.reference)
        for pair, size in zip(pairs, sizes, strict=True)
    ]


def _read(
    row: PredictionRow,
    declared: AnswerFormat,
    size: Size | None,
    read: Callable[[AnswerFormat, str, Size | None], Reading],
) -> PredictionRow:
    if not is_unread(row) or (row.failure is not None and read is read_strict):
        return row
    reading = read(declared, row.raw_text, size)
    return replace(row, boxes=reading.boxes, failure=reading.failure)


def reading_summary(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """Share of answers without a usable box and why, share with more than one box."""
    reasons = Counter(
        pair.prediction.failure or "empty"
        for pair in pairs
        if pair.prediction.failure is not None or not pair.prediction.boxes
    )
    several = sum(len(pair.prediction.boxes) > 1 for pair in pairs)
    return {
        "parse_failure_rate": sum(reasons.values()) / len(pairs),
        "multi_box_rate": several / len(pairs),
        "failures": dict(reasons.most_common()),
    }


def _sizes(
    pairs: Sequence[ScoredPair], declared: AnswerFormat, resized_size: ResizedSize
) -> list[Size | None]:
    if not declared.coordinates.needs_size:
        return [None] * len(pairs)
    if declared.coordinates.kind == "pixels":
        sizes = [original_size(pair.reference) for pair in pairs]
        missing = "width and height in the references"
    else:
        sizes = [_resized(pair, resized_size) for pair in pairs]
        missing = (
            "the size the model saw: resized_width and resized_height in each row's settings, or "
            "--resized_size WIDTHxHEIGHT, or --resized_size qwen2.5-vl (its rule; needs width and "
            "height in the references)"
        )
    unknown = [
        pair.reference.id
        for pair, size in zip(pairs, sizes, strict=True)
        if size is None and is_unread(pair.prediction)
    ]
    if unknown:
        shown = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise ValueError(f"format {declared.name} needs {missing}; missing for {shown}")
    return sizes


def original_size(reference: ReferenceRow) -> Size | None:
    known = reference.width > 0 and reference.height > 0
    return (float(reference.width), float(reference.height)) if known else None


def _resized(pair: ScoredPair, resized_size: ResizedSize) -> Size | None:
    settings = pair.prediction.settings
    if "resized_width" in settings and "resized_height" in settings:
        width, height = settings["resized_width"], settings["resized_height"]
        size = size_of(width, height)
        if size is None:
            raise ValueError(
                f"prediction {pair.prediction.id!r}: expected resized_width and resized_height in "
                f"settings to be positive numbers, got {width!r} and {height!r}"
            )
        return size
    if resized_size != "qwen2.5-vl":
        return resized_size
    size = original_size(pair.reference)
    return None if size is None else smart_resize(int(size[0]), int(size[1]))
