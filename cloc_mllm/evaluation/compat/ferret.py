"""Ferret's `eval_refexp.py`. Letters: Q queries.

Reads `phrase [x, y, x, y].`: whole numbers, thousandths of the image, rounded down to whole
pixels. A box that is not four whole numbers drops all boxes of the answer. After a box everything
up to the next `.,;!?` is skipped. It reports the first box, the mean of all boxes and the best of
all boxes (its printed list is sorted, so the labels beside it may not be these). Phrases make no
difference: boxes of other phrases count too. Its IoU is taken from a module that was not
released; this is the usual one, in 32-bit floats.
"""

from __future__ import annotations

import numpy as np

from cloc_mllm.evaluation.compat.common import BoxAnswers, CompatScores, share
from cloc_mllm.evaluation.stats.overlap import paired_iou

_NO_BOX = [[0.0, 0.0, 0.0, 0.0]]
_DELIMITERS = ".,;!?"


def score(given: BoxAnswers) -> CompatScores:
    read = [
        _read(text, width / 1000.0, height / 1000.0)
        for text, (width, height) in zip(given.answers, given.sizes.tolist(), strict=True)
    ]
    per_answer = [boxes or _NO_BOX for boxes in read]
    counts = [len(boxes) for boxes in per_answer]
    query = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum([0, *counts[:-1]])
    boxes = np.array([box for boxes in per_answer for box in boxes], dtype=np.float32)
    truths = given.truths_px.astype(np.float32)
    iou = paired_iou(boxes, truths[query])
    means = np.add.reduceat(boxes, starts) / np.array(counts, dtype=np.float32)[:, None]
    metrics = {
        "Precision @ 1": share(iou[starts] >= 0.5),
        "mean": share(paired_iou(means, truths) >= 0.5),
        "upper bound": share(np.maximum.reduceat(iou, starts) >= 0.5),
    }
    num_raised = sum(boxes is None for boxes in read)
    return CompatScores(metrics, iou[starts].astype(np.float64), num_raised)


def _read(text: str, scale_x: float, scale_y: float) -> list[list[float]] | None:
    """Boxes in pixels; none if one is not whole numbers; None where the original raises, on a box
    of fewer than four numbers or beyond 64 bits."""
    boxes = []
    start = 0
    for position, character in enumerate(text):
        if character == "[":
            start = position + 1
        elif character == "]":
            try:
                numbers = [int(number) for number in text[start:position].split(",")]
            except ValueError:
                return []
            if len(numbers) < 4 or max(map(abs, numbers)) >= 2**63:
                return None
            scales = (scale_x, scale_y, scale_x, scale_y)
            boxes.append([float(int(n * s)) for n, s in zip(numbers[:4], scales, strict=True)])
            start = _after_delimiter(text, position + 1)
    return boxes


def _after_delimiter(text: str, start: int) -> int:
    found = (i for i in range(start, len(text)) if text[i] in _DELIMITERS)
    return next(found, len(text)) + 1
