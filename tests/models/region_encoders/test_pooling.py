"""Pooling of tokens under boxes and masks against plain loops."""

import pytest
import torch

from cloc_mllm.models.region_encoders.pooling import pool_under_masks
from cloc_mllm.models.region_encoders.roi_align import roi_align_tokens

GRID_HW = (4, 3)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def bilinear(tokens: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """Value at canvas place x, y (0..1); a token's value stands at the middle of its cell."""
    height, width = GRID_HW
    column, row = x * width - 0.5, y * height - 0.5
    total = torch.zeros(tokens.shape[-1], dtype=tokens.dtype)
    for j in range(height):
        for i in range(width):
            # beyond the outermost middles the nearest one counts
            near_x = 1 - abs(min(max(column, 0), width - 1) - i)
            near_y = 1 - abs(min(max(row, 0), height - 1) - j)
            total += max(near_x, 0) * max(near_y, 0) * tokens[j * width + i]
    return total


def test_roi_align_is_the_mean_over_two_samples_a_side_of_three_bins(tokens):
    boxes = torch.tensor([[0.1, 0.2, 0.7, 0.9], [0.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    image_index = torch.tensor([0, 1])
    actual = roi_align_tokens(tokens, GRID_HW, boxes, image_index)
    for r, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        places = [(k + 0.5) / 6 for k in range(6)]
        samples = [
            bilinear(tokens[image_index[r]], x1 + u * (x2 - x1), y1 + v * (y2 - y1))
            for v in places
            for u in places
        ]
        torch.testing.assert_close(actual[r], torch.stack(samples).mean(0))


def test_mask_pooling_weighs_tokens_by_their_share(tokens):
    shares = torch.zeros(2, 12, dtype=torch.float64)
    shares[0, 3], shares[0, 7] = 1.0, 0.25
    shares[1] = 0.5
    actual = pool_under_masks(tokens, shares, torch.tensor([1, 0]))
    torch.testing.assert_close(actual[0], (tokens[1, 3] + 0.25 * tokens[1, 7]) / 1.25)
    torch.testing.assert_close(actual[1], tokens[0].mean(0))
