"""Asks CLOC about images: where phrases are, what is in regions, and embeddings of all three.

Letters: B images, R regions, P texts, C names, E embedding width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cloc_mllm.data.images import ImageSource, open_image
from cloc_mllm.data.tokenizer import TextTokenizer
from cloc_mllm.devices import choose_device
from cloc_mllm.geometry import CANVAS, Boxes, CanvasTransform
from cloc_mllm.hub import upload_model
from cloc_mllm.inference.inputs import (
    EncodedImage,
    ImageInput,
    RegionsInput,
    as_list,
    check_regions,
)
from cloc_mllm.inference.results import GroundingResult
from cloc_mllm.models.build import load_cloc
from cloc_mllm.models.cloc import Cloc
from cloc_mllm.models.phrases import Phrases
from cloc_mllm.models.region_encoders.pooling import pool_under_boxes
from cloc_mllm.models.region_encoders.roi_align import roi_align_tokens
from cloc_mllm.models.vision_encoder import ImageFeatures, VisionEncoder
from cloc_mllm.shipped import find_model

_BATCH_SIZE = 64
_MAX_KNOWN_LISTS, _MAX_KNOWN_TEXTS = 32, 256  # lists of texts whose features are kept, and in each


class ClocPredictor:
    """Holds a CLOC model, its tokenizer and, if it has one, its list of phrases.

    An image is whatever `open_image` takes (a path, the bytes of a file, a PIL image, an array), or
    what `encode` returned, which spares its encoding. Boxes, points and masks are in the frame of
    the upright picture: a photo with an EXIF orientation is turned first. Every method that takes
    an image raises `ImageError` if it cannot be used.

    The features of the texts that were asked last are kept: after a change of the model's weights,
    make a new predictor.

    Example:
        predictor = ClocPredictor.from_pretrained("runs/stage1/model")
        image = predictor.encode("photo.jpg")
        predictor.locate(image, ["a crab", "a clock"]).boxes.to_pixels()
        predictor.classify(image, Boxes.pixels([[10, 20, 90, 140]], 640, 480), ["crab", "clock"])
    """

    def __init__(
        self, model: Cloc, tokenizer: TextTokenizer, phrases: Phrases | None = None
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.phrases = phrases
        self._known_texts: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()
        self.directory: Path | None = None  # where the model was loaded from

    @classmethod
    def from_pretrained(
        cls, directory: str | Path | None = None, *, device: torch.device | str | None = None
    ) -> ClocPredictor:
        """Loads a model directory of stage 1.

        Args:
            directory: or the name of a shipped model, `photos` or `scenes`, or `hf-hub:OWNER/NAME`;
                None is `photos`.
            device: None takes a GPU if there is one.

        Raises:
            FileNotFoundError: there is no model in the directory, or none ships.
        """
        from transformers.initialization import no_init_weights

        found = find_model("cloc", directory)
        with no_init_weights():  # drawing weights takes longer than reading those that replace them
            model, tokenizer, _ = load_cloc(found, choose_device(device))
        predictor = cls(model, tokenizer, Phrases.load(found))
        predictor.directory = found
        return predictor

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None
    ) -> str:
        """Uploads the directory that the model was loaded from; see `hub.upload_model`."""
        return upload_model(self.directory, repo_id, private=private, token=token)

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    @torch.inference_mode()
    def encode(self, image: ImageInput) -> EncodedImage:
        """Encodes an image once for any number of prompts."""
        if isinstance(image, EncodedImage):
            image.check_encoder(self._encoder)
            return image
        picture = open_image(image)
        features = self._encode_pictures([picture])
        prepared = self.model.vision.region_encoder.prepare(features)
        return EncodedImage(picture, prepared, self._encoder)

    @torch.inference_mode()
    def locate(self, image: ImageInput, phrases: str | Sequence[str]) -> GroundingResult:
        """Finds each phrase by CLOC's own text prompt and box head: one box per phrase.

        Boxes are clipped to the picture; a score is the cosine of the phrase and its box.
        """
        encoded, phrases = self.encode(image), as_list(phrases)
        texts = self._encode_text(phrases)
        canvas = self.model.locate(encoded.features, texts, self._all_first(len(texts)))
        boxes = self._transform_of(encoded).to_original(Boxes(canvas, CANVAS)).xyxy.clamp(0, 1)
        embedded = self._embed_canvas(encoded.features, canvas)
        return GroundingResult(
            encoded.image,
            Boxes.normalized(boxes.cpu(), encoded.image.size),
            (embedded * F.normalize(texts, dim=-1)).sum(-1).cpu(),
            phrases,
            [""] * len(phrases),
            torch.arange(len(phrases)),
            [None] * len(phrases),
        )

    @torch.inference_mode()
    def classify(
        self, image: ImageInput, regions: RegionsInput, names: Sequence[str]
    ) -> GroundingResult:
        """Gives each region the most probable of the names.

        Args:
            regions: see `embed_regions`.

        Returns:
            R labels and their scores; `probabilities: float[R, C]` of all names, whose rows add up
            to one.

        Raises:
            ValueError: there is no name, or a region cannot be used.
        """
        names = as_list(names)
        if not names:
            raise ValueError("classify needs at least one name")
        encoded = self.encode(image)
        boxes, masks = check_regions(regions, encoded.image.size)
        embedded = self._embed_checked(encoded, boxes, masks)
        similarity = embedded @ self.embed_text(names).T
        probabilities = (self.model.region_scale * similarity).softmax(-1).cpu()
        scores, best = probabilities.max(-1)
        return GroundingResult(
            encoded.image,
            boxes,
            scores,
            [names[index] for index in best.tolist()],
            [""] * len(boxes),
            torch.arange(len(boxes)),
            [None] * len(boxes),
            probabilities,
        )

    @torch.inference_mode()
    def closest(
        self,
        image: ImageInput,
        regions: RegionsInput,
        names: Sequence[str] | None = None,
        count: int = 5,
    ) -> GroundingResult:
        """Finds the phrases whose embeddings are closest to each region's.

        Args:
            regions: see `embed_regions`.
            names: what to choose from, by the cosine alone; None takes the list of phrases that the
                model has, some thousand of them for the shipped `photos`. Of two phrases of that
                list that fit as well, the one that is said more often is the likelier name.
            count: phrases per region, or as many as there are.

        Returns:
            `count` rows per region, the likeliest first: its box, the phrase, and the cosine in
            -1..1 as the score. `result[i]` holds those of region i.

        Raises:
            ValueError: there is no name, the model has no list, or a region cannot be used.
        """
        phrases = self.phrases
        if names is not None:
            phrases = Phrases(as_list(names), self.embed_text(names), self.model.region_scale)
        if phrases is None or not phrases.texts:
            raise ValueError(
                "there is nothing to choose from; give at least one name, or give the model a list "
                "of phrases: cloc-mllm phrases --cloc DIR --data RECORDS"
            )
        encoded = self.encode(image)
        boxes, masks = check_regions(regions, encoded.image.size)
        embedded = self._embed_checked(encoded, boxes, masks)
        similarity = embedded @ phrases.embeddings.to(self.device).T
        likely = phrases.log_odds(similarity)
        order = likely.topk(min(count, len(phrases.texts))).indices
        index = torch.arange(len(boxes)).repeat_interleave(order.shape[1])
        return GroundingResult(
            encoded.image,
            Boxes(boxes.xyxy[index], boxes.frame),
            similarity.gather(1, order).flatten().cpu(),
            [phrases.texts[i] for i in order.flatten().tolist()],
            [""] * len(boxes),
            index,
            [None] * len(boxes),
        )

    @torch.inference_mode()
    def embed_regions(self, image: ImageInput, regions: RegionsInput) -> Tensor:
        """Embeds regions: float[R, E], each of unit length.

        Args:
            regions: boxes, or a list of boxes, points and masks (`models.region_like`).
                Boxes are clipped to the picture. A model that learnt no points and masks
                (`model.prompter.free_form` of stage 1) reads the box around them, too.

        Raises:
            ValueError: a region cannot be used; see `check_regions`.
        """
        encoded = self.encode(image)
        return self._embed_checked(encoded, *check_regions(regions, encoded.image.size))

    @torch.inference_mode()
    def pool_regions(
        self, image: ImageInput, boxes: Boxes, by: Literal["roi_align", "mean"]
    ) -> Tensor:
        """Embeds boxes by CLIP's projected tokens alone, to compare `embed_regions` with.

        Args:
            boxes: R boxes in any frame of the upright picture.
            by: `mean` averages the tokens below a box by the share of each that it covers, as a
                plain CLIP would; `roi_align` averages RoI-Align's bins.

        Returns:
            float[R, E], each of unit length.
        """
        encoded = self.encode(image)
        features = encoded.features
        checked, _ = check_regions(boxes, encoded.image.size)
        canvas = self._transform_of(encoded).to_canvas(checked).xyxy.to(self.device, torch.float32)
        tokens = self._encoder.project_tokens(features.tokens)
        if by == "mean":
            pooled = pool_under_boxes(tokens, features, canvas, self._all_first(len(canvas)))
        else:
            index = self._all_first(len(canvas))
            pooled = roi_align_tokens(tokens, features.grid_hw, canvas, index)
        return F.normalize(pooled.float(), dim=-1)

    @torch.inference_mode()
    def similarity_map(self, image: ImageInput, phrase: str) -> Tensor:
        """Compares a phrase with each image token, read out as if it were a region.

        Returns:
            float[H, W] of the upright picture: cosines in -1..1, interpolated between the tokens.
        """
        encoded = self.encode(image)
        texts = self._encode_text([phrase])
        cosines = self.model.vision.region_encoder.similarity(encoded.features, texts)
        width, height = encoded.image.size
        rows, columns = encoded.features.grid_hw
        whole = self._transform_of(encoded).to_canvas(Boxes.normalized([[0.0, 0.0, 1.0, 1.0]]))
        left, top, right, bottom = whole.xyxy[0].tolist()
        x = torch.linspace(left, right, 2 * width + 1)[1::2]  # the middles of the pixels
        y = torch.linspace(top, bottom, 2 * height + 1)[1::2]
        places = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1) * 2 - 1
        grid = cosines.float().cpu().view(1, 1, rows, columns)
        return F.grid_sample(
            grid, places[None], "bilinear", padding_mode="border", align_corners=False
        )[0, 0]

    @torch.inference_mode()
    def embed_image(self, images: ImageSource | Sequence[ImageSource]) -> Tensor:
        """Embeds whole images as CLIP does: float[B, E], each of unit length."""
        sources = [images] if isinstance(images, ImageSource) else list(images)
        parts = [torch.empty(0, self.model.vision.embed_dim, device=self.device)]
        for start in range(0, len(sources), _BATCH_SIZE):
            pictures = [open_image(source) for source in sources[start : start + _BATCH_SIZE]]
            parts.append(self._encode_pictures(pictures).image_features)
        return F.normalize(torch.cat(parts), dim=-1)

    @torch.inference_mode()
    def embed_text(self, texts: str | Sequence[str]) -> Tensor:
        """Embeds texts as CLIP does: float[P, E], each of unit length."""
        return F.normalize(self._encode_text(as_list(texts)), dim=-1)

    @property
    def _encoder(self) -> VisionEncoder:
        return self.model.vision.encoder

    def _encode_pictures(self, pictures: Sequence[Image.Image]) -> ImageFeatures:
        pixels = [self._encoder.preprocessing(picture)[0] for picture in pictures]
        return self.model.encode_image(torch.stack(pixels).to(self.device))

    def _encode_text(self, texts: Sequence[str]) -> Tensor:
        """Features of a list of texts: float[P, E], not normalised; those of the last are known."""
        asked = tuple(texts)
        features = self._known_texts.pop(asked, None)
        if features is None:
            features = self.model.encode_text(self.tokenizer(texts).to(self.device))
        if len(asked) <= _MAX_KNOWN_TEXTS:
            self._known_texts[asked] = features
        if len(self._known_texts) > _MAX_KNOWN_LISTS:
            self._known_texts.popitem(last=False)
        return features.to(self.device)

    def _embed_checked(
        self, encoded: EncodedImage, boxes: Boxes, masks: Sequence[Tensor | None]
    ) -> Tensor:
        transform = self._transform_of(encoded)
        embedded = self._embed_canvas(encoded.features, transform.to_canvas(boxes).xyxy)
        drawn = [mask for mask in masks if mask is not None]
        if not drawn:
            return embedded
        canvas = torch.stack([transform.mask_to_canvas(mask) for mask in drawn]).to(self.device)
        z = self.model.vision.embed_masks(encoded.features, canvas, self._all_first(len(drawn)))
        masked = torch.tensor([mask is not None for mask in masks], device=self.device)
        return embedded.index_copy(0, masked.nonzero().flatten(), F.normalize(z, dim=-1))

    def _embed_canvas(self, image: ImageFeatures, boxes: Tensor) -> Tensor:
        boxes = boxes.to(self.device, torch.float32)
        return F.normalize(
            self.model.embed_boxes(image, boxes, self._all_first(len(boxes))), dim=-1
        )

    def _transform_of(self, encoded: EncodedImage) -> CanvasTransform:
        return self._encoder.preprocessing.transform(*encoded.image.size)

    def _all_first(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.long, device=self.device)
