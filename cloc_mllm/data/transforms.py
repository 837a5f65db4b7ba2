"""Turns an upright RGB picture into the model's pixels, for both stages alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cloc_mllm.geometry import Letterbox

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # from OpenAI's CLIP
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
PADDING_RGB = (124, 116, 104)  # the mean colour, as 8-bit


def image_to_pixels(canvas: Image.Image) -> Tensor:
    """Turns an RGB canvas of S x S into uint8[3, S, S]."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(canvas).transpose(2, 0, 1)))


def normalize_pixels(
    pixels: Tensor, mean: Sequence[float] = PIXEL_MEAN, std: Sequence[float] = PIXEL_STD
) -> Tensor:
    """Normalises uint8[..., 3, S, S] by mean and standard deviation: float32 of that shape."""
    means, stds = _per_channel(mean, pixels.device), _per_channel(std, pixels.device)
    return pixels.float().div_(255).sub_(means).div_(stds)


def _per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    """Makes float32[3, 1, 1] on the device itself; a copy from the host would wait for a GPU."""
    return torch.stack([torch.full((1, 1), value, device=device) for value in values])


def preprocess(
    image: Image.Image,
    size: int,
    flip: bool = False,
    *,
    mean: Sequence[float] = PIXEL_MEAN,
    std: Sequence[float] = PIXEL_STD,
    padding_rgb: tuple[int, int, int] = PADDING_RGB,
) -> tuple[Tensor, Letterbox]:
    """Letterboxes and normalises a picture.

    Args:
        image: an upright RGB picture, as `open_image` returns it.
        mean, std: of each channel, for values in 0..1.
        padding_rgb: 0..255, the colour of the padding.

    Returns:
        float32[3, size, size], and the transform that brings boxes of the picture to it.
    """
    letterbox = Letterbox(image.width, image.height, size, flip)
    pixels = image_to_pixels(letterbox.apply(image, padding_rgb))
    return normalize_pixels(pixels, mean, std), letterbox


def preprocessing_fingerprint(image_size: int, tokenizer: Any) -> dict[str, str | int]:
    """Names what must be equal in training and use (contract C7).

    Stage 1 decodes large JPEGs at a reduced scale, which is not part of it: this moves no box, and
    changes pixels by less than JPEG itself does. Whatever uses a model decodes in full.
    """
    probe = tokenizer(["a small probe of the tokenizer: 3 cats, 0-999!"]).tolist()
    return {
        "image_size": image_size,
        "resize": "long side, bicubic, centred padding",
        "padding_rgb": str(PADDING_RGB),
        "pixel_mean": str(PIXEL_MEAN),
        "pixel_std": str(PIXEL_STD),
        "box_frame": "canvas, xyxy, 0..1",
        "text": "lower-case",
        "tokenizer": hashlib.sha256(json.dumps(probe).encode()).hexdigest()[:16],
    }
