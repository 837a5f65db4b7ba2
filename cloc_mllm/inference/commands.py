"""`cloc-mllm ground` and `cloc-mllm refer`: answer about one image and draw the answer."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from cloc_mllm.config import ModelDtype

if TYPE_CHECKING:
    from PIL import Image

    from cloc_mllm.inference.grounding_predictor import GroundingPredictor
    from cloc_mllm.inference.inputs import RegionsInput
    from cloc_mllm.inference.results import GroundingResult


def main_ground(argv: Sequence[str] | None = None) -> int:
    """`cloc-mllm ground PICTURE PHRASE...`; exit status 1 if a phrase got no box."""
    parser = _parser(
        "ground",
        "Find phrases in a picture. Prints a box for each (pixels of the upright picture,\n"
        "x1 y1 x2 y2) and draws them.",
        'example: cloc-mllm ground beach.jpg "the smaller crab" "the boat left of the pier"',
    )
    parser.add_argument("phrases", nargs="+", metavar="PHRASE", help="what to look for")
    arguments = parser.parse_args(argv)

    from cloc_mllm.data.images import open_image
    from cloc_mllm.inference.inputs import check_phrases

    check_phrases(arguments.phrases)
    _check_drawing(arguments.output)
    image = open_image(arguments.picture)
    result = _load_predictor(arguments).ground(image, arguments.phrases)
    for phrase, found in zip(arguments.phrases, result, strict=True):
        boxes = found.boxes.to_pixels().xyxy.tolist()
        for box, score in zip(boxes, found.scores.tolist(), strict=True):
            print(f"{phrase}: {_pixels(box)}  confidence {score:.2f}")
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
        "Say what is in a box of a picture, at a point or under a mask, and draw it.",
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
    arguments = parser.parse_intermixed_args(argv)
    ways = [bool(arguments.box), arguments.point is not None, arguments.mask is not None]
    if sum(ways) != 1 or len(arguments.box) not in (0, 4):
        parser.error("give the four numbers of one box, or --point X,Y, or --mask FILE")

    from cloc_mllm.data.images import open_image

    _check_drawing(arguments.output)
    image = open_image(arguments.picture)
    region = _region(arguments, image)
    result = _load_predictor(arguments).refer(image, region)
    print(f"{_pixels(result.boxes.to_pixels().xyxy[0].tolist())}: {result.labels[0]}")
    _draw(result, arguments.output)
    return 0


def _region(arguments: Namespace, image: Image.Image) -> RegionsInput:
    """Reads the region that `refer` is asked about."""
    import numpy as np

    from cloc_mllm.data.images import open_image
    from cloc_mllm.geometry import Boxes

    if arguments.box:
        box, normalized = [arguments.box], arguments.normalized
        return Boxes.normalized(box) if normalized else Boxes.pixels(box, *image.size)
    if arguments.mask is not None:
        return [np.array(open_image(arguments.mask).convert("L")) > 0]
    sides = (1, 1) if arguments.normalized else image.size
    return [[x / side for x, side in zip(arguments.point, sides, strict=True)]]


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
        "picture", metavar="PICTURE", help="a JPEG, PNG or WebP file, turned by its EXIF tag"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(f"{command}.png"),
        metavar="FILE",
        help="where to draw the answer (default: %(default)s)",
    )
    parser.add_argument(
        "--mllm", metavar="DIR", help="a model directory of stage 2 (default: the one that ships)"
    )
    parser.add_argument(
        "--dtype",
        choices=get_args(ModelDtype),
        default="float32",
        help="what the model is held in; auto: what its files hold (default: %(default)s)",
    )
    return parser


def _load_predictor(arguments: Namespace) -> GroundingPredictor:
    from transformers.utils.logging import disable_progress_bar

    from cloc_mllm.inference.grounding_predictor import GroundingPredictor

    disable_progress_bar()  # of loading weights, which takes a moment here
    return GroundingPredictor.from_pretrained(arguments.mllm, dtype=arguments.dtype)


def _pixels(box: Sequence[float]) -> str:
    return " ".join(f"{value:.0f}" for value in box)


def _check_drawing(path: Path) -> None:
    """Refuses a file that the answer could not be drawn into, before the model is asked."""
    from PIL import Image

    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"--output {path}: expected a name that ends in .png, .jpg or .webp")
    if path.is_dir():
        raise ValueError(f"--output {path}: expected a file, this is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)


def _draw(result: GroundingResult, path: Path) -> None:
    result.draw().save(path)
    print(f"drawn: {path}")
