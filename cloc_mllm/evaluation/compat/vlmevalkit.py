"""VLMEvalKit's RefCOCO. Letters: Q queries.

The first `[a b c d]` (commas or spaces), else the first four numbers anywhere in the text. The
frame is guessed from the largest of them: up to 1.5 fractions, up to 1000 thousandths, above that
pixels; so pixel answers on pictures of up to 1000 pixels are read wrong. Boxes are cut to the
image and swapped corners put right.
"""

from __future__ import annotations

import re

import numpy as np

from cloc_mllm.evaluation.compat.common import BoxAnswers, CompatScores, mean, share
from cloc_mllm.evaluation.stats.overlap import paired_iou

_NUMBER = r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?"
_ANY_NUMBER = re.compile(_NUMBER)
_BOX = re.compile(r"\[\s*" + r"(?:\s*,\s*|\s+)".join([f"({_NUMBER})"] * 4) + r"\s*\]")


def score(given: BoxAnswers) -> CompatScores:
    read = [_first_numbers(text) for text in given.answers]
    answered = np.array([numbers is not None for numbers in read])
    boxes = np.array([numbers or [0.0] * 4 for numbers in read]).reshape(-1, 4)
    iou = paired_iou(_in_pixels(boxes, given.sizes), given.truths_px) * answered
    return CompatScores({"Precision@1": share(iou >= 0.5), "Average IoU": mean(iou)}, iou)


def _first_numbers(text: str) -> list[float] | None:
    bracketed = _BOX.search(text)
    found = bracketed.groups() if bracketed else _ANY_NUMBER.findall(text)[:4]
    return [float(number) for number in found] if len(found) == 4 else None


def _in_pixels(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    largest = np.abs(boxes).max(1, keepdims=True)
    sizes = np.tile(sizes, 2)
    thousandths = boxes / 1000.0 * sizes
    with np.errstate(over="ignore"):
        pixels = np.select([largest <= 1.5, largest <= 1000], [boxes * sizes, thousandths], boxes)
    pixels = np.clip(pixels, 0, sizes).reshape(-1, 2, 2)
    return np.sort(pixels, axis=1).reshape(-1, 4)
