"""Turns an upright RGB picture into a model's pixels, for both stages alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cloc_mllm.config import ModelConfig, PreprocessConfig
from cloc_mllm.geometry import CanvasTransform, Interpolation, Resize

Channels = tuple[float, float, float]

CLIP_MEAN: Channels = (0.48145466, 0.4578275, 0.40821073)  # from OpenAI's CLIP
CLIP_STD: Channels = (0.26862954, 0.26130258, 0.27577711)
_CLIP_PADDING = (124, 116, 104)  # the mean colour of photos, as 8-bit


@dataclass(frozen=True)
class Preprocessing:
    """What a model does to every picture; it is a part of the model (contract C6b).

    The defaults are OpenAI CLIP's numbers with the paper's resize.

    Attributes:
        size: S, side of the canvas in pixels.
        resize: see `CanvasTransform`.
        interpolation: of the resize, by Pillow's kernels.
        mean, std: of each channel, for values in 0..1.
        padding_rgb: 0..255, the colour of the padding.
    """

    size: int
    resize: Resize = "letterbox"
    interpolation: Interpolation = "bicubic"
    mean: Channels = CLIP_MEAN
    std: Channels = CLIP_STD
    padding_rgb: tuple[int, int, int] = _CLIP_PADDING

    def __post_init__(self) -> None:
        channels = {"mean": self.mean, "std": self.std, "padding_rgb": self.padding_rgb}
        for name, values in channels.items():
            if len(values) != 3 or (name == "std" and min(values) <= 0):
                raise ValueError(
                    f"preprocess.{name} is {list(values)}; expected three numbers, for red, green "
                    "and blue" + (", above 0" if name == "std" else "")
                )

    @classmethod
    def of(cls, config: ModelConfig) -> Preprocessing:
        """The preprocessing of a model config; what it leaves open is OpenAI CLIP's."""
        given = config.preprocess
        mean = as_channels(given.mean) if given.mean else CLIP_MEAN
        padding = tuple(given.padding_rgb) if given.padding_rgb else _mean_colour(mean)
        return cls(
            config.image_size,
            "letterbox" if given.resize == "auto" else given.resize,
            "bicubic" if given.interpolation == "auto" else given.interpolation,
            mean,
            as_channels(given.std) if given.std else CLIP_STD,
            padding,  # type: ignore[arg-type]
        )

    def config(self) -> PreprocessConfig:
        """The settings that `of` makes this of."""
        return PreprocessConfig(
            self.resize,
            self.interpolation,
            list(self.mean),
            list(self.std),
            list(self.padding_rgb),
        )

    def transform(self, width: int, height: int, *, flip: bool = False) -> CanvasTransform:
        """The transform that moves a picture of this size, and its boxes, to the canvas."""
        return CanvasTransform(width, height, self.size, flip, self.resize)

    def canvas(self, image: Image.Image, transform: CanvasTransform) -> Tensor:
        """Moves a picture to the canvas: uint8[3, S, S], not normalised."""
        return image_to_pixels(transform.apply(image, self.padding_rgb, self.interpolation))

    def normalize(self, pixels: Tensor) -> Tensor:
        """Normalises uint8[..., 3, S, S] by mean and standard deviation: float32 of that shape."""
        mean = torch.tensor(self.mean, device=pixels.device)[:, None, None]
        std = torch.tensor(self.std, device=pixels.device)[:, None, None]
        return pixels.float().div_(255).sub_(mean).div_(std)

    def __call__(self, image: Image.Image) -> tuple[Tensor, CanvasTransform]:
        """Prepares an upright RGB picture, as `open_image` returns it.

        Returns:
            float32[3, S, S], and the transform that brings boxes of the picture to it.
        """
        transform = self.transform(image.width, image.height)
        return self.normalize(self.canvas(image, transform)), transform

    def fingerprint(self, tokenizer: Any) -> dict[str, str | int]:
        """Names what must be equal in training and use (contract C7).

        Stage 1 decodes large JPEGs at a reduced scale, which is not part of it: this moves no box,
        and changes pixels by less than JPEG itself does. Whatever uses a model decodes in full.
        """
        probe = tokenizer(["a small probe of the tokenizer: 3 cats, 0-999!"]).tolist()
        return {
            **self.pixel_fingerprint(),
            "box_frame": "canvas, xyxy, 0..1",
            "text": "lower-case",
            "tokenizer": hashlib.sha256(json.dumps(probe).encode()).hexdigest()[:16],
        }

    def pixel_fingerprint(self) -> dict[str, str | int]:
        """The part of the fingerprint that decides the pixels."""
        resize = {
            "letterbox": f"long side, {self.interpolation}, centred padding",
            "squash": f"both sides, {self.interpolation}",
        }
        return {
            "image_size": self.size,
            "resize": resize[self.resize],
            "padding_rgb": str(self.padding_rgb),
            "pixel_mean": str(self.mean),
            "pixel_std": str(self.std),
        }


def image_to_pixels(canvas: Image.Image) -> Tensor:
    """Turns an RGB canvas of S x S into uint8[3, S, S]."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(canvas).transpose(2, 0, 1)))


def as_channels(values: Sequence[float]) -> Channels:
    return tuple(map(float, values))  # type: ignore[return-value]  # `Preprocessing` checks it


def _mean_colour(mean: Channels) -> tuple[int, ...]:
    return _CLIP_PADDING if mean == CLIP_MEAN else tuple(round(255 * value) for value in mean)
