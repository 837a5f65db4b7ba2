"""InternVL's `evaluate_grounding.py`. Letters: Q queries.

After some opening bracket: three commas and a closing bracket on the same line, whatever stands
between. Numbers that add up to 4 or more are thousandths, else fractions: pixels are never meant.
All in 32-bit floats.
"""

from __future__ import annotations

import re

import numpy as np

from cloc_mllm.evaluation.compat.common import BoxAnswers, CompatScores, share
from cloc_mllm.evaluation.stats.overlap import paired_iou

_NOTHING = (0.0, 0.0, 0.0, 0.0)


def score(given: BoxAnswers) -> CompatScores:
    with np.errstate(over="ignore", invalid="ignore"):
        boxes = np.array([_first_box(text) for text in given.answers], dtype=np.float32)
        boxes = boxes.reshape(-1, 4)
        thousandths = boxes.sum(1, keepdims=True) >= 4
        boxes = np.where(thousandths, boxes / np.float32(1000), boxes)
        boxes = boxes * np.tile(given.sizes, 2).astype(np.float32)
    iou = paired_iou(boxes, given.truths_px.astype(np.float32)).astype(np.float64)
    return CompatScores({"Precision @ 1": share(iou >= 0.5)}, iou)


def _first_box(text: str) -> tuple[float, ...]:
    """The first four fields; zeros if they are not all numbers, even if a later box is one."""
    for brackets in re.finditer(r"\[+", text):
        line = text[brackets.end() :].partition("\n")[0]
        fields = line.split(",", 3)
        if len(fields) == 4 and "]" in fields[3]:
            fields[3] = fields[3].partition("]")[0]
            return _numbers(fields)
    return _NOTHING


def _numbers(fields: list[str]) -> tuple[float, ...]:
    try:
        return tuple(float(field) for field in fields)
    except ValueError:
        return _NOTHING
