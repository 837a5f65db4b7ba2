"""Open-vocabulary detectors: find boxes in images and score every phrase for each.

Each detector makes the model's square or padded input itself and takes the boxes from the model's
raw output, because the post-processing of libraries has changed between releases. An image is what
`open_image` takes. Letters: Q phrases of an image, K boxes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cloc_mllm.data.images import ImageSource, open_image
from cloc_mllm.data.tokenizer import TextTokenizer
from cloc_mllm.data.transforms import image_to_pixels
from cloc_mllm.geometry import CANVAS, Boxes
from cloc_mllm.models.build import load_cloc
from cloc_mllm.models.cloc import Cloc

DetectorName = Literal["cloc", "owlv2", "grounding_dino"]
_OWLV2 = "google/owlv2-large-patch14-ensemble"  # the paper's OWLv2 L/14
_GROUNDING_DINO = "IDEA-Research/grounding-dino-base"
_GREY = (128, 128, 128)  # OWLv2 was trained with grey below or to the right of the picture


@dataclass(frozen=True)
class Detections:
    """The boxes that a detector found in one image.

    Attributes:
        boxes: float[K, 4] xyxy, normalised to the upright image; they may stick out of it.
        scores: float[K, Q], the confidence of each phrase for each box, at most 1.
    """

    boxes: Tensor
    scores: Tensor


class Detector(Protocol):
    """Looks for each image's own phrases in it."""

    def detect(
        self, images: Sequence[ImageSource], phrases: Sequence[Sequence[str]]
    ) -> list[Detections]:
        """Looks for one phrase or more per image; returns one `Detections` each, on the CPU."""


def load_detector(
    name: DetectorName, model: str = "", *, image_size: int = 0, device: str = "cpu"
) -> Detector:
    """Loads a detector from a directory or by its Hugging Face name.

    Args:
        model: "" takes the CLOC for photos that ships with the package, or the published
            checkpoint of another detector. `scenes` is the shipped CLOC for built-in scenes.
        image_size: side of OWLv2's square input in pixels (the paper: 448); 0 takes the model's
            own.

    Raises:
        FileNotFoundError, OSError: there is no such model.
    """
    if name == "cloc":
        cloc, tokenizer, _ = load_cloc(model, device)
        return ClocDetector(cloc, tokenizer)
    if name == "owlv2":
        return Owlv2Detector.from_pretrained(model or _OWLV2, image_size, device)
    return GroundingDinoDetector.from_pretrained(model or _GROUNDING_DINO, device)


class ClocDetector:
    """CLOC as the labeller of its own next round: one box per phrase, from its text prompt.

    The score of a box for a phrase is the cosine of their embeddings, at most 1; below 0 they do
    not match. It is not a probability: docs/how-to/label.md says how to choose a threshold.
    """

    def __init__(self, model: Cloc, tokenizer: TextTokenizer) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer

    @torch.inference_mode()
    def detect(
        self, images: Sequence[ImageSource], phrases: Sequence[Sequence[str]]
    ) -> list[Detections]:
        preprocess = self.model.vision.encoder.preprocessing
        pixels, transforms = zip(*(preprocess(open_image(image)) for image in images), strict=True)
        device = next(self.model.parameters()).device
        encoded = self.model.encode_image(torch.stack(pixels).to(device))
        distinct = list(dict.fromkeys(phrase for own in phrases for phrase in own))
        position = {phrase: index for index, phrase in enumerate(distinct)}
        features = self.model.encode_text(self.tokenizer(distinct).to(device))
        text = features[[position[phrase] for own in phrases for phrase in own]]
        counts = [len(own) for own in phrases]
        index = torch.repeat_interleave(torch.arange(len(images)), torch.tensor(counts)).to(device)
        canvas = self.model.locate(encoded, text, index)
        z = F.normalize(self.model.embed_boxes(encoded, canvas, index), dim=-1).split(counts)
        parts = zip(
            canvas.split(counts), z, F.normalize(text, dim=-1).split(counts), transforms,
            strict=True,
        )  # fmt: skip
        return [
            Detections(
                transform.to_original(Boxes(boxes, CANVAS)).xyxy.float().cpu(),
                (box_features @ text_features.T).clamp(max=1).float().cpu(),
            )
            for boxes, box_features, text_features, transform in parts
        ]


class Owlv2Detector:
    """OWLv2 (arXiv 2306.09683), the paper's detector.

    The image lies in the top left corner of a grey square; boxes come in shares of that square.
    """

    def __init__(self, model: Any, processor: Any, image_size: int = 0) -> None:
        self.model = model.eval()
        self.processor = processor
        own = int(model.config.vision_config.image_size)
        self.image_size = image_size or own
        self.is_resized = self.image_size != own

    @classmethod
    def from_pretrained(cls, name: str, image_size: int, device: str) -> Owlv2Detector:
        from transformers import AutoProcessor, Owlv2ForObjectDetection

        model: Any = Owlv2ForObjectDetection.from_pretrained(name, dtype=torch.float32)
        return cls(
            model.to(device),
            AutoProcessor.from_pretrained(name, trust_remote_code=False),
            image_size,
        )

    @torch.inference_mode()
    def detect(
        self, images: Sequence[ImageSource], phrases: Sequence[Sequence[str]]
    ) -> list[Detections]:
        squares, resized = zip(*(corner_square(i, self.image_size) for i in images), strict=True)
        pixels = torch.stack([self._pixels(square) for square in squares])
        most = max(map(len, phrases))
        padded = [text for own in phrases for text in [*own, *[own[-1]] * (most - len(own))]]
        text = self.processor.tokenizer(
            padded, padding="max_length", truncation=True, return_tensors="pt",
            max_length=self.model.config.text_config.max_position_embeddings,
        )  # fmt: skip
        device = self.model.device
        output = self.model(
            input_ids=text["input_ids"].to(device),
            attention_mask=text["attention_mask"].to(device),
            pixel_values=pixels.to(device),
            interpolate_pos_encoding=self.is_resized,
        )
        parts = zip(output.pred_boxes, output.logits, resized, phrases, strict=True)
        return [
            Detections(
                to_corners(boxes, self.image_size / wh[0], self.image_size / wh[1]),
                logits[:, : len(own)].sigmoid().float().cpu(),
            )
            for boxes, logits, wh, own in parts
        ]

    def _pixels(self, square: Image.Image) -> Tensor:
        """Normalises a square to float[3, S, S]; the library's own step would pad and resize."""
        own = self.processor.image_processor
        mean, std = torch.tensor(own.image_mean), torch.tensor(own.image_std)
        values = image_to_pixels(square).float() / 255
        return (values - mean[:, None, None]) / std[:, None, None]


