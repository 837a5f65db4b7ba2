"""Details of the accuracy of a box task: curves, breakdowns and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cloc_mllm.evaluation.rows.rows import ScoredPair
from cloc_mllm.evaluation.scores.boxes import answer_iou
from cloc_mllm.evaluation.stats import breakdown, calibration
from cloc_mllm.evaluation.stats.bootstrap import DEFAULT, Bootstrap
from cloc_mllm.evaluation.stats.breakdown import GroupShare
from cloc_mllm.evaluation.stats.calibration import Calibration

CURVE_THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))


@dataclass(frozen=True)
class BoxDetails:
    """Details of a box task: where answers are right, and whether the model knows it.

    Args:
        iou_curve: accuracy at each of `CURVE_THRESHOLDS`.
        breakdowns: breakdown -> group -> Acc@0.5 of its queries.
        rules: how queries are grouped, and how calibration is measured.
    """

    iou_curve: list[float]
    breakdowns: dict[str, dict[str, GroupShare]]
    calibration: Calibration | None
    rules: dict[str, str]

    @property
    def has_noun_only(self) -> bool:
        return any(
            share.noun_only is not None for share in self.breakdowns.get("kind", {}).values()
        )


def box_details(pairs: Sequence[ScoredPair], bootstrap: Bootstrap = DEFAULT) -> BoxDetails:
    """The details of one task whose answers are boxes; every reference has a box."""
    iou = answer_iou(pairs)
    right = (iou >= 0.5).astype(float)
    references = [pair.reference for pair in pairs]
    return BoxDetails(
        iou_curve=[float((iou >= threshold).mean()) for threshold in CURVE_THRESHOLDS],
        breakdowns=breakdown.breakdowns(references, right, bootstrap),
        calibration=calibration.calibration(
            [pair.prediction.confidence for pair in pairs],
            right,
            [row.image_id for row in references],
            bootstrap,
        ),
        rules={**breakdown.RULES, "calibration": calibration.RULE},
    )
