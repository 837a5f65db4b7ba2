"""Makes packed batches of stage 1 from records.

Letters: B images, S canvas side, R regions of the batch, P distinct phrases, T tokens.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cloc_mllm.config import RegionTexts
from cloc_mllm.data.english import mirrored
from cloc_mllm.data.feature_cache import FeatureCache
from cloc_mllm.data.records import Record, Region
from cloc_mllm.data.shapes import SHAPE_KINDS, boxes_mask, sample_shape
from cloc_mllm.data.transforms import Preprocessing
from cloc_mllm.geometry import Boxes, CanvasTransform
from cloc_mllm.models.vision_encoder import TowerOutputs


@dataclass
class ClocBatch:
    """One rank's batch; regions are packed, never padded (contract C4).

    Attributes:
        pixel_values: uint8[B, 3, S, S] from the collator, a quarter of the bytes to pass between
            processes; `to` turns them into the normalised float32 that `preprocessing` says. Out
            of a feature cache: what the frozen tower made of them (`TowerOutputs`).
        caption_input_ids: int64[C, T], one for each image that has any caption. Out of a feature
            cache: float[C, W], what the frozen text tower made of them; likewise the phrases.
        caption_image_index: int64[C].
        phrase_input_ids: int64[P, T'], each distinct phrase of the batch once.
        boxes: float[R, 4] xyxy, canvas frame.
        region_image_index, region_phrase_index: int64[R].
        phrase_boxes: float[K, 4], all boxes of a region's image that its phrase names, of every
            region, in their order; K is R or more.
        phrase_box_region: int64[K], the region whose phrase it is.
        ids: the records' ids, in order.
        phrase_log_prior: float[P], see `log_prior_of_texts`; None if the model learns none of it.
        region_masks: float[F, H, W], masks (canvas frame) that prompt instead of a box.
        masked_regions: int64[F], the regions they stand for.
        preprocessing: the model's; None if the pixels are normalised already.
        made: the batch on the CPU, if this one was moved.
    """

    pixel_values: Tensor | TowerOutputs
    caption_input_ids: Tensor
    caption_image_index: Tensor
    phrase_input_ids: Tensor
    boxes: Tensor
    region_image_index: Tensor
    region_phrase_index: Tensor
    phrase_boxes: Tensor
    phrase_box_region: Tensor
    ids: list[str]
    phrase_log_prior: Tensor | None = None
    region_masks: Tensor = field(default_factory=lambda: torch.zeros(0, 1, 1))
    masked_regions: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    preprocessing: Preprocessing | None = None
    made: ClocBatch | None = None

    @property
    def on_host(self) -> ClocBatch:
        """The batch as the collator made it."""
        return self.made or self

    def to(self, device: torch.device | str) -> ClocBatch:
        batch = self._each(lambda tensor: tensor.to(device, non_blocking=True))
        batch.made = self.on_host
        if self.preprocessing is not None:
            assert isinstance(batch.pixel_values, Tensor)
            batch.pixel_values = self.preprocessing.normalize(batch.pixel_values)
            batch.preprocessing = None
        return batch

    def pin_memory(self) -> ClocBatch:
        """Pins the tensors, for `DataLoader(pin_memory=True)`, which looks for this method."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Any], Any]) -> ClocBatch:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        names = [name for name, x in values.items() if isinstance(x, Tensor | TowerOutputs)]
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return replace(self, **changed)


class ClocCollator:
    """Makes a `ClocBatch` of `(sample_seed, Record)` items; the seed alone decides random choices.

    Args:
        preprocessing: the model's.
        regions_per_image: M of equation 2, drawn without replacement; 0 takes all.
        flip: whether half of the images are mirrored, with `left` and `right` in their texts.
        free_form_share: share of regions that get a mask (see `Stage1DataConfig`).
        region_texts: which of its texts a region is paired with (see `Stage1DataConfig`).
        features: what the frozen image tower made of the pictures, which are then not decoded.
        log_prior: of each text, see `log_prior_of_texts`; None leaves it out of the batch.
    """

    def __init__(  # noqa: PLR0913  the settings of a batch
        self,
        tokenizer: Callable[[list[str]], Tensor],
        preprocessing: Preprocessing,
        regions_per_image: int = 4,
        flip: bool = False,
        free_form_share: float = 0.0,
        features: FeatureCache | None = None,
        region_texts: RegionTexts = "phrase",
        log_prior: Mapping[str, float] | None = None,
    ) -> None:
        self.features = features
        self.region_texts = region_texts
        self.log_prior = log_prior
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing
        self.regions_per_image = regions_per_image
        self.flip = flip
        self.free_form_share = free_form_share

    def __call__(self, items: Sequence[tuple[int, Record]]) -> ClocBatch:
        pixels: list[Tensor] = []
        kept: list[dict[str, Tensor]] = []
        captions: list[str] = []
        caption_index: list[int] = []
        boxes: list[Tensor] = []
        image_index: list[int] = []
        phrases: dict[str, int] = {}
        log_prior: dict[str, float] = {}
        phrase_index: list[int] = []
        named: list[Tensor] = []
        masks: dict[int, Tensor] = {}
        for position, (seed, record) in enumerate(items):
            rng, flip = self._draw_flip(seed)
            transform = self.preprocessing.transform(record.width, record.height, flip=flip)
            if self.features is None:
                pixels.append(self.canvas(record, flip=flip))
            else:
                kept.append(self.features.load(record, mirrored=flip))
            if record.captions:
                caption = record.captions[rng.integers(len(record.captions))]
                captions.append(mirrored(caption) if flip else caption)
                caption_index.append(position)
            regions = self._draw(record.regions, rng)
            for i, region in enumerate(regions):
                if self.free_form_share and rng.random() < self.free_form_share:
                    masks[len(image_index) + i] = _mask(region, record, transform, rng)
            xyxy = [region.box for region in regions]
            boxes.append(transform.to_canvas(Boxes.normalized(xyxy)).xyxy.float())
            image_index += [position] * len(regions)
            for region in regions:
                texts = texts_of(region, self.region_texts)
                text = texts[rng.integers(len(texts))] if len(texts) > 1 else texts[0]
                shown = mirrored(text) if flip else text
                phrase_index.append(phrases.setdefault(shown, len(phrases)))
                if self.log_prior is not None:
                    log_prior.setdefault(shown, self.log_prior[text])
                same = [r.box for r in record.regions if text in texts_of(r, self.region_texts)]
                named.append(transform.to_canvas(Boxes.normalized(same)).xyxy.float())
        return ClocBatch(
            pixel_values=torch.stack(pixels) if self.features is None else stack_outputs(kept),
            caption_input_ids=self.tokenizer(captions),
            caption_image_index=torch.tensor(caption_index, dtype=torch.long),
            phrase_input_ids=self.tokenizer(list(phrases)),
            boxes=torch.cat(boxes),
            region_image_index=torch.tensor(image_index, dtype=torch.long),
            region_phrase_index=torch.tensor(phrase_index, dtype=torch.long),
            phrase_boxes=torch.cat([torch.zeros(0, 4), *named]),
            phrase_box_region=torch.arange(len(named)).repeat_interleave(
                torch.tensor([len(same) for same in named], dtype=torch.long)
            ),
            ids=[record.id for _, record in items],
            phrase_log_prior=None
            if self.log_prior is None
            else torch.tensor([*log_prior.values()]),
            preprocessing=self.preprocessing if self.features is None else None,
            **_packed_masks(masks),
        )

    def is_mirrored(self, seed: int) -> bool:
        """Whether the image of a sample's seed is mirrored."""
        return self._draw_flip(seed)[1]

    def canvas(self, record: Record, *, flip: bool) -> Tensor:
        """The picture of a record on the model's canvas: uint8[3, S, S]."""
        transform = self.preprocessing.transform(record.width, record.height, flip=flip)
        image = record.load_image(wanted_side=transform.wanted_side)
        return self.preprocessing.canvas(image, transform)

    def _draw_flip(self, seed: int) -> tuple[np.random.Generator, bool]:
        rng = np.random.default_rng(seed)
        return rng, self.flip and bool(rng.random() < 0.5)

    def _draw(self, regions: list[Region], rng: np.random.Generator) -> list[Region]:
        if not self.regions_per_image or len(regions) <= self.regions_per_image:
            return regions
        chosen = rng.choice(len(regions), self.regions_per_image, replace=False)
        return [regions[i] for i in chosen]


def texts_of(region: Region, which: RegionTexts) -> list[str]:
    """The texts that a region may be paired with, in lower case, each once."""
    texts = [region.phrase, *(region.expressions if which == "all" else [])]
    return list(dict.fromkeys(text.lower() for text in texts))


def log_prior_of_texts(
    records: Iterable[Record], which: RegionTexts, power: float
) -> dict[str, float]:
    """Makes `power` times the log of how often each text is paired with a region; one of `n` texts
    of a region counts 1 / n."""
    counts: defaultdict[str, float] = defaultdict(float)
    for region in (region for record in records for region in record.regions):
        texts = texts_of(region, which)
        for text in texts:
            counts[text] += 1 / len(texts)
    return {text: power * math.log(count) for text, count in counts.items()}


def stack_outputs(kept: Sequence[dict[str, Tensor]]) -> TowerOutputs:
    """Makes a batch of what `FeatureCache` holds of each picture: `pooled`, `scale0`, ..."""
    scales = sorted(name for name in kept[0] if name != "pooled")
    return TowerOutputs(
        torch.stack([of["pooled"] for of in kept]),
        tuple(torch.stack([of[name] for of in kept]) for name in scales),
    )


def _mask(
    region: Region, record: Record, transform: CanvasTransform, rng: np.random.Generator
) -> Tensor:
    """Draws a shape in the region's box, or all boxes that its phrase names together."""
    group = [r.box for r in record.regions if region.group and r.group == region.group]
    canvas = transform.to_canvas(Boxes.normalized(group or [region.box])).xyxy.tolist()
    if len(canvas) > 1:
        return boxes_mask(canvas)
    return sample_shape(SHAPE_KINDS[rng.integers(len(SHAPE_KINDS))], canvas[0], rng)


def _packed_masks(masks: dict[int, Tensor]) -> dict[str, Any]:
    """Packs masks, by the region they stand for, into the batch's two tensors."""
    if not masks:
        return {}
    return {
        "region_masks": torch.stack(list(masks.values())),
        "masked_regions": torch.tensor(list(masks), dtype=torch.long),
    }
