"""The images and regions of a batch, and where in its rows they belong.

A block is the N `<image>` tokens of one image in a row. A row has no block (text alone), one or
several. Letters: B rows, T tokens, I distinct images, K blocks, R regions, S canvas side, N tokens
per image, D encoder width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class VisionInputs(NamedTuple):
    """The tensors that the processor makes of images and regions.

    Attributes:
        pixel_values: float[I, 3, S, S]; or float[I, N, D], the tokens that the encoder made of them
            before (`mllm/feature_cache.py`).
        image_frame: float[I, 4], the canvas as a box in the normalised frame of the original image.
        image_index: int64[K], the image of each block; blocks are in the order of tokens, by row.
        region_boxes: float[R, 4], canvas frame.
        region_image_index: int64[R], the block whose image each region lies on. The regions of a
            row are in the order of its `<region>` tokens.
        region_masks: float[R, S, S] over the canvas, the masks of regions that are points or masks,
            and zeros for boxes; None where all regions are boxes.
    """

    pixel_values: Tensor
    image_frame: Tensor
    image_index: Tensor
    region_boxes: Tensor
    region_image_index: Tensor
    region_masks: Tensor | None = None

    @classmethod
    def filled(  # noqa: PLR0913  its fields
        cls,
        num_blocks: int,
        pixel_values: Tensor,
        image_frame: Tensor | None,
        image_index: Tensor | None,
        region_boxes: Tensor | None,
        region_image_index: Tensor | None,
        region_masks: Tensor | None = None,
    ) -> VisionInputs:
        """Fills in what is left out: one image per block, images without padding, no regions."""
        num_images = len(pixel_values)
        if image_index is None:
            if num_images != num_blocks:
                raise ValueError(
                    f"got {num_images} images but the rows have room for {num_blocks}; pass "
                    "image_index, the image of each, when they are not one to one"
                )
            image_index = torch.arange(num_blocks, device=pixel_values.device)
        if image_frame is None:
            image_frame = pixel_values.new_tensor([0.0, 0.0, 1.0, 1.0]).expand(num_images, 4)
        if region_boxes is None or region_image_index is None:
            region_boxes = image_frame.new_zeros(0, 4)
            region_image_index, region_masks = image_index.new_zeros(0), None
        given = (pixel_values, image_frame, image_index, region_boxes, region_image_index)
        return cls(*given, region_masks)

    def repeated(self, times: int, block_rows: Tensor, num_rows: int) -> VisionInputs:
        """Makes the inputs of rows that are each repeated `times` times in place.

        Images are not repeated, only pointed to again.

        Args:
            block_rows: int64[K], see `rows_of_blocks`.
        """
        region_rows = block_rows[self.region_image_index]
        blocks, regions, region_blocks = [], [], []
        num_blocks = 0
        for row in range(num_rows):
            its_blocks = (block_rows == row).nonzero().flatten()
            its_regions = (region_rows == row).nonzero().flatten()
            for _ in range(times):
                blocks.append(its_blocks)
                regions.append(its_regions)
                place = torch.searchsorted(its_blocks, self.region_image_index[its_regions])
                region_blocks.append(num_blocks + place)
                num_blocks += len(its_blocks)
        masks, region_index = self.region_masks, torch.cat(regions)
        return self._replace(
            image_index=self.image_index[torch.cat(blocks)],
            region_boxes=self.region_boxes[region_index],
            region_masks=None if masks is None else masks[region_index],
            region_image_index=torch.cat(region_blocks),
        )


def rows_of_blocks(is_image: Tensor, num_tokens: int) -> Tensor:
    """Returns the row of each block: bool[B, T] -> int64[K].

    Raises:
        ValueError: the `<image>` tokens of a row are not whole blocks of `num_tokens`; names the
            row.
    """
    found = is_image.sum(1)
    broken = (found % num_tokens).nonzero()
    if len(broken):
        row = int(broken[0])
        raise ValueError(
            f"sample {row} has {int(found[row])} <image> tokens but images take {num_tokens} "
            "each; the processor must emit one placeholder per feature (was the text cut?)"
        )
    rows = torch.arange(len(found), device=found.device)
    return rows.repeat_interleave(found // num_tokens)
