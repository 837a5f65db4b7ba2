"""The three ways to answer a box, on one shape of language model: how long each takes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from PIL import Image

from cloc_mllm.bench.generation import LOCATION_TOKENS, random_predictor
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.inference.results import Answer
from cloc_mllm.mllm.coordinates import BoxFormat

FORMATS = {
    "integers as text": BoxFormat("integers"),
    "location tokens": LOCATION_TOKENS,
    "box head": BoxFormat("location_tokens", 100, head=True),
}
_PHRASES = ("the smaller crab", "a red apple", "the second boat from the left", "the clock")
_PICTURE = Image.new("RGB", (640, 480), "teal")

Side = Callable[[], list[Answer]]


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
    questions = predictor.ground_questions(_PICTURE, _phrases(num_questions))
    return lambda: predictor.answer(questions, boxes_only=True)


def _phrases(number: int) -> Sequence[str]:
    return (_PHRASES * number)[:number]


def write(predictor: GroundingPredictor, num_questions: int) -> Side:
    """The same boxes after the picture has been read: what the way of answering alone costs."""
    reading = predictor.read(predictor.ground_questions(_PICTURE, _phrases(num_questions)))

    def again() -> list[Answer]:
        cache = copy.deepcopy(reading.inputs["past_key_values"])
        inputs = {**reading.inputs, "past_key_values": cache}
        return predictor.write(reading._replace(inputs=inputs), boxes_only=True)

    return again


def check_boxes(answers: Sequence[Answer]) -> None:
    """Raise an AssertionError that shows the first answer that is no box. A random head's box may
    have no area; a written one always has."""
    for answer in answers:
        assert answer.failure in (None, "zero_area"), answer
