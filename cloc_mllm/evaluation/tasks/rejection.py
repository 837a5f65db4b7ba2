"""Not in the image: does a model refuse to place what is not there? Half of the phrases name a
thing of the image, half one that is not there. A model refuses by its label (CLOC: confidence under
a threshold) or in words (a text without a box that holds no, not, none, nothing, n't, cannot,
absent or missing); a box is no refusal; any other text is wrong and counted. precision, recall, f1:
of refusing. right: refused what is absent, or placed what is present with IoU >= 0.5. auroc: how
well the confidence alone tells present from absent (50 % is chance). After the slash, by kind of
phrase."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from cloc_mllm.box import Box
from cloc_mllm.evaluation.queries import (
    ABSENT,
    PRESENT,
    Coverage,
    Query,
    QueryPair,
    QuerySet,
    pair,
)
from cloc_mllm.evaluation.rows.rows import ScoredPair
from cloc_mllm.evaluation.scores import boxes
from cloc_mllm.evaluation.scores.binary import auroc, binary_scores
from cloc_mllm.evaluation.scores.by_kind import with_kinds
from cloc_mllm.evaluation.stats.bootstrap import QueryScores
from cloc_mllm.evaluation.tasks import EvalData, Scorer, Task
from cloc_mllm.evaluation.words import english_words

if TYPE_CHECKING:
    from cloc_mllm.data.records import Record

TASK = "rejection"
_DENIALS = frozenset(("no", "not", "none", "nothing", "cannot", "absent", "missing"))


def refuses(text: str) -> bool:
    """Whether a text without a box says that the thing is not there, by the declared words."""
    return not _DENIALS.isdisjoint(english_words(text))


def score(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    return with_kinds(pairs, _scores)


def is_failure(pair: ScoredPair) -> bool:
    """Neither a box nor a refusal."""
    return _decision(pair) is None


def _decision(pair: ScoredPair) -> str | None:
    prediction = pair.prediction
    if prediction.labels:
        return prediction.labels[0]
    if prediction.boxes and prediction.failure is None:
        return PRESENT
    return ABSENT if refuses(prediction.raw_text) else None


def _scores(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    image_ids = [pair.reference.image_id for pair in pairs]
    decisions = np.array([_decision(pair) or "" for pair in pairs])
    absent = np.array([pair.reference.labels[0] == ABSENT for pair in pairs])
    placed = np.zeros(len(pairs), dtype=bool)
    if not absent.all():
        present = [pair for pair in pairs if pair.reference.labels[0] == PRESENT]
        placed[~absent] = boxes.answer_iou(present) >= 0.5
    right = np.where(absent, decisions == ABSENT, (decisions == PRESENT) & placed)
    confidences = np.array(
        [-np.inf if p.prediction.confidence is None else p.prediction.confidence for p in pairs]
    )
    area = auroc(confidences, ~absent, image_ids)
    return {
        **binary_scores(decisions == ABSENT, absent, image_ids),
        "right": QueryScores(right.astype(float), image_ids),
        "refusal_rate": QueryScores((decisions == ABSENT).astype(float), image_ids),
        **({"auroc": area} if area else {}),
    }


SCORERS = {TASK: Scorer("Not in the image", __doc__, "right", score, is_failure=is_failure)}


@dataclass
class Rejection(Task):
    """Phrases of built-in scenes, half of them absent.

    Args:
        by: who answers.
        num_scenes: of the built-in test data.
        threshold: CLOC refuses where the cosine of a phrase and its box is below it; by default it
            is the best one on validation scenes, which no reported number sees.
    """

    by: Literal["mllm", "cloc"] = "mllm"
    num_scenes: int = 200
    threshold: float | None = None

    reads_records = False

    def query_sets(self, data: EvalData) -> list[QuerySet]:
        asked = phrases_of_scenes(self.by, self.num_scenes)
        asked.threshold = self.threshold
        if self.by == "cloc" and self.threshold is None:
            asked.calibration = phrases_of_scenes("cloc", self.num_scenes, split="validation")
        return [asked]


def phrases_of_scenes(
    by: Literal["mllm", "cloc"],
    num_scenes: int,
    *,
    split: Literal["validation", "test"] = "test",
    seed: int = 0,
) -> QuerySet:
    """Scenes with as many present as absent phrases of a kind (a scene may lack one).

    The kind is `concept` (a name) or `expression` (a referring expression; an absent one is true of
    another scene, and its thing is of no kind that is here). The MLLM is not told that a thing may
    be absent.
    """
    from cloc_mllm.data.scenes import generate_scenes

    scenes = list(generate_scenes(num_scenes + 1, split=split, seed=seed))
    pairs: list[QueryPair] = []
    for index, scene in enumerate(scenes[:-1]):
        rng = np.random.default_rng([seed, index])
        pairs += _concepts(scene, rng)
        pairs += _expressions(scene, scenes[index + 1], rng)
    return QuerySet(
        TASK,
        "box_or_refusal",
        by,
        scenes[:-1],
        pairs,
        coverage=Coverage(f"Rejection on {num_scenes} built-in scenes", len(pairs)),
    )


def _phrase(scene: Record, kind: str, text: str, true_boxes: Sequence[Box] = ()) -> QueryPair:
    """A phrase of a scene and where it is; without a box it is not there."""
    answer = PRESENT if true_boxes else ABSENT
    query = Query(f"{TASK}/{scene.id}/{kind}/{answer}", scene.id, TASK, text)
    return pair(query, boxes=list(true_boxes), labels=[answer], kind=kind)


def _concepts(scene: Record, rng: np.random.Generator) -> Iterator[QueryPair]:
    """A name that is here, with all boxes of its kind, and one that is not."""
    from cloc_mllm.data.scenes import CONCEPTS

    here = sorted({region.category for region in scene.regions})
    elsewhere = sorted(set(CONCEPTS) - set(here))
    if not here:
        return
    name = here[rng.integers(len(here))]
    true_boxes = [region.box for region in scene.regions if region.category == name]
    yield _phrase(scene, "concept", name, true_boxes)
    yield _phrase(scene, "concept", elsewhere[rng.integers(len(elsewhere))])


def _expressions(scene: Record, other: Record, rng: np.random.Generator) -> Iterator[QueryPair]:
    here = {region.category for region in scene.regions}
    true = [(text, r.box) for r in scene.regions for text in r.expressions]
    false = [text for r in other.regions if r.category not in here for text in r.expressions]
    if not true or not false:
        return
    text, box = true[rng.integers(len(true))]
    yield _phrase(scene, "expression", text, [box])
    yield _phrase(scene, "expression", false[rng.integers(len(false))])
