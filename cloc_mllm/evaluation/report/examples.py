"""Drawn examples of a report: which are shown, and what is said of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from cloc_mllm.box import Box
from cloc_mllm.data.drawing import Rgb, draw_regions
from cloc_mllm.evaluation.rows.rows import PredictionRow, ScoredPair
from cloc_mllm.evaluation.scores.boxes import answer_iou
from cloc_mllm.evaluation.tasks import Scorer
from cloc_mllm.geometry import Boxes
from cloc_mllm.pages import image_source

TRUE_COLOR: Rgb = (26, 152, 80)
ANSWER_COLOR: Rgb = (214, 0, 120)
IMAGE_SIDE_PX = 208  # about as wide as a card, so that outlines stay sharp
_SENTENCE_CHARACTERS = 40

Facts = list[tuple[str, str]]
Legend = list[tuple[Rgb, str]]


class Example(NamedTuple):
    """A picture with its query, the answers and the truth.

    Attributes:
        image: `src` of the picture; "" if it is not available.
        more: facts to be unfolded: boxes in the original image's frame, 0..1, and where to find the
            query in the files.
    """

    query_id: str
    image: str
    alt: str
    facts: Facts
    more: Facts


def choose_examples(
    scores: np.ndarray, num_examples: int, seed: int, confidence: np.ndarray | None = None
) -> dict[str, list[int]]:
    """Picks the best, the worst, the surprising and random others; ties are in random order.

    None is shown twice; if there are few queries, each group gets at most a third. Surprising are
    wrong answers (score < 0.5) of the highest confidence and right ones of the lowest.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(scores))
    surprises: dict[str, list[int]] = {}
    if confidence is not None and np.isfinite(confidence).any():
        known = shuffled[np.isfinite(confidence[shuffled])]
        known = known[np.argsort(-confidence[known], kind="stable")]
        count = min(num_examples, len(scores) // 6)
        surprises = {
            "Surprising: confident and wrong": known[scores[known] < 0.5][:count].tolist(),
            "Surprising: unsure and right": known[scores[known] >= 0.5][::-1][:count].tolist(),
        }
    shown = [index for group in surprises.values() for index in group]
    shuffled = shuffled[~np.isin(shuffled, shown)]
    order = shuffled[np.argsort(-scores[shuffled], kind="stable")]
    count = min(num_examples, len(order) // 3 or 1)
    best, rest = order[:count], order[count:]
    worst, middle = rest[::-1][:count], rest[: max(0, len(rest) - count)]
    chosen = rng.permutation(middle)[:num_examples].tolist()
    groups = {"Best": best.tolist(), "Worst": worst.tolist()}
    return {**groups, **surprises, "Random others": chosen}


def confidences(pairs: Sequence[ScoredPair]) -> np.ndarray:
    """float[Q]: the answer's confidence, or the score of its first label; NaN if it has neither."""
    answers = [pair.prediction for pair in pairs]
    known = [
        row.scores[0] if row.confidence is None and row.scores else row.confidence
        for row in answers
    ]
    return np.array([np.nan if value is None else value for value in known], dtype=float)


def legend(scorer: Scorer) -> Legend:
    """Colours of the boxes that are drawn."""
    if scorer.drawn == "nothing":
        return []
    if scorer.drawn == "asked":
        return [(TRUE_COLOR, "the box asked about")]
    return [(TRUE_COLOR, "true box"), (ANSWER_COLOR, "answer")]


def make_example(scorer: Scorer, pair: ScoredPair, image: Image.Image) -> Example:
    reference = pair.reference
    more = [("query", reference.id), ("image", reference.image_id)]
    if reference.kind:
        more.append(("kind", reference.kind))
    more += box_facts("true box", reference.boxes)
    more += box_facts("answered box", pair.prediction.boxes)
    return Example(
        reference.id,
        draw_answers(image, reference.boxes, [("answer", pair.prediction, ANSWER_COLOR)]),
        f"{reference.task} example on image {reference.image_id}",
        _facts(scorer, pair),
        more,
    )


def box_facts(name: str, boxes: Sequence[Box]) -> Facts:
    """The first four boxes in numbers."""
    return [(name, ", ".join(f"{value:.3f}" for value in box)) for box in boxes[:4]]


def draw_answers(
    image: Image.Image, true_boxes: Sequence[Box], answers: Sequence[tuple[str, PredictionRow, Rgb]]
) -> str:
    """Draws the image (long side 208 px) with the true boxes and each answer's box and name."""
    drawn = [(box, "", TRUE_COLOR) for box in true_boxes]
    for name, row, color in answers:
        drawn += [(box, name, color) for box in row.boxes[:1] if not row.failure]
    return image_source(
        draw_regions(
            image,
            Boxes.normalized([box for box, _, _ in drawn]),
            [name for _, name, _ in drawn],
            colors=[color for _, _, color in drawn],
            long_side=IMAGE_SIDE_PX,
        )
    )


def _facts(scorer: Scorer, pair: ScoredPair) -> Facts:
    prediction, reference = pair.prediction, pair.reference
    facts = []
    if scorer.drawn == "answer" and reference.boxes:
        facts += [("asked", prediction.prompt), ("IoU", f"{answer_iou([pair])[0]:.2f}")]
    else:
        if prediction.raw_text:  # a question in words
            facts.append(("asked", prediction.prompt))
        facts.append(("true", _shown(reference.labels)))
    if prediction.raw_text:
        facts.append(("answer", prediction.raw_text))
    if prediction.labels:
        facts.append(("answer", _shown(prediction.labels)))
    if prediction.confidence is not None:
        facts.append(("confidence", f"{prediction.confidence:.2f}"))
    if prediction.failure:
        facts.append(("failure", prediction.failure))
    return facts


def _shown(labels: Sequence[str]) -> str:
    """The first three, or the first alone if they are sentences."""
    if not labels:
        return "nothing"
    return " · ".join(labels[:3] if len(labels[0]) < _SENTENCE_CHARACTERS else labels[:1])
