"""What stands behind the accuracy of a box task: curves, breakdowns and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cloc_mllm.evaluation import breakdown, calibration
from cloc_mllm.evaluation.grounding import answer_iou
from cloc_mllm.evaluation.predictions import ScoredPair

CURVE_THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))


def box_details(
    pairs: Sequence[ScoredPair], *, samples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """`iou_curve`, `breakdowns` and `calibration` of one task whose answers are boxes.

    Args:
        pairs: all of one task; every reference has a box.
    """
    iou = answer_iou(pairs)
    right = (iou >= 0.5).astype(float)
    references = [pair.reference for pair in pairs]
    return {
        "iou_curve": [
            {"iou": threshold, "accuracy": float((iou >= threshold).mean())}
            for threshold in CURVE_THRESHOLDS
        ],
        "breakdowns": breakdown.breakdowns(references, right, samples=samples, seed=seed),
        "calibration": calibration.calibration(
            [pair.prediction.confidence for pair in pairs],
            right,
            [row.image_id for row in references],
            samples=samples,
            seed=seed,
        ),
        "rules": {**breakdown.RULES, "calibration": calibration.RULE},
    }


def asks_for_a_box(metrics: Sequence[str], pairs: Sequence[ScoredPair]) -> bool:
    """Whether a task's answers are boxes: it is scored by IoU and every reference has a box."""
    return "acc_at_0_5" in metrics and all(pair.reference.boxes for pair in pairs)
