"""The three ways to answer a box, on one shape of language model: how long each takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image

from cloc_mllm.bench.generation import LOCATION_TOKENS, random_predictor
from cloc_mllm.inference.grounding_predictor import GroundedAnswer, GroundingPredictor
from cloc_mllm.mllm.coordinates import BoxFormat

FORMATS = {
    "integers as text": BoxFormat("integers"),
    "location tokens": LOCATION_TOKENS,
    "box head": BoxFormat("location_tokens", 100, head=True),
}
_PHRASES = ("the smaller crab", "a red apple", "the second boat from the left", "the clock")

Side = Callable[[], list[GroundedAnswer]]


def predictors(num_layers: int) -> dict[str, GroundingPredictor]:
    """Random weights, the same shape for each format (see `random_predictor`); answers end with the
    box."""
    made = {name: random_predictor(num_layers, form) for name, form in FORMATS.items()}
    for predictor in made.values():
        generation = predictor.model.generation_config
        assert generation is not None
        generation.eos_token_id = predictor.processor.tokenizer.eos_token_id
    return made


def ground(predictor: GroundingPredictor, num_questions: int) -> Side:
    """`num_questions` about one picture in one call, each answered by one box."""
    picture = Image.new("RGB", (640, 480), "teal")
    phrases = (_PHRASES * num_questions)[:num_questions]
    return lambda: predictor.ground(picture, phrases)


def check_boxes(answers: Sequence[GroundedAnswer]) -> None:
    """Raise an AssertionError that shows the first answer that is no box. A random head's box may
    have no area; a written one always has."""
    for answer in answers:
        assert answer.failure in (None, "zero_area"), answer
