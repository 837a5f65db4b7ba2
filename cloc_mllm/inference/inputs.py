"""Prepares the inputs of the predictors: images (encoded or not), regions and texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from cloc_mllm.box import Box, clip_box
from cloc_mllm.data.images import ImageSource, open_image
from cloc_mllm.data.wordings import IMAGE_TOKEN, REGION_TOKEN
from cloc_mllm.geometry import Boxes
from cloc_mllm.models.region_like import RegionLike, around, as_mask
from cloc_mllm.models.vision_encoder import ImageFeatures, VisionEncoder


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image that a predictor has encoded, for any number of prompts to this predictor.

    Attributes:
        image: the upright RGB picture.
        features: what `encoder` made of it; of a `GroundingPredictor` with tiles one row per view.
        encoder: the image encoder, for which alone the features mean something.
    """

    image: Image.Image
    features: ImageFeatures
    encoder: VisionEncoder

    def check_encoder(self, encoder: VisionEncoder) -> None:
        """Raises `ValueError` if another model's encoder made the features."""
        if encoder is not self.encoder:
            raise ValueError(
                "the image was encoded by another model; pass what this predictor's `encode` "
                "returned, or the image itself"
            )


ImageInput = ImageSource | EncodedImage
RegionsInput = Boxes | Sequence[RegionLike]


def open_input(image: ImageInput) -> Image.Image | EncodedImage:
    """Opens an image; one that is open or encoded comes back as it is.

    Raises:
        ImageError: it cannot be used.
    """
    return image if isinstance(image, EncodedImage) else open_image(image)


def upright_picture(image: ImageInput) -> Image.Image:
    """Returns the upright RGB picture. Raises `ImageError` if it cannot be used."""
    return image.image if isinstance(image, EncodedImage) else open_image(image)


def as_list(texts: str | Sequence[str]) -> list[str]:
    """Returns a list of texts; one text alone is a list of one, not of its letters.

    Raises:
        ValueError: one of them is no text.
    """
    listed = [texts] if isinstance(texts, str) else list(texts)
    for text in listed:
        if not isinstance(text, str):
            raise ValueError(f"expected texts, got {text!r} among {len(listed)} of them")
    return listed


def one_question(question: str) -> str:
    """Returns the question; a list of several is refused, since an answer is of one.

    Raises:
        ValueError: it is no text, or blank.
    """
    if not isinstance(question, str):
        raise ValueError(
            f"expected one question as a text, got {question!r}; several are asked in one batch "
            "with `GroundingPredictor.answer([Question(image, text), ...])`"
        )
    if not question.strip():
        raise ValueError("the question is blank; say what you want to know")
    return question


def check_phrases(phrases: Sequence[str]) -> None:
    """Refuses phrases that cannot be looked for.

    Raises:
        ValueError: a phrase is blank, or holds a mark that stands for something else.
    """
    for index, phrase in enumerate(phrases):
        if not phrase.strip():
            which = "the phrase" if len(phrases) == 1 else f"phrase {index}"
            raise ValueError(f"{which} is blank; say what to look for")
        _check_marks("phrase", phrase)


def check_question(question: str) -> None:
    """Refuses a question that is blank or holds a mark that stands for something else.

    Raises:
        ValueError: says which.
    """
    _check_marks("question", one_question(question))


def _check_marks(kind: str, text: str) -> None:
    for mark, meaning in ((IMAGE_TOKEN, "the picture"), (REGION_TOKEN, "a region")):
        if mark in text:
            raise ValueError(
                f"the {kind} {text!r} holds {mark}, which stands for {meaning} in the "
                "model's questions; describe the thing in words"
            )


def check_regions(
    regions: RegionsInput, image_wh: tuple[int, int]
) -> tuple[Boxes, list[Tensor | None]]:
    """Checks regions and clips boxes to their image.

    Args:
        regions: R boxes in any frame of the upright picture, or a list of R boxes, points and
            masks (see `models.region_like.RegionLike`).
        image_wh: width and height of the upright picture.

    Returns:
        R boxes, normalised, of a point or mask the box around it; and for each region its mask
        bool[H, W], None for a box.

    Raises:
        ValueError: a region that cannot be used (a box inverted, outside, under a pixel or in the
            frame of the picture before its turn; four numbers that are pixels; a point outside; a
            mask empty or of another size); says why.
    """
    given: Sequence[RegionLike]
    if isinstance(regions, Boxes):
        regions.check_not_turned(*image_wh)
        given = regions.to_normalized().xyxy.tolist()
    else:
        given = regions
        for region in given:
            _refuse_pixels(region, image_wh)
    masks = [as_mask(region, image_wh) for region in given]
    boxes = [
        _clip(region, image_wh) if mask is None else around(mask)
        for region, mask in zip(given, masks, strict=True)
    ]
    return Boxes.normalized(boxes, image_wh), masks


def _refuse_pixels(region: RegionLike, image_wh: tuple[int, int]) -> None:
    """Refuses four plain numbers far outside of 0..1, which cutting at the edge would hide."""
    values = torch.as_tensor(region)
    if tuple(values.shape) == (4,) and bool(((values < -1) | (values > 2)).any()):
        raise ValueError(
            f"expected a box x1, y1, x2, y2 in 0..1 of the picture, got {values.tolist()}; for "
            f"pixels give Boxes.pixels([[x1, y1, x2, y2]], {image_wh[0]}, {image_wh[1]})"
        )


def check_box(box_px: Sequence[float], width: int, height: int) -> Box:
    """Clips a box in pixels to a `width` x `height` picture and normalises it.

    Raises:
        ValueError: it cannot be used (inverted, outside, under a pixel); says why.
    """
    cleaned, reason = clip_box(box_px, width, height)
    if cleaned is None:
        shown = ", ".join(f"{value:.1f}" for value in box_px)
        raise ValueError(
            f"box [{shown}] px of a {width} x {height} picture cannot be used: {reason}; "
            "give x1 y1 x2 y2 with x1 < x2 and y1 < y2 that overlap the picture"
        )
    return cleaned


def _clip(box: RegionLike, image_wh: tuple[int, int]) -> Box:
    sides = torch.tensor([*image_wh, *image_wh], dtype=torch.float64)
    return check_box((torch.as_tensor(box, dtype=torch.float64) * sides).tolist(), *image_wh)
