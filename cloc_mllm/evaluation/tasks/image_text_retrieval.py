"""r_at_k: share of queries with a right candidate among the first k. Equal captions (after
lower-casing) are one candidate. Whatever carries one of the query's captions counts as right: any
image with that caption, any caption of that image. A caption is asked once for each image it occurs
on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cloc_mllm.evaluation.queries import Candidates, Query, QueryPair, QuerySet, pair
from cloc_mllm.evaluation.scores import retrieval
from cloc_mllm.evaluation.tasks import EvalData, Scorer, Task

if TYPE_CHECKING:
    from cloc_mllm.evaluation.record_index import RecordIndex

TO_TEXT, TO_IMAGE = "image_to_text", "text_to_image"
SCORERS = {
    TO_TEXT: Scorer(
        "Image → text retrieval",
        __doc__,
        "r_at_1",
        retrieval.score,
        truth=("labels",),
        chance=retrieval.chance,
        example_metric="r_at_1",
        drawn="nothing",
    ),
    TO_IMAGE: Scorer(
        "Text → image retrieval",
        __doc__,
        "r_at_1",
        retrieval.score,
        truth=("labels",),
        chance=retrieval.chance,
    ),
}


@dataclass
class ImageTextRetrieval(Task):
    """CLOC ranks all captions for each image, and all images for each caption."""

    def query_sets(self, data: EvalData) -> list[QuerySet]:
        index = data.index
        texts = Candidates("texts", index.distinct_captions)
        images = Candidates("images", index.image_ids)
        return [
            index.query_set(TO_TEXT, "label", "cloc", _to_text(index), candidates=texts),
            index.query_set(TO_IMAGE, "label", "cloc", _to_image(index), candidates=images),
        ]


def _to_text(index: RecordIndex) -> Iterator[QueryPair]:
    for image_id, captions in index.captions.items():
        if captions:
            yield pair(
                Query(f"{TO_TEXT}/{image_id}/0", image_id, TO_TEXT),
                labels=captions,
                num_candidates=len(index.distinct_captions),
            )


def _to_image(index: RecordIndex) -> Iterator[QueryPair]:
    images_with: dict[str, list[str]] = {}
    for image_id, captions in index.captions.items():
        for caption in captions:
            images_with.setdefault(caption, []).append(image_id)
    for image_id, captions in index.captions.items():
        for number, caption in enumerate(captions):
            yield pair(
                Query(f"{TO_IMAGE}/{image_id}/{number}", image_id, TO_IMAGE, caption),
                labels=images_with[caption],
                num_candidates=len(index.captions),
            )
