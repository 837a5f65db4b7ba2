"""lmms-eval's two RefCOCO box tasks. Letters: Q queries, C candidate boxes of all of them.

`refcoco_bbox_rec` takes the first `[a, b, c, d]` as fractions of the image. Anything else is the
box [0, 0, 0, 0], whose centre lies in a true box that touches the corner, so Center_ACC may be
right without an answer.

`refcoco_grounding` takes all boxes of an answer, each once as pixels and once as thousandths, and
scores the one that fits the truth best. More guesses score higher.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np

from cloc_mllm.evaluation.compat.common import BoxAnswers, CompatScores, area, mean, share
from cloc_mllm.evaluation.stats.overlap import paired_iou

THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
_BOX_KEYS = ("bbox_2d", "bbox", "box", "coordinates", "coord", "location", "position")
_NUMBER = r"(-?\d+(?:\.\d+)?)"
_FRACTIONS = re.compile(r"\[\s*" + r",\s*".join([_NUMBER] * 4) + r"\s*\]")
_FOUR_NUMBERS = re.compile(r"(?:\s*,\s*|\s+)".join([_NUMBER] * 4))


def score_bbox_rec(given: BoxAnswers) -> CompatScores:
    boxes = np.array([_first_box(text) for text in given.answers]).reshape(-1, 4)
    return aggregate(boxes, given.truths)


def aggregate(boxes: np.ndarray, truths: np.ndarray) -> CompatScores:
    """The seven numbers of lmms-eval, which names each of them `refcoco_NAME`.

    `boxes, truths: float64[Q, 4]` xyxy in one frame. Two boxes without area raise a
    ZeroDivisionError there.
    """
    iou = paired_iou(truths, boxes)
    with np.errstate(over="ignore", invalid="ignore"):
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    inside = ((truths[:, :2] <= centre) & (centre <= truths[:, 2:])).all(1)
    metrics = {"IoU": mean(iou)}
    metrics |= {f"ACC@{threshold}": share(iou >= threshold) for threshold in THRESHOLDS}
    metrics["Center_ACC"] = share(inside)
    no_union = (iou == 0) & (area(truths) + area(boxes) == 0)
    return CompatScores(metrics, iou, int(no_union.sum()))


def _first_box(text: str) -> list[float]:
    found = _FRACTIONS.search(text)
    return [float(number) for number in found.groups()] if found else [0.0] * 4


def score_refcoco_grounding(given: BoxAnswers) -> CompatScores:
    per_answer = [_all_boxes(text) or [[0.0] * 4] for text in given.answers]
    query = np.repeat(np.arange(len(per_answer)), [len(boxes) for boxes in per_answer])
    pixels = np.array(list(chain.from_iterable(per_answer)))
    scaled = pixels / 1000.0 * np.tile(given.sizes, 2)[query]
    candidates = np.stack([pixels, scaled], 1).reshape(-1, 4)
    query = np.repeat(query, 2)
    truths = given.truths_px
    iou = paired_iou(candidates, truths[query])
    # the first of the best candidates of each query: a stable sort puts it in front
    order = np.lexsort((-iou, query))
    best = order[np.flatnonzero(np.diff(query[order], prepend=-1))]
    return CompatScores(aggregate(candidates[best], truths).metrics, iou[best])


def _all_boxes(text: str) -> list[list[float]]:
    if not text:
        return []
    boxes = list(_json_boxes(_some_json(text.strip())))
    if boxes:
        return boxes
    return [[float(x) for x in match.groups()] for match in _FOUR_NUMBERS.finditer(text)]


def _some_json(text: str) -> Any:
    """The fenced part, all of the text, or what lies between the outermost brackets or braces:
    the first of them that is JSON."""
    _, fence, rest = text.partition("```")
    inside, closed, _ = rest.partition("```")
    candidates = [re.sub("^json", "", inside, flags=re.IGNORECASE)] if fence and closed else []
    candidates.append(text)
    for opening, closing in ("[]", "{}"):
        start, end = text.find(opening), text.rfind(closing)
        if -1 < start < end:
            candidates.append(text[start : end + 1])
    for candidate in candidates:
        try:
            return json.loads(candidate.strip())
        except (ValueError, RecursionError):
            continue  # not JSON: the next candidate
    return None


def _json_boxes(data: Any) -> Iterator[list[float]]:
    """Every list of four numbers and every object's box in nested JSON, in reading order."""
    waiting = [data]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            box = _keyed_box(item)
            item = [] if box else list(item.values())
        else:
            box = _as_numbers(item) if _is_four_numbers(item) else None
        if box is not None:
            yield box
        elif isinstance(item, list):
            waiting.extend(reversed(item))


def _is_four_numbers(item: Any) -> bool:
    return (
        isinstance(item, list) and len(item) == 4 and all(isinstance(x, (int, float)) for x in item)
    )


def _keyed_box(item: dict[str, Any]) -> list[float] | None:
    """The first known key with four values that are numbers, or texts of numbers."""
    values = (item.get(key) for key in _BOX_KEYS)
    boxes = (_as_numbers(value) for value in values if isinstance(value, list) and len(value) == 4)
    return next((box for box in boxes if box is not None), None)


def _as_numbers(values: list[Any]) -> list[float] | None:
    try:
        return [float(value) for value in values]
    except OverflowError:  # raises there too; no box that large overlaps anything
        return [float("inf")] * 4
    except (TypeError, ValueError):
        return None
