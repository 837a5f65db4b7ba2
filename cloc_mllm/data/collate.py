"""Makes packed batches of stage 1 from records.

Letters: B images, S canvas side, R regions of the batch, P distinct phrases, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cloc_mllm.data.records import Record, Region
from cloc_mllm.data.shapes import SHAPE_KINDS, boxes_mask, sample_shape
from cloc_mllm.data.tokenizer import TextTokenizer
from cloc_mllm.data.transforms import PADDING_RGB, image_to_pixels, normalize_pixels
from cloc_mllm.geometry import Boxes, Letterbox


@dataclass
class ClocBatch:
    """One rank's batch; regions are packed, never padded (contract C4).

    Attributes:
        pixel_values: uint8[B, 3, S, S] from the collator, a quarter of the bytes to pass between
            processes; `to` turns them into the model's normalised float32.
        caption_input_ids: int64[C, T], one for each image that has any caption.
        caption_image_index: int64[C].
        phrase_input_ids: int64[P, T'], each distinct phrase of the batch once.
        boxes: float[R, 4] xyxy, canvas frame.
        region_image_index, region_phrase_index: int64[R].
        ids: the records' ids, in order.
        region_masks: float[F, H, W], masks (canvas frame) that prompt instead of a box.
        masked_regions: int64[F], the regions they stand for.
        made: the batch on the CPU, if this one was moved.
    """

    pixel_values: Tensor
    caption_input_ids: Tensor
    caption_image_index: Tensor
    phrase_input_ids: Tensor
    boxes: Tensor
    region_image_index: Tensor
    region_phrase_index: Tensor
    ids: list[str]
    region_masks: Tensor = field(default_factory=lambda: torch.zeros(0, 1, 1))
    masked_regions: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    made: ClocBatch | None = None

    @property
    def on_host(self) -> ClocBatch:
        """The batch as the collator made it."""
        return self.made or self

    def to(self, device: torch.device | str) -> ClocBatch:
        batch = self._each(lambda tensor: tensor.to(device, non_blocking=True))
        batch.made = self.on_host
        if batch.pixel_values.dtype == torch.uint8:
            batch.pixel_values = normalize_pixels(batch.pixel_values)
        return batch

    def pin_memory(self) -> ClocBatch:
        """Pins the tensors, for `DataLoader(pin_memory=True)`, which looks for this method."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> ClocBatch:
        names = [item.name for item in fields(self) if item.name not in ("ids", "made")]
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return replace(self, **changed)


class ClocCollator:
    """Makes a `ClocBatch` of `(sample_seed, Record)` items; the seed alone decides random choices.

    Args:
        regions_per_image: M of equation 2, drawn without replacement; 0 takes all.
        flip: whether half of the images are mirrored.
        free_form_share: share of regions that get a mask (see `Stage1DataConfig`).
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        image_size: int,
        regions_per_image: int = 4,
        flip: bool = False,
        free_form_share: float = 0.0,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.regions_per_image = regions_per_image
        self.flip = flip
        self.free_form_share = free_form_share

    def __call__(self, items: Sequence[tuple[int, Record]]) -> ClocBatch:
        pixels: list[Tensor] = []
        captions: list[str] = []
        caption_index: list[int] = []
        boxes: list[Tensor] = []
        image_index: list[int] = []
        phrases: dict[str, int] = {}
        phrase_index: list[int] = []
        masks: dict[int, Tensor] = {}
        for position, (seed, record) in enumerate(items):
            rng = np.random.default_rng(seed)
            flip = self.flip and bool(rng.random() < 0.5)
            letterbox = Letterbox(record.width, record.height, self.image_size, flip)
            image = record.load_image(wanted_side=self.image_size)
            pixels.append(image_to_pixels(letterbox.apply(image, PADDING_RGB)))
            if record.captions:
                captions.append(record.captions[rng.integers(len(record.captions))])
                caption_index.append(position)
            regions = self._draw(record.regions, rng)
            for i, region in enumerate(regions):
                if self.free_form_share and rng.random() < self.free_form_share:
                    masks[len(image_index) + i] = _mask(region, record, letterbox, rng)
            xyxy = [region.box for region in regions]
            boxes.append(letterbox.to_canvas(Boxes.normalized(xyxy)).xyxy.float())
            image_index += [position] * len(regions)
            phrase_index += [phrases.setdefault(r.phrase.lower(), len(phrases)) for r in regions]
        return ClocBatch(
            pixel_values=torch.stack(pixels),
            caption_input_ids=self.tokenizer(captions),
            caption_image_index=torch.tensor(caption_index, dtype=torch.long),
            phrase_input_ids=self.tokenizer(list(phrases)),
            boxes=torch.cat(boxes),
            region_image_index=torch.tensor(image_index, dtype=torch.long),
            region_phrase_index=torch.tensor(phrase_index, dtype=torch.long),
            ids=[record.id for _, record in items],
            **_packed_masks(masks),
        )

    def _draw(self, regions: list[Region], rng: np.random.Generator) -> list[Region]:
        if not self.regions_per_image or len(regions) <= self.regions_per_image:
            return regions
        chosen = rng.choice(len(regions), self.regions_per_image, replace=False)
        return [regions[i] for i in chosen]


def _mask(region: Region, record: Record, letterbox: Letterbox, rng: np.random.Generator) -> Tensor:
    """Draws a shape in the region's box, or all boxes that its phrase names together."""
    group = [r.box for r in record.regions if region.group and r.group == region.group]
    canvas = letterbox.to_canvas(Boxes.normalized(group or [region.box])).xyxy.tolist()
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
