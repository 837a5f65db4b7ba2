"""Every true box is classified against all class names. macro_acc: mean over the classes that occur
of the share of their boxes named right (mAcc of the paper); micro_acc and top5_acc: share of all
boxes."""

from __future__ import annotations

from dataclasses import dataclass

from cloc_mllm.evaluation.queries import Candidates, QuerySet
from cloc_mllm.evaluation.scores import classification
from cloc_mllm.evaluation.tasks import EvalData, Scorer, Task

TASK = "region_classification"
SCORERS = {
    TASK: Scorer(
        "Region classification",
        __doc__,
        "macro_acc",
        classification.score,
        truth=("labels",),
        chance=classification.chance,
        example_metric="micro_acc",
        drawn="asked",
    )
}


@dataclass
class RegionClassification(Task):
    """CLOC names each region from the categories of the records."""

    def query_sets(self, data: EvalData) -> list[QuerySet]:
        names = data.index.class_names
        pairs = data.index.region_pairs(
            TASK,
            lambda region: [region.category] if region.category else [],
            num_candidates=len(names),
        )
        candidates = Candidates("texts", names)
        return [data.index.query_set(TASK, "label", "cloc", pairs, candidates=candidates)]
