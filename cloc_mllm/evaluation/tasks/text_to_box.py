"""One query per image and phrase, answered with one box; its IoU is the best over the true boxes of
that phrase in that image (any-box protocol). acc_at_0_5: share of queries with IoU >= 0.5."""

from __future__ import annotations

from dataclasses import dataclass

from cloc_mllm.evaluation.queries import Query, QuerySet, pair
from cloc_mllm.evaluation.scores import boxes
from cloc_mllm.evaluation.tasks import EvalData, Scorer, Task

TASK = "text_to_box"
SCORERS = {
    TASK: Scorer(
        "Text → box (CLOC's box head)",
        __doc__,
        "acc_at_0_5",
        boxes.score,
        truth=("boxes",),
        chance=boxes.chance,
        whole_image=boxes.whole_image,
        is_failure=boxes.is_failure,
        one_box=True,
        example_metric="mean_iou",
    )
}


@dataclass
class TextToBox(Task):
    """CLOC places each phrase of each image with its own text prompt and box head."""

    def query_sets(self, data: EvalData) -> list[QuerySet]:
        index = data.index
        pairs = (
            pair(
                Query(f"{TASK}/{image_id}/{number}", image_id, TASK, phrase),
                boxes=[region.box for region in regions],
                labels=[phrase],
            )
            for number, ((image_id, phrase), regions) in enumerate(index.regions_by_phrase.items())
        )
        return [index.query_set(TASK, "box", "cloc", pairs)]
