"""Milliseconds per box: box head and location tokens against integers as text, on one shape of
language model, under the grammar. The picture and the start of the questions are read anew in each
call (`ground`), or were read before (`write`).

    python eval/bench/box_output.py --layers 4 30 --output runs/bench/box_output.json
"""

from __future__ import annotations

import copy
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence

from PIL import Image

from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.inference.results import Answer
from cloc_mllm.mllm.coordinates import BoxFormat
from cloc_mllm.mllm.language_model import CACHE
from generation import LOCATION_TOKENS, random_predictor
from ratio import interleaved_ratio, machine_state, report, save_samples

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
        cache = copy.deepcopy(reading.inputs[CACHE])
        inputs = {**reading.inputs, CACHE: cache}
        return predictor.write(reading._replace(inputs=inputs), boxes_only=True)

    return again


def check_boxes(answers: Sequence[Answer]) -> None:
    """Raise an AssertionError that shows the first answer that is no box. A random head's box may
    have no area; a written one always has."""
    for answer in answers:
        assert answer.failure in (None, "zero_area"), answer


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="box_output", description=__doc__)
    parser.add_argument("--layers", type=int, nargs="*", default=[4, 30])
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--output", default="runs/bench/box_output.json")
    args = parser.parse_args(argv)
    machine, results = machine_state(), {}
    print(machine)
    for num_layers, timed in itertools.product(args.layers, (ground, write)):
        sides = {name: timed(p, args.questions) for name, p in predictors(num_layers).items()}
        for side in sides.values():
            check_boxes(side())
        text = sides.pop("integers as text")
        for name, side in sides.items():
            title = f"{timed.__name__}, {num_layers} layers, {args.questions} boxes, {name}"
            ratio = results[title] = interleaved_ratio(side, text, pairs=args.pairs, warmups=0)
            ours, theirs = (
                1000 * statistics.median(seconds) / args.questions
                for seconds in (ratio.cpu.ours, ratio.cpu.theirs)
            )
            print(
                f"{report(title, ratio)}: {ours:.1f} ms a box, integers as text {theirs:.1f}, "
                f"{1 / ratio.cpu.median:.2f} x faster (CPU)",
                flush=True,
            )
    save_samples(args.output, machine, results)


if __name__ == "__main__":
    sys.exit(run(main))
