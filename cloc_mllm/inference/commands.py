"""`cloc-mllm ground`, `refer` and `ask`: answer about one image and draw the answer."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from cloc_mllm.config import ModelDtype
from cloc_mllm.shipped import DEFAULT_MODELS, find_model, say_what_it_knows

if TYPE_CHECKING:
    from PIL import Image

    from cloc_mllm.geometry import Boxes
    from cloc_mllm.inference.cloc_predictor import ClocPredictor
    from cloc_mllm.inference.grounding_predictor import GroundingPredictor
    from cloc_mllm.inference.inputs import RegionsInput
    from cloc_mllm.inference.results import GroundingResult

# Cosine below which a phrase is said to fit badly. Of phrases that are in a photo the shipped model
# gives 8 % less, of phrases of another photo 58 % (715 and 704, Flickr8k validation).
LOW_SIMILARITY = 0.2
# Confidence of a box head below which its box is said to be a guess: 27 % of such boxes of the
# shipped model are right, 61 % of all (26 of 291 phrases, Flickr8k validation). It does not say
# whether the thing is there: phrases of another photo are as seldom below (8 %) as its own (9 %).
LOW_CONFIDENCE = 0.3


def main_ground(argv: Sequence[str] | None = None) -> int:
    """`cloc-mllm ground PICTURE PHRASE...`; exit status 1 if a phrase got no box."""
    parser = _parser(
        "ground",
        "Find phrases in a picture. Prints a box for each (pixels of the upright picture,\n"
        "x1 y1 x2 y2) and draws them.",
        'example: cloc-mllm ground beach.jpg "the brown dog" "a man with a surfboard"',
    )
    parser.add_argument("phrases", nargs="+", metavar="PHRASE", help="what to look for")
    arguments = parser.parse_args(argv)

    image = _opened(arguments)
    from cloc_mllm.inference.inputs import check_phrases

    check_phrases(arguments.phrases)
    said: Callable[[float], str] = _similarity
    if mllm := _named_mllm(arguments):
        predictor = _load_mllm(mllm, arguments)
        result, said = predictor.ground(image, arguments.phrases), _confidence_of(predictor)
    else:
        result = _load_cloc(arguments).locate(image, arguments.phrases)
    for phrase, found in zip(arguments.phrases, result, strict=True):
        boxes = found.boxes.to_pixels().xyxy.tolist()
        for box, score in zip(boxes, found.scores.tolist(), strict=True):
            print(f"{phrase}: {_pixels(box)}  {said(score)}")
        if found.failures[0] == "not_there":
            print(f"{phrase}: {found.text[0]}")
        elif found.failures[0]:
            print(f"{phrase}: no box ({found.failures[0]}), the model wrote {found.text[0]!r}")
    _draw(result, arguments.output)
    return 1 if any(result.failures) else 0


def main_refer(argv: Sequence[str] | None = None) -> int:
    """`cloc-mllm refer PICTURE X1 Y1 X2 Y2 | --point X,Y | --mask FILE`."""
    parser = _parser(
        "refer",
        "Say what is in a box of a picture, at a point or under a mask, and draw it.\n"
        "A CLOC chooses from a list of phrases; a language model answers in its own words.",
        "example: cloc-mllm refer beach.jpg 120 80 310 240",
    )
    parser.add_argument("box", nargs="*", type=float, metavar="X1 Y1 X2 Y2")
    parser.add_argument("--point", type=_point, metavar="X,Y", help="instead of the box")
    parser.add_argument(
        "--mask",
        type=Path,
        metavar="FILE",
        help="instead of the box: an image of the same upright size; what is not black is meant",
    )
    parser.add_argument("--normalized", action="store_true", help="numbers are 0..1, not pixels")
    parser.add_argument(
        "--names",
        metavar="LIST",
        help="what a CLOC chooses from: names with commas between them, or a text file with one "
        "per line (default: some thousand phrases that ship with the model)",
    )
    arguments = parser.parse_intermixed_args(argv)
    ways = [bool(arguments.box), arguments.point is not None, arguments.mask is not None]
    if sum(ways) != 1 or len(arguments.box) not in (0, 4):
        parser.error("give the four numbers of one box, or --point X,Y, or --mask FILE")

    image = _opened(arguments)
    region = _region(arguments, image)
    from cloc_mllm.inference.inputs import check_regions

    check_regions(region, image.size)  # before a model is loaded
    names = None if arguments.names is None else _read_names(arguments.names)
    mllm = _named_mllm(arguments)
    if mllm and names:
        raise ValueError("--names is for a CLOC; a language model answers in words of its own")
    if mllm:
        result = _load_mllm(mllm, arguments).refer(image, region)
    else:
        result = _load_cloc(arguments).closest(image, region, names)
    print(f"{_pixels(result.boxes.to_pixels().xyxy[0].tolist())}: {result.labels[0]}")
    if not mllm:
        for label, score in zip(result.labels, result.scores.tolist(), strict=True):
            print(f"    {label}  {_similarity(score)}")
    _draw(result, arguments.output)
    return 0


def main_ask(argv: Sequence[str] | None = None) -> int:
    """`cloc-mllm ask PICTURE QUESTION [--box X1 Y1 X2 Y2]`."""
    parser = _parser(
        "ask",
        "Ask a language model one question about a picture, or about a box of it. The answer is\n"
        "printed as it is written; the boxes in it are printed and drawn.",
        'example: cloc-mllm ask beach.jpg "What is the dog doing?" --box 120 80 310 240',
    )
    parser.add_argument("question", metavar="QUESTION", help="in your own words")
    parser.add_argument(
        "--box", nargs=4, type=float, metavar=("X1", "Y1", "X2", "Y2"), help="what it is about"
    )
    parser.add_argument("--normalized", action="store_true", help="numbers are 0..1, not pixels")
    arguments = parser.parse_args(argv)

    image = _opened(arguments)
    from cloc_mllm.inference.inputs import check_question, check_regions

    check_question(arguments.question)
    region = None
    if arguments.box:
        region, _ = check_regions(_box(arguments, image), image.size)
    name = _model_name(arguments)
    say_what_it_knows(name)
    predictor = _load_mllm(find_model("mllm", name), arguments)
    result = _asked(predictor, image, arguments.question, region)
    if len(result.boxes) or _is_json(arguments.output):
        _draw(result, arguments.output)
    return 0


def _asked(
    predictor: GroundingPredictor, image: Image.Image, question: str, region: Boxes | None
) -> GroundingResult:
    """Prints the answer to a question while it is written, then its boxes.

    Returns:
        the boxes of the answer; where it has none, `region`, if there is one.
    """
    import torch

    from cloc_mllm.data.wordings import REGION_TOKEN
    from cloc_mllm.inference.chat import Chat, answer_chat
    from cloc_mllm.inference.results import GroundingResult
    from cloc_mllm.inference.sampling import Sampling

    text = question.strip()
    if region is not None:
        (box,) = region.xyxy.tolist()
        text += f" {predictor.processor.coordinates.encode(box)} {REGION_TOKEN}"
    content = [{"type": "image"}, {"type": "text", "text": text}]
    chat = Chat([{"role": "user", "content": content}], [image], [] if region is None else [region])
    answer = answer_chat(
        predictor, chat, Sampling(), lambda piece: print(piece, end="", flush=True)
    )
    print()
    name = predictor.processor.asked_in.phrase_in(question) or "answer"
    boxes, scores = answer.boxes, answer.scores
    labels = [phrase or name for phrase in answer.phrases]
    said = _confidence_of(predictor)
    for label, found, score in zip(
        labels, boxes.to_pixels().xyxy.tolist(), scores.tolist(), strict=True
    ):
        print(f"{label}: {_pixels(found)}  {said(score)}")
    if not len(boxes) and region is not None:
        boxes, labels = region, [answer.text]
        scores = torch.tensor([answer.confidence or 0.0])
    index = torch.zeros(len(boxes), dtype=torch.long)
    return GroundingResult(image, boxes, scores, labels, [answer.text], index, [None])


def _read_names(given: str) -> list[str]:
    """Reads names from a text file, or from the words themselves."""
    is_file = os.path.isfile(given)  # of many names `Path.is_file` says that the name is too long
    lines = Path(given).read_text("utf-8").splitlines() if is_file else given.split(",")
    names = [name.strip() for name in lines if name.strip()]
    if not names:
        raise ValueError(f"--names {given}: expected names with commas between them, or a file")
    return names


def _similarity(score: float) -> str:
    """Says a cosine, and in words when it is low."""
    return f"similarity {score:.2f}" + (", low: no good fit" if score < LOW_SIMILARITY else "")


def _confidence_of(predictor: GroundingPredictor) -> Callable[[float], str]:
    """What says the confidence in a box, and in words when a box head's is low; that of boxes
    written as tokens is on another scale."""
    low = 0.0 if predictor.model.config.box_token_id is None else LOW_CONFIDENCE

    def said(score: float) -> str:
        return f"confidence {score:.2f}" + (", low: the model is unsure" if score < low else "")

    return said


def _region(arguments: Namespace, image: Image.Image) -> RegionsInput:
    """Reads the region that `refer` is asked about."""
    import numpy as np

    from cloc_mllm.data.images import open_image

    if arguments.box:
        return _box(arguments, image)
    if arguments.mask is not None:
        return [np.array(open_image(arguments.mask).convert("L")) > 0]
    sides = (1, 1) if arguments.normalized else image.size
    return [[x / side for x, side in zip(arguments.point, sides, strict=True)]]


def _box(arguments: Namespace, image: Image.Image) -> Boxes:
    from cloc_mllm.geometry import Boxes

    box, normalized = [arguments.box], arguments.normalized
    if normalized and max(arguments.box) > 2:
        raise ValueError(
            f"--normalized: expected numbers 0..1, got {_plain(arguments.box)}; leave it out for "
            "pixels"
        )
    if not normalized and 0 < max(arguments.box) <= 1:
        raise ValueError(
            f"expected a box in pixels, got {_plain(arguments.box)}; add --normalized to numbers "
            "0..1"
        )
    return Boxes.normalized(box) if normalized else Boxes.pixels(box, *image.size)


def _plain(numbers: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in numbers)


def _point(text: str) -> list[float]:
    x, y = map(float, text.split(","))  # argparse says which text was wrong
    return [x, y]


def _parser(command: str, description: str, example: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"cloc-mllm {command}",
        description=description,
        epilog=example,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "picture",
        metavar="PICTURE",
        help="a JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or HEIC file, turned by its EXIF tag",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(f"{command}.png"),
        metavar="FILE",
        help="where to draw the answer; a name that ends in .json: its boxes as JSON "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="a shipped model, photos or scenes, or a directory that stage 1 or 2 wrote "
        f"(default: {DEFAULT_MODELS['cloc']})",
    )
    parser.add_argument("--mllm", metavar="DIR", help="the same for stage 2 alone")
    parser.add_argument(
        "--dtype",
        choices=get_args(ModelDtype),
        default="float32",
        help="what an MLLM is held in; auto: what its files hold (default: %(default)s)",
    )
    return parser


def _named_mllm(arguments: Namespace) -> Path | None:
    """The directory of the MLLM that is asked; None where a CLOC is.

    Says on standard error what a shipped model knows.
    """
    name = _model_name(arguments)
    say_what_it_knows(name)
    if arguments.mllm or name == DEFAULT_MODELS["mllm"]:
        return find_model("mllm", name)
    directory = find_model("cloc", name)
    if (directory / "processor_config.json").is_file():
        return directory
    if arguments.dtype != "float32":
        raise ValueError(f"--dtype {arguments.dtype} is for an MLLM; {name} is a CLOC")
    return None


def _model_name(arguments: Namespace) -> str:
    if arguments.mllm and arguments.model:
        raise ValueError("--model and --mllm both name a model; give one of them")
    return arguments.mllm or arguments.model or DEFAULT_MODELS["cloc"]


def _load_mllm(directory: Path, arguments: Namespace) -> GroundingPredictor:
    from transformers.utils.logging import disable_progress_bar

    from cloc_mllm.inference.grounding_predictor import GroundingPredictor

    disable_progress_bar()  # of loading weights, which takes a moment here
    return GroundingPredictor.from_pretrained(directory, dtype=arguments.dtype)


def _load_cloc(arguments: Namespace) -> ClocPredictor:
    from cloc_mllm.inference.cloc_predictor import ClocPredictor

    return ClocPredictor.from_pretrained(arguments.model)


def _pixels(box: Sequence[float]) -> str:
    return " ".join(f"{value:.0f}" for value in box)


def _opened(arguments: Namespace) -> Image.Image:
    """Opens the picture, and checks where the answer goes, before anything slow is imported."""
    from cloc_mllm.data.images import open_image

    _check_drawing(arguments.output)
    return open_image(arguments.picture)


def _check_drawing(path: Path) -> None:
    """Refuses a file that the answer could not be drawn into, before the model is asked."""
    from PIL import Image

    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE and not _is_json(path):
        raise ValueError(
            f"--output {path}: expected a name that ends in .png, .jpg or .webp, or in .json"
        )
    if path.is_dir():
        raise ValueError(f"--output {path}: expected a file, this is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)


def _draw(result: GroundingResult, path: Path) -> None:
    if _is_json(path):
        path.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
    else:
        result.draw().save(path)
    print(f"{'written' if _is_json(path) else 'drawn'}: {path}")


def _is_json(path: Path) -> bool:
    return path.suffix.lower() == ".json"
