"""Phrases of built-in scenes, half of them of things that are not there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cloc_mllm.data.conversations import PROMPTS
from cloc_mllm.data.records import Record
from cloc_mllm.data.scenes import CONCEPTS, Split, generate_scenes
from cloc_mllm.evaluation.benchmarks.questions import Question, QuestionSet
from cloc_mllm.evaluation.binary import best_threshold
from cloc_mllm.evaluation.predictions import Box, PredictionRow, ReferenceRow
from cloc_mllm.evaluation.rejection import ABSENT, PRESENT
from cloc_mllm.inference.cloc_predictor import ClocPredictor

TASK = "rejection"


@dataclass(frozen=True)
class Phrase:
    """A phrase and where it is in its scene; no box if it is not there.

    `kind` is `concept` (a name) or `expression` (a referring expression; an absent one is true of
    another scene, and its thing is of no kind that is here).
    """

    id: str
    image_id: str
    text: str
    kind: str
    boxes: tuple[Box, ...] = ()


def rejection_phrases(
    num_scenes: int, *, split: Split = "test", seed: int = 0
) -> tuple[list[Record], list[Phrase]]:
    """Scenes and, of each, as many present as absent phrases of a kind (a scene may lack one)."""
    scenes = list(generate_scenes(num_scenes + 1, split=split, seed=seed))
    phrases: list[Phrase] = []
    for index, scene in enumerate(scenes[:-1]):
        rng = np.random.default_rng([seed, index])
        phrases += _concepts(scene, rng)
        phrases += _expressions(scene, scenes[index + 1], rng)
    return scenes[:-1], phrases


def rejection_questions(records: list[Record], phrases: Sequence[Phrase]) -> QuestionSet:
    """Where is each phrase? The question does not say that it may not be there."""
    return QuestionSet(
        f"Rejection on {len(records)} built-in scenes",
        records,
        [
            Question(
                phrase.id,
                phrase.image_id,
                TASK,
                PROMPTS["ground"].format(phrase=phrase.text),
                expects="box",
            )
            for phrase in phrases
        ],
        [
            ReferenceRow(
                phrase.id,
                phrase.image_id,
                TASK,
                boxes=list(phrase.boxes),
                labels=[PRESENT if phrase.boxes else ABSENT],
                kind=phrase.kind,
            )
            for phrase in phrases
        ],
        len(phrases),
    )


def cloc_rejects(
    predictor: ClocPredictor,
    records: Sequence[Record],
    phrases: Sequence[Phrase],
    threshold: float,
    model: str,
) -> list[PredictionRow]:
    """CLOC's box of each phrase; `absent` if phrase and box agree by less than `threshold`."""
    settings = {"confidence": "cosine of phrase and its box", "threshold": threshold}
    return [
        PredictionRow(
            phrase.id,
            phrase.image_id,
            TASK,
            phrase.text,
            boxes=[box],
            confidence=confidence,
            labels=[ABSENT if confidence < threshold else PRESENT],
            model=model,
            settings=settings,
        )
        for phrase, box, confidence in _located(predictor, records, phrases)
    ]


def cloc_threshold(predictor: ClocPredictor, num_scenes: int, seed: int = 0) -> float:
    """The best threshold on validation scenes, which no reported number sees."""
    records, phrases = rejection_phrases(num_scenes, split="validation", seed=seed)
    located = list(_located(predictor, records, phrases))
    confidences = np.array([confidence for _, _, confidence in located])
    return best_threshold(confidences, np.array([bool(phrase.boxes) for phrase, _, _ in located]))


def _concepts(scene: Record, rng: np.random.Generator) -> Iterator[Phrase]:
    """A name that is here, with all boxes of its kind, and one that is not."""
    here = sorted({region.category for region in scene.regions})
    elsewhere = sorted(set(CONCEPTS) - set(here))
    if not here:
        return
    name = here[rng.integers(len(here))]
    boxes = tuple(region.box for region in scene.regions if region.category == name)
    yield Phrase(f"{TASK}/{scene.id}/concept/{PRESENT}", scene.id, name, "concept", boxes)
    name = elsewhere[rng.integers(len(elsewhere))]
    yield Phrase(f"{TASK}/{scene.id}/concept/{ABSENT}", scene.id, name, "concept")


def _expressions(scene: Record, other: Record, rng: np.random.Generator) -> Iterator[Phrase]:
    here = {region.category for region in scene.regions}
    true = [(text, r.box) for r in scene.regions for text in r.expressions]
    false = [text for r in other.regions if r.category not in here for text in r.expressions]
    if not true or not false:
        return
    text, box = true[rng.integers(len(true))]
    yield Phrase(f"{TASK}/{scene.id}/expression/{PRESENT}", scene.id, text, "expression", (box,))
    text = false[rng.integers(len(false))]
    yield Phrase(f"{TASK}/{scene.id}/expression/{ABSENT}", scene.id, text, "expression")


def _located(
    predictor: ClocPredictor, records: Sequence[Record], phrases: Sequence[Phrase]
) -> Iterator[tuple[Phrase, Box, float]]:
    of_image: dict[str, list[Phrase]] = {record.id: [] for record in records}
    for phrase in phrases:
        of_image[phrase.image_id].append(phrase)
    for record in records:
        asked = of_image[record.id]
        if not asked:
            continue
        found = predictor.locate(record.load_image(), [phrase.text for phrase in asked])
        for phrase, box, confidence in zip(
            asked, found.boxes.xyxy.tolist(), found.scores.tolist(), strict=True
        ):
            x1, y1, x2, y2 = box
            yield phrase, (x1, y1, x2, y2), confidence
