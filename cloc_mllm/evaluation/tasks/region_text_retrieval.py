"""r_at_k: share of queries with a right candidate among the first k. Equal texts (after
lower-casing) are one candidate, equal boxes of an image are one region. Whatever carries one of the
query's texts counts as right: any region with that text, any text of that region. Text queries are
asked once for each image they occur on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cloc_mllm.evaluation.queries import Candidates, Query, QueryPair, QuerySet, pair
from cloc_mllm.evaluation.scores import retrieval
from cloc_mllm.evaluation.tasks import EvalData, Scorer, Task

if TYPE_CHECKING:
    from cloc_mllm.evaluation.record_index import RecordIndex

TO_TEXT, TO_REGION = "region_to_text", "text_to_region"
SCORERS = {
    TO_TEXT: Scorer(
        "Region → text retrieval",
        __doc__,
        "r_at_10",
        retrieval.score,
        truth=("labels",),
        chance=retrieval.chance,
        example_metric="r_at_1",
        drawn="asked",
    ),
    TO_REGION: Scorer(
        "Text → region retrieval",
        __doc__,
        "r_at_10",
        retrieval.score,
        truth=("labels",),
        chance=retrieval.chance,
    ),
}


@dataclass
class RegionTextRetrieval(Task):
    """CLOC ranks all phrases for each region, and all regions for each phrase."""

    def query_sets(self, data: EvalData) -> list[QuerySet]:
        index = data.index
        texts = Candidates("texts", index.phrases)
        regions = Candidates("regions", [region.id for region in index.regions], index.regions)
        to_text = index.region_pairs(
            TO_TEXT, lambda region: region.phrases, num_candidates=len(index.phrases)
        )
        return [
            index.query_set(TO_TEXT, "label", "cloc", to_text, candidates=texts),
            index.query_set(TO_REGION, "label", "cloc", _to_region(index), candidates=regions),
        ]


def _to_region(index: RecordIndex) -> Iterator[QueryPair]:
    everywhere: dict[str, list[str]] = {}
    for region in index.regions:
        for phrase in region.phrases:
            everywhere.setdefault(phrase, []).append(region.id)
    for number, ((image_id, phrase), regions) in enumerate(index.regions_by_phrase.items()):
        yield pair(
            Query(f"{TO_REGION}/{image_id}/{number}", image_id, TO_REGION, phrase),
            boxes=[region.box for region in regions],
            labels=everywhere[phrase],
            num_candidates=len(index.regions),
        )
