"""Images as the predictors take them: anything that `open_image` opens, or encoded before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from cloc_mllm.data.images import ImageSource, open_image
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


PromptedImage = ImageSource | EncodedImage


def open_prompted(image: PromptedImage) -> Image.Image | EncodedImage:
    """Opens an image; one that is open or encoded comes back as it is.

    Raises:
        ImageError: it cannot be used.
    """
    return image if isinstance(image, EncodedImage) else open_image(image)


def upright_picture(image: PromptedImage) -> Image.Image:
    """Returns the upright RGB picture. Raises `ImageError` if it cannot be used."""
    return image.image if isinstance(image, EncodedImage) else open_image(image)


def as_list(texts: str | Sequence[str]) -> list[str]:
    """Returns a list of texts; one text alone is a list of one, not of its letters."""
    return [texts] if isinstance(texts, str) else list(texts)
