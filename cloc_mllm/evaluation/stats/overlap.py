"""Overlap of boxes without torch, so that scoring starts in a moment. Letters: Q queries.

Equal to `geometry.elementwise_iou`; boxes may be in any frame, both sides in the same one.
"""

from __future__ import annotations

import numpy as np


def paired_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of `a[q]` with `b[q]`: float[Q, 4] x float[Q, 4] xyxy -> float64[Q], in [0, 1].

    0 where either box is inverted, has no area or is not finite. Never raises on numbers: sides
    are divided by a power of two first, so tiny boxes do not vanish and usual ones are unchanged.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    usable = np.isfinite(a).all(1) & np.isfinite(b).all(1)
    a, b = np.where(usable[:, None], a, 0), np.where(usable[:, None], b, 0)
    largest = np.abs(np.hstack([a, b])).reshape(-1, 4, 2).max(1)  # [Q, (x, y)]
    halved = np.tile(np.where(largest > 2.0**1022, 0.5, 1.0), 2)  # no side overflows
    a, b = a * halved, b * halved
    overlap = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])  # [Q, (w, h)]
    sides_a, sides_b = a[:, 2:] - a[:, :2], b[:, 2:] - b[:, :2]
    sides = np.stack([overlap, sides_a, sides_b])
    usable &= (sides > 0).all((0, 2))
    exponent = np.frexp(np.maximum(sides_a, sides_b))[1]
    inner, area_a, area_b = np.ldexp(np.where(usable[:, None], sides, 0), -exponent).prod(2)
    union = area_a + area_b - inner
    return np.divide(inner, union, out=np.zeros(len(a)), where=union > 0)
