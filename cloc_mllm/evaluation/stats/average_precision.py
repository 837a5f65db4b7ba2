"""Average precision of box answers that have a confidence, by pycocotools (COCO's own code)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cloc_mllm.box import Box
from cloc_mllm.evaluation.rows.rows import ScoredPair
from cloc_mllm.evaluation.scores.boxes import is_failure

RULE = (
    "Average precision over all answers pooled and ordered by confidence (COCO's 101 points; ap: "
    "mean over IoU 0.5 to 0.95, ap_50 and ap_75: at one). Each query is an image of its own with "
    "one class, so an answer can match only boxes of its own query, and every true box is one to "
    "find: with one answer per query, recall and so ap are below 1 where a query has several."
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
    annotations = [
        {"id": k, "iscrowd": 0, **_located(i, box)} for k, (i, box) in enumerate(truths, start=1)
    ]
    detections = [
        {"score": pairs[i].prediction.confidence, **_located(i, pairs[i].prediction.boxes[0])}
        for i in answered
    ]
    ap, ap_50, ap_75 = map(float, _coco_stats(len(pairs), annotations, detections)[:3])
    return AveragePrecision(ap, ap_50, ap_75, len(truths))


def _located(query: int, box: Box) -> dict[str, Any]:
    left, top, right, bottom = (value * _SIDE for value in box)
    width, height = max(right - left, 0.0), max(bottom - top, 0.0)
    bbox = [left, top, width, height]
    return {"image_id": query + 1, "category_id": 1, "bbox": bbox, "area": width * height}


def _coco_stats(
    num_queries: int, annotations: list[dict[str, Any]], detections: list[dict[str, Any]]
) -> Sequence[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i + 1} for i in range(num_queries)],
            "categories": [{"id": 1, "name": "phrase"}],
            "annotations": annotations,
        }
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(detections), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats
