"""Random batches for model, loss and training tests."""

from __future__ import annotations

import torch

from cloc_mllm.data.collate import ClocBatch
from cloc_mllm.models.cloc import Cloc


def random_batch(
    model: Cloc, regions_of_images: tuple[int, ...] = (2, 0, 3), seed: int = 0
) -> ClocBatch:
    """A packed batch whose i-th image has `regions_of_images[i]` regions, all phrases distinct."""
    generator = torch.Generator().manual_seed(seed)
    num_images, num_regions = len(regions_of_images), sum(regions_of_images)
    size = model.vision.encoder.image_size
    corner = torch.rand(num_regions, 2, generator=generator) * 0.5
    extent = 0.1 + torch.rand(num_regions, 2, generator=generator) * 0.4
    boxes = torch.cat([corner, corner + extent], 1)
    return ClocBatch(
        pixel_values=torch.randn(num_images, 3, size, size, generator=generator),
        caption_input_ids=torch.randint(1, 200, (num_images, 6), generator=generator),
        caption_image_index=torch.arange(num_images),
        phrase_input_ids=torch.randint(1, 200, (num_regions, 3), generator=generator),
        boxes=boxes,
        region_image_index=torch.repeat_interleave(
            torch.arange(num_images), torch.tensor(regions_of_images)
        ),
        region_phrase_index=torch.arange(num_regions),
        phrase_boxes=boxes,
        phrase_box_region=torch.arange(num_regions),
        ids=[str(i) for i in range(num_images)],
        phrase_log_prior=0.1 * torch.arange(num_regions),
    )
