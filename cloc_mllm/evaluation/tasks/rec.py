"""One query per expression and region, answered with one box; where a phrase names several boxes
together, any of them counts. Built-in scenes are asked one expression of each kind per region. The
first box of the answer counts, read in the model's declared format; an answer that does not parse
is wrong and counted. acc_at_t: share of queries with IoU >= t; after the slash, by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cloc_mllm.evaluation.queries import Query, QueryPair, QuerySet, pair
from cloc_mllm.evaluation.rows.rows import ScoredPair
from cloc_mllm.evaluation.scores import boxes
from cloc_mllm.evaluation.stats.bootstrap import QueryScores
from cloc_mllm.evaluation.tasks import EvalData, Scorer, Task

if TYPE_CHECKING:
    from cloc_mllm.evaluation.record_index import RecordIndex

TASK = "rec"
THRESHOLDS = {"acc_at_0_5": 0.5, "acc_at_0_7": 0.7, "acc_at_0_9": 0.9}


def score(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    """Acc at three thresholds, mean IoU, and if there are several kinds, `acc_at_0_5/KIND`."""
    image_ids = np.array([pair.reference.image_id for pair in pairs])
    iou = boxes.answer_iou(pairs)
    scores = {
        name: QueryScores((iou >= threshold).astype(float), list(image_ids))
        for name, threshold in THRESHOLDS.items()
    }
    scores["mean_iou"] = QueryScores(iou, list(image_ids))
    kinds = np.array([pair.reference.kind for pair in pairs])
    names = np.unique(kinds)
    for kind in names if len(names) > 1 else []:
        chosen = kinds == kind
        right = (iou[chosen] >= 0.5).astype(float)
        scores[f"acc_at_0_5/{kind}"] = QueryScores(right, list(image_ids[chosen]))
    return scores


SCORERS = {
    TASK: Scorer(
        "Referring expression comprehension (MLLM)",
        __doc__,
        "acc_at_0_5",
        score,
        truth=("boxes",),
        chance=boxes.chance,
        whole_image=boxes.whole_image,
        is_failure=boxes.is_failure,
        one_box=True,
        example_metric="mean_iou",
    )
}


@dataclass
class Rec(Task):
    """The MLLM places each referring expression of the records."""

    def query_sets(self, data: EvalData) -> list[QuerySet]:
        return [data.index.query_set(TASK, "box", "mllm", rec_pairs(data.index))]


def rec_pairs(index: RecordIndex) -> Iterator[QueryPair]:
    """A query per expression, numbered within its image."""
    counts: Counter[str] = Counter()
    for expression in index.expressions:
        image_id = expression.image_id
        query = Query(f"{TASK}/{image_id}/{counts[image_id]}", image_id, TASK, expression.text)
        counts[image_id] += 1
        yield pair(query, boxes=expression.boxes, labels=[expression.text], kind=expression.kind)
