"""What a second question about a picture costs, as a share of the first: CPU time in the models.

    python eval/bench/demo.py --model photos
    python eval/bench/demo.py --model photos --mllm photos    # with its language model, too
    python eval/bench/demo.py --model scenes
    python eval/bench/demo.py --architecture ViT-B-16    # untrained; the time is a trained one's

Each sample is a new picture; its first question encodes it. No phrase is asked twice; names to
choose from stay the same, as they do on the page. CPU time of all threads is counted, so other work
on the machine matters little.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image

from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.config import ModelConfig, PrompterConfig
from cloc_mllm.data.tokenizer import load_text_tokenizer
from cloc_mllm.demo import load_predictors
from cloc_mllm.demo.engine import DemoEngine
from cloc_mllm.demo.pictures import Picture, example_pictures, new_picture
from cloc_mllm.demo.strokes import Stroke
from cloc_mllm.inference.cloc_predictor import ClocPredictor
from cloc_mllm.models.build import build_cloc
from cloc_mllm.models.clip_config import resolve_model

_PHRASES = tuple(
    f"the {look} {thing}{place}"
    for look in ("brown", "red", "smaller", "large", "old")
    for thing in ("dog", "bus", "crab", "man", "clock", "horse", "chair")
    for place in ("", " on the left", " at the top", " in the middle")
)
_BOXES = (((0.1, 0.2), (0.6, 0.9)), ((0.3, 0.1), (0.9, 0.5)))


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="demo.py", description="Measure the demo's second question.")
    parser.add_argument("--model", choices=["photos", "scenes"], default="photos")
    parser.add_argument("--mllm", default="", help="a language model; that of scenes with scenes")
    parser.add_argument("--architecture", default="", help="an open_clip architecture, untrained")
    parser.add_argument("--samples", type=int, default=40)
    args = parser.parse_args(argv)
    if 2 * (args.samples + 2) > len(_PHRASES):
        parser.error(f"--samples {args.samples}: there are phrases for {len(_PHRASES) // 2 - 2}")
    mllm = args.mllm or ("scenes" if args.model == "scenes" else "")
    engine = _engine(args.model, mllm, args.architecture)
    strokes = [Stroke("box", corners) for corners in _BOXES]
    names = () if engine.cloc.phrases is not None else ("a man", "a dog", "a bus")
    questions: dict[str, Callable[[Picture, int], Iterable[object]]] = {
        "ground": lambda picture, i: engine.ground(picture, [_PHRASES[i]]),
        "refer": lambda picture, i: engine.name(picture, strokes[i % 2], names),
    }
    for axis, (name, ask) in enumerate(questions.items()):
        _report(name, *_measure(ask, args.samples, axis))
    return 0


def _engine(model: str, mllm: str, architecture: str) -> DemoEngine:
    if not architecture:
        return DemoEngine(*load_predictors(model, mllm))
    config = resolve_model(
        ModelConfig(
            architecture=architecture,
            image_size=224,
            tokenizer="open_clip:ViT-B-16",
            context_length=77,
            prompter=PrompterConfig(),
        )
    )
    tokenizer = load_text_tokenizer(config.tokenizer, config.context_length)
    return DemoEngine(ClocPredictor(build_cloc(config, tokenizer), tokenizer))


def _measure(
    ask: Callable[[Picture, int], Iterable[object]], samples: int, axis: int
) -> tuple[list[float], list[float]]:
    """Returns the CPU milliseconds of first and second questions.

    Args:
        axis: along which the example is rolled, so that no picture was asked about before.
    """
    photo = np.asarray(example_pictures()[0].image)
    first: list[float] = []
    second: list[float] = []
    for index in range(samples + 2):  # two to warm up
        picture = new_picture(Image.fromarray(np.roll(photo, index + 1, axis=axis)))
        for times, number in ((first, index), (second, index + 1)):
            started = time.process_time()
            for _ in ask(picture, number):
                pass
            times.append(1000 * (time.process_time() - started))
    return first[2:], second[2:]


def _report(name: str, first: list[float], second: list[float]) -> None:
    parts = []
    for label, values in (("first", first), ("second", second)):
        p50, p95 = statistics.median(values), float(np.percentile(values, 95))
        parts.append(f"{label} p50 {p50:.1f} ms, p95 {p95:.1f} ms")
    shares = [100 * b / a for a, b in zip(first, second, strict=True)]
    p50, p95 = statistics.median(shares), float(np.percentile(shares, 95))
    print(f"{name}: {'; '.join(parts)}; second/first p50 {p50:.1f} %, p95 {p95:.1f} %")


if __name__ == "__main__":
    sys.exit(run(main))