class GroundingDinoDetector:
    """Grounding DINO (arXiv 2303.05499).

    All phrases form one text, `a dog . a cat .`; a phrase scores for a box what its best token
    scores. Images go one at a time: a batch is padded to its largest image, which changes the
    scores, so a record would depend on its neighbours.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model.eval()
        self.processor = processor

    @classmethod
    def from_pretrained(cls, name: str, device: str) -> GroundingDinoDetector:
        from transformers import AutoProcessor, GroundingDinoForObjectDetection

        model: Any = GroundingDinoForObjectDetection.from_pretrained(name, dtype=torch.float32)
        return cls(model.to(device), AutoProcessor.from_pretrained(name, trust_remote_code=False))

    def detect(
        self, images: Sequence[ImageSource], phrases: Sequence[Sequence[str]]
    ) -> list[Detections]:
        return [self._of_image(*pair) for pair in zip(images, phrases, strict=True)]

    @torch.inference_mode()
    def _of_image(self, image: ImageSource, phrases: Sequence[str]) -> Detections:
        prepared = self.processor.image_processor(open_image(image), return_tensors="pt")
        parts = [self._of_text(prepared, texts) for texts in self._texts(phrases)]
        return Detections(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _of_text(self, prepared: Any, phrases: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """Finds boxes float[K, 4] and scores float[K, Q]; None is not asked, scores 0."""
        device = self.model.device
        text, spans = _one_text(phrases)
        encoded = self.processor.tokenizer(
            text, return_tensors="pt", return_offsets_mapping=True, truncation=True,
            max_length=self.model.config.max_text_len,
        )  # fmt: skip
        offsets = encoded.pop("offset_mapping")[0]
        output = self.model(**encoded.to(device), **prepared.to(device))
        probabilities = output.logits[0, :, : len(offsets)].sigmoid().float().cpu()
        scores = torch.zeros(len(probabilities), len(phrases))
        for column, span in enumerate(spans):
            own = _tokens_in(offsets, span)
            if own.any():
                scores[:, column] = probabilities[:, own].amax(dim=1)
        return to_corners(output.pred_boxes[0]), scores

    def _texts(self, phrases: Sequence[str]) -> list[list[str | None]]:
        """Splits the phrases into texts that fit the model's length.

        Each text is a list as long as `phrases`, with None where another text has the phrase.
        """
        room = self.model.config.max_text_len - 2  # [CLS] and [SEP]
        texts: list[list[str | None]] = []
        used = room
        for position, phrase in enumerate(phrases):
            length = len(self.processor.tokenizer(f"{phrase} .", add_special_tokens=False)[0])
            if used + length > room:
                texts.append([None] * len(phrases))
                used = 0
            texts[-1][position] = phrase
            used += length
        return texts


def corner_square(image: ImageSource, size: int) -> tuple[Image.Image, tuple[int, int]]:
    """Lays the image, its long side `size`, in the top left corner of a grey square.

    Returns:
        the square, and the image's width and height in it in pixels.
    """
    picture = open_image(image)
    scale = size / max(picture.size)
    resized_wh = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    square = Image.new("RGB", (size, size), _GREY)
    square.paste(picture.resize(resized_wh, Image.Resampling.BICUBIC))
    return square, resized_wh


def to_corners(cxcywh: Tensor, width_scale: float = 1.0, height_scale: float = 1.0) -> Tensor:
    """Turns boxes of the model's input into xyxy boxes, normalised to the upright image.

    Args:
        cxcywh: float[K, 4], centre and size in shares of the model's input.
        width_scale, height_scale: side of the input over the side of the image in it.
    """
    cx, cy, w, h = cxcywh.float().cpu().unbind(-1)
    xyxy = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1)
    return xyxy * torch.tensor([width_scale, height_scale] * 2)


def _one_text(phrases: Sequence[str | None]) -> tuple[str, list[tuple[int, int]]]:
    """Joins phrases as `a dog . a cat .`, with the place of each: (start, stop), or (0, 0)."""
    text, spans = "", []
    for phrase in phrases:
        start = len(text)
        text += f"{phrase} . " if phrase is not None else ""
        spans.append((start, start + len(phrase)) if phrase is not None else (0, 0))
    return text, spans


def _tokens_in(offsets: Tensor, span: tuple[int, int]) -> Tensor:
    """Marks the tokens (`offsets: int64[T, 2]`) inside a span: bool[T]; special ones are empty."""
    start, stop = offsets.unbind(1)
    return (start >= span[0]) & (stop <= span[1]) & (stop > start)
