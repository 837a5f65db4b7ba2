"""Encodes an image once, prompts it many times: boxes to embeddings and names, phrases to boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cloc_mllm.data.images import ImageSource, open_image
from cloc_mllm.data.tokenizer import TextTokenizer
from cloc_mllm.data.transforms import preprocess
from cloc_mllm.devices import choose_device
from cloc_mllm.geometry import CANVAS, Boxes, Letterbox
from cloc_mllm.models.build import load_cloc
from cloc_mllm.models.cloc import Cloc
from cloc_mllm.models.vision_encoder import ImageFeatures
from cloc_mllm.shipped import shipped_directory


@dataclass(frozen=True)
class LocateResult:
    """Where phrases are.

    Attributes:
        boxes: one per phrase, normalised to the upright picture and clipped to it.
        scores: float[P], the cosine in -1..1 of each phrase and the embedding of its box.
    """

    boxes: Boxes
    scores: Tensor


class ClocPredictor:
    """A CLOC model and the image it looks at.

    Example:
        predictor = ClocPredictor.from_pretrained("runs/stage1/model")
        predictor.set_image("photo.jpg")
        predictor.classify(Boxes.pixels([[10, 20, 90, 140]], 640, 480), ["a crab", "a clock"])
    """

    def __init__(self, model: Cloc, tokenizer: TextTokenizer) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._image: ImageFeatures | None = None
        self._letterbox: Letterbox | None = None

    @classmethod
    def from_pretrained(
        cls, directory: str | Path | None = None, *, device: torch.device | str | None = None
    ) -> ClocPredictor:
        """Loads a model directory of stage 1; None takes the weights that ship with the package.

        Raises:
            FileNotFoundError: there is no model in the directory, or none ships.
        """
        model, tokenizer, _ = load_cloc(
            directory or shipped_directory("cloc"), choose_device(device)
        )
        return cls(model, tokenizer)

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    @torch.inference_mode()
    def set_image(self, image: ImageSource) -> None:
        """Encodes an image; everything below is about it until the next call.

        Args:
            image: what `open_image` takes. Boxes are in the frame of the upright picture that it
                returns: a photo with an EXIF orientation is turned first.

        Raises:
            ImageError: the image cannot be used.
        """
        size = self.model.vision.encoder.image_size
        pixels, self._letterbox = preprocess(open_image(image), size)
        self._image = self.model.encode_image(pixels[None].to(self.device))

    @torch.inference_mode()
    def embed_regions(self, boxes: Boxes) -> Tensor:
        """Embeds boxes, in pixels or normalised: float[R, E], each of unit length."""
        image, letterbox = self._current()
        return self._embed_canvas(image, letterbox.to_canvas(boxes).xyxy)

    @torch.inference_mode()
    def embed_shapes(self, masks: Sequence[Tensor]) -> Tensor:
        """Embeds what points, scribbles or masks mark: float[R, E], each of unit length.

        Args:
            masks: one per region, float[H, W] in 0..1, over the upright picture, at any
                resolution; a point is a mask with one pixel on.

        Raises:
            ValueError: a mask is empty.
        """
        image, letterbox = self._current()
        if empty := [i for i, mask in enumerate(masks) if not mask.any()]:
            raise ValueError(f"masks {empty} are empty; a mask must mark at least one pixel")
        canvas = torch.stack([letterbox.mask_to_canvas(mask) for mask in masks]).to(self.device)
        z = self.model.vision.embed_masks(image, canvas, self._all_first(len(canvas)))
        return F.normalize(z, dim=-1)

    @torch.inference_mode()
    def classify(self, boxes: Boxes, names: Sequence[str]) -> Tensor:
        """Gives each name a probability for each box: float[R, C], rows add up to one."""
        if not names:
            raise ValueError("classify needs at least one name")
        scale = getattr(self.model, "region_logit_scale", self.model.logit_scale)
        similarity = self.embed_regions(boxes) @ self.embed_texts(names).T
        return (scale.exp().clamp(max=100) * similarity).softmax(-1)

    @torch.inference_mode()
    def locate(self, phrases: Sequence[str]) -> LocateResult:
        """Finds each phrase by CLOC's own text prompt and box head."""
        image, letterbox = self._current()
        texts = self.model.encode_text(self.tokenizer(phrases).to(self.device))
        canvas = self.model.locate(image, texts, self._all_first(len(texts)))
        boxes = letterbox.to_original(Boxes(canvas, CANVAS)).xyxy.clamp(0, 1)
        scores = (self._embed_canvas(image, canvas) * F.normalize(texts, dim=-1)).sum(-1)
        return LocateResult(Boxes.normalized(boxes.cpu()), scores.cpu())

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeds texts: float[P, E], each of unit length."""
        return F.normalize(self.model.encode_text(self.tokenizer(texts).to(self.device)), dim=-1)

    def _embed_canvas(self, image: ImageFeatures, boxes: Tensor) -> Tensor:
        boxes = boxes.to(self.device, torch.float32)
        return F.normalize(
            self.model.embed_boxes(image, boxes, self._all_first(len(boxes))), dim=-1
        )

    def _all_first(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.long, device=self.device)

    def _current(self) -> tuple[ImageFeatures, Letterbox]:
        if self._image is None or self._letterbox is None:
            raise ValueError("no image yet; call set_image first")
        return self._image, self._letterbox
