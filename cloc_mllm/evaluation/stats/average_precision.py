"""Average precision of box answers that have a confidence, by pycocotools (COCO's own code)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cloc_mllm.evaluation.rows.rows import Box, ScoredPair
from cloc_mllm.evaluation.scores.boxes import is_failure

RULE = (
    "Average precision over all answers pooled and ordered by confidence (COCO's 101 points; ap: "
    "mean over IoU 0.5 to 0.95, ap_50 and ap_75: at one). Each query is an image of its own with "
    "one class, so an answer can match only boxes of its own query, and every true box is one to "
    "find: with one answer a query, recall and so ap are below 1 where a query has several."
)
_SIDE = 1000.0  # boxes are scored in thousandths of the image


@dataclass(frozen=True)
class AveragePrecision:
    """Mean over IoU 0.5 to 0.95, and at 0.5 and 0.75; `n_boxes` true boxes were to be found."""

    ap: float
    ap_50: float
    ap_75: float
    n_boxes: int


def average_precision(pairs: Sequence[ScoredPair]) -> AveragePrecision | None:
    """Average precision of one task's answers; None where no answer has a confidence.

    The first box of an answer counts, as in every scorer. A failed answer is no detection; its
    true boxes stay to be found.

    Raises:
        ValueError: an answer with a box has no confidence while others have one.
    """
    answered = [i for i, pair in enumerate(pairs) if not is_failure(pair)]
    unsure = [i for i in answered if pairs[i].prediction.confidence is None]
    if len(unsure) == len(answered):
        return None
    if unsure:
        raise ValueError(
            f"{len(unsure)} of {len(answered)} box answers have no confidence, for instance "
            f"{pairs[unsure[0]].reference.id!r}; average precision needs one for each, or none"
        )
    truths = [(i, box) for i, pair in enumerate(pairs) for box in pair.reference.boxes]
    detections = [
        {
            "image_id": i + 1,
            "category_id": 1,
            "bbox": _xywh(pairs[i].prediction.boxes[0]),
            "score": pairs[i].prediction.confidence,
        }
        for i in answered
    ]
    return AveragePrecision(*_evaluate(len(pairs), truths, detections), len(truths))


def _evaluate(
    num_queries: int, truths: Sequence[tuple[int, Box]], detections: list[dict[str, Any]]
) -> tuple[float, float, float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i + 1} for i in range(num_queries)],
            "categories": [{"id": 1, "name": "phrase"}],
            "annotations": [_annotation(k + 1, i + 1, box) for k, (i, box) in enumerate(truths)],
        }
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(detections), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    ap, ap_50, ap_75 = (float(value) for value in evaluator.stats[:3])
    return ap, ap_50, ap_75


def _annotation(annotation_id: int, image_id: int, box: Box) -> dict[str, Any]:
    bbox = _xywh(box)
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": 1,
        "bbox": bbox,
        "area": bbox[2] * bbox[3],
        "iscrowd": 0,
    }


def _xywh(box: Box) -> list[float]:
    left, top, right, bottom = (value * _SIDE for value in box)
    return [left, top, max(right - left, 0.0), max(bottom - top, 0.0)]
