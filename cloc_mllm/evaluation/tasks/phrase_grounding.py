"""One query per marked phrase of a caption whose chain has a box, so a phrase that stands twice is
asked twice, each time against the boxes of its own chain (Flickr30k Entities, Plummer et al. 2015).
r_at_k: share of phrases for which one of the first k boxes has IoU >= 0.5 with any box of the
chain; merged_r_at_k: with the box around all boxes of the chain. After the slash: phrases of that
type; a phrase of two types counts in both. r_at_5 and r_at_10 are left out where no answer has two
boxes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cloc_mllm.evaluation.queries import Query, QueryPair, QuerySet, pair
from cloc_mllm.evaluation.rows.rows import ReferenceRow, ScoredPair
from cloc_mllm.evaluation.scores import boxes
from cloc_mllm.evaluation.stats.bootstrap import QueryScores
from cloc_mllm.evaluation.stats.overlap import paired_iou
from cloc_mllm.evaluation.tasks import EvalData, Scorer, Task
from cloc_mllm.evaluation.words import clean_text

TASK = "phrase_grounding"
RECALL_AT = (1, 5, 10)


def score(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    """`boxes` of a prediction: best first; of a reference: all of the chain."""
    image_ids = [pair.reference.image_id for pair in pairs]
    types = [pair.reference.kind.split("/") for pair in pairs]
    several = any(len(pair.prediction.boxes) > 1 for pair in pairs)
    hits: dict[str, np.ndarray] = {}
    for prefix in ("", "merged_"):
        rank = np.array([_first_hit(pair, merged=bool(prefix)) for pair in pairs])
        for k in RECALL_AT if several else RECALL_AT[:1]:
            hits[f"{prefix}r_at_{k}"] = (rank < k).astype(float)
    scores = {name: QueryScores(values, image_ids) for name, values in hits.items()}
    for kind in sorted({kind for kinds in types for kind in kinds} - {""}):
        chosen = [i for i, kinds in enumerate(types) if kind in kinds]
        images = [image_ids[i] for i in chosen]
        for name in ("r_at_1", "merged_r_at_1"):
            scores[f"{name}/{kind}"] = QueryScores(hits[name][chosen], images)
    return scores


def _first_hit(pair: ScoredPair, *, merged: bool) -> float:
    """Rank (from 0) of the first box that hits a box of the chain, or the box around all of them;
    infinite if none does."""
    if boxes.is_failure(pair):
        return np.inf
    truths, answers = np.array(pair.reference.boxes), pair.prediction.boxes[: RECALL_AT[-1]]
    if merged:
        truths = np.hstack([truths[:, :2].min(0), truths[:, 2:].max(0)])[None]
    iou = paired_iou(np.repeat(answers, len(truths), 0), np.tile(truths, (len(answers), 1)))
    best = iou.reshape(len(answers), len(truths)).max(1)
    return next((rank for rank, value in enumerate(best) if value >= 0.5), np.inf)


def chance(references: Sequence[ReferenceRow]) -> dict[str, float]:
    """The chance level: a true box of a random other image, see `boxes.chance`."""
    values = boxes.chance(references)
    return {"r_at_1": values["acc_at_0_5"]} if values else {}


def whole_image(references: Sequence[ReferenceRow]) -> dict[str, float]:
    return {"r_at_1": boxes.whole_image(references)["acc_at_0_5"]}


SCORERS = {
    TASK: Scorer(
        "Phrase grounding (Flickr30k Entities)",
        __doc__,
        "r_at_1",
        score,
        chance=chance,
        whole_image=whole_image,
        is_failure=boxes.is_failure,
        example_metric="r_at_1",
    )
}


@dataclass
class PhraseGrounding(Task):
    """CLOC ranks boxes for each marked phrase of Flickr30k Entities.

    Args:
        annotations: the folder or zip of Flickr30k Entities that the records were built from.
    """

    annotations: str = ""

    def query_sets(self, data: EvalData) -> list[QuerySet]:
        """
        Raises:
            ValueError: there are no annotations, or they are no Flickr30k Entities.
        """
        if not self.annotations or self.annotations.endswith(".json"):
            raise ValueError(
                "phrase_grounding needs annotations: the folder or zip of Flickr30k Entities "
                f"that the records were built from, got {self.annotations or 'nothing'!r}"
            )
        not_asked: Counter[str] = Counter()
        pairs = list(phrase_pairs(self.annotations, data.index.image_ids, not_asked))
        notes = {"not_asked": dict(not_asked)}
        return [data.index.query_set(TASK, "ranked_boxes", "cloc", pairs, notes=notes)]


def phrase_pairs(
    annotations: str | Path, image_ids: Sequence[str], not_asked: Counter[str]
) -> Iterator[QueryPair]:
    """A query per mention; the reference's kind is its types, parted by a slash.

    Args:
        not_asked: gets what is no question, by reason, see `read_mentions`.
    """
    from cloc_mllm.data.readers.flickr30k_entities import read_mentions

    counts: Counter[str] = Counter()
    for mention in read_mentions(annotations, image_ids, not_asked):
        row_id = f"{TASK}/{mention.photo_id}/{mention.sentence}/{counts[mention.photo_id]}"
        counts[mention.photo_id] += 1
        text = clean_text(mention.text)
        yield pair(
            Query(row_id, mention.photo_id, TASK, text),
            boxes=mention.boxes,
            labels=[text],
            kind="/".join(mention.types),
        )
