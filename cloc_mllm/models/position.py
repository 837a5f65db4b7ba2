"""Sinusoidal codes of coordinates, and the grid of cells that image tokens stand for."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import masks_to_boxes


def at_least_float32(x: Tensor) -> Tensor:
    """Converts half precisions to float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def sinusoidal_code(coordinates: Tensor, dim: int, max_frequency: float = 64.0) -> Tensor:
    """Codes each number in 0..1 by sines and cosines with wavelengths from 4 down to 2/64.

    Args:
        coordinates: float[..., C].
        dim: width of the result, a multiple of 2 * C.

    Returns:
        float[..., dim] in the dtype of the coordinates, but at least float32.

    Raises:
        ValueError: `dim` is no multiple of 2 * C.
    """
    coordinates = at_least_float32(coordinates)
    num_coordinates = coordinates.shape[-1]
    num_frequencies, remainder = divmod(dim, 2 * num_coordinates)
    if remainder or not num_frequencies:
        raise ValueError(f"cannot split a code of width {dim} over {num_coordinates} coordinates")
    exponents = torch.linspace(0, 1, num_frequencies, device=coordinates.device)
    exponents = exponents.to(coordinates.dtype)
    frequencies = 0.5 * (2 * max_frequency) ** exponents
    angles = math.pi * coordinates.unsqueeze(-1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


def token_cells(grid_hw: tuple[int, int], device: torch.device) -> Tensor:
    """The cell of the canvas that each token stands for, row by row: float[N, 4] xyxy, canvas
    frame."""
    height, width = grid_hw
    y, x = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    sides = [x / width, y / height, (x + 1) / width, (y + 1) / height]
    return torch.stack(sides, -1).reshape(-1, 4)


def cell_coverage(boxes: Tensor, cells: Tensor) -> Tensor:
    """The share of each cell that lies in each box: float[R, 4], float[N, 4] -> float[R, N]."""
    a, b = boxes[:, None, :], cells.to(boxes)[None, :, :]
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    areas = (cells[:, 2] - cells[:, 0]) * (cells[:, 3] - cells[:, 1])
    return sides.clamp(min=0).prod(-1) / areas.to(boxes)


def mask_coverage(masks: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """The share of each token's cell that each mask covers: float[R, H, W] in 0..1 -> float[R, N].

    The largest share of a mask is scaled to 1, since a point or a scribble covers little of any
    cell.
    """
    share = F.adaptive_avg_pool2d(at_least_float32(masks), grid_hw).flatten(1)
    return share / share.amax(1, keepdim=True).clamp(min=1e-6)


def mask_boxes(masks: Tensor) -> Tensor:
    """Boxes around what is more than 0 in each mask: float[R, H, W] -> float[R, 4] xyxy, canvas
    frame. No mask is empty."""
    height, width = masks.shape[1:]
    pixels = masks_to_boxes(masks)  # of the first and the last pixel
    left, top, right, bottom = pixels.unbind(-1)
    sides = [left / width, top / height, (right + 1) / width, (bottom + 1) / height]
    return torch.stack(sides, -1)
