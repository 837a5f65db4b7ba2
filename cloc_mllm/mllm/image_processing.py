"""Turns images into the model's pixels, as an image processor of Transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from cloc_mllm.data.images import ImageSource
from cloc_mllm.data.transforms import Preprocessing, as_channels
from cloc_mllm.geometry import Interpolation, Resize
from cloc_mllm.mllm.chat_images import open_images

_DEFAULT = Preprocessing(128)


class ClocMllmImageProcessor(BaseImageProcessor):
    """Resizes an image to the square canvas and normalises it, as `Preprocessing` says.

    Args:
        size: side S of the square in pixels, or {"height": S, "width": S}.
        resize, interpolation: see `Preprocessing`; processors that were saved before these could be
            chosen have the defaults.
        image_mean, image_std: mean and standard deviation of each channel, for values in 0..1.
        padding_rgb: 0..255, the colour around an image that is not square.
        kwargs: what Transformers saves beside these.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012  as Transformers declares it

    def __init__(
        self,
        size: int | Mapping[str, int] = 128,
        image_mean: Sequence[float] = _DEFAULT.mean,
        image_std: Sequence[float] = _DEFAULT.std,
        padding_rgb: Sequence[int] = _DEFAULT.padding_rgb,
        resize: Resize = _DEFAULT.resize,
        interpolation: Interpolation = _DEFAULT.interpolation,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        size = {"height": size, "width": size} if isinstance(size, int) else dict(size)
        if size.keys() != {"height", "width"} or size["height"] != size["width"]:
            raise ValueError(f"expected the size of a square, got {size}; images are padded to one")
        self.size = size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.padding_rgb = list(padding_rgb)
        self.resize = resize
        self.interpolation = interpolation

    @classmethod
    def of(cls, preprocessing: Preprocessing) -> ClocMllmImageProcessor:
        return cls(
            preprocessing.size,
            preprocessing.mean,
            preprocessing.std,
            preprocessing.padding_rgb,
            preprocessing.resize,
            preprocessing.interpolation,
        )

    @property
    def preprocessing(self) -> Preprocessing:
        red, green, blue = self.padding_rgb
        return Preprocessing(
            self.size["height"],
            self.resize,
            self.interpolation,
            as_channels(self.image_mean),
            as_channels(self.image_std),
            (red, green, blue),
        )

    def preprocess(
        self, images: ImageSource | Sequence[ImageSource], return_tensors: str | None = "pt"
    ) -> BatchFeature:
        """Prepares one image or several.

        Args:
            images: what `open_image` takes, an address or base64 (`open_chat_image`).

        Returns:
            pixel_values float[B, 3, S, S].

        Raises:
            ImageError: an image cannot be used.
        """
        pixels = torch.stack([self.prepare(picture) for picture in open_images(images)])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def prepare(self, picture: Image.Image) -> Tensor:
        """Prepares an upright RGB picture: float32[3, S, S]."""
        return self.preprocessing(picture)[0]
