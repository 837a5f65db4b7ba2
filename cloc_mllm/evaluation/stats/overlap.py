"""Overlap of boxes without torch, so that scoring starts in a moment. Letters: Q queries."""

from __future__ import annotations

import numpy as np


def paired_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of `a[q]` with `b[q]`: float[Q, 4] x float[Q, 4] xyxy -> float[Q], in the boxes' dtype.

    0 where either box is inverted or has no area. Equal to `geometry.elementwise_iou`; boxes may
    be in any frame, both sides in the same one.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # answers may hold any number
        inner = _area(np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:]))
        union = _area(a[:, :2], a[:, 2:]) + _area(b[:, :2], b[:, 2:]) - inner
        return np.divide(inner, union, out=np.zeros_like(inner), where=union > 0)


def _area(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """float[Q]; 0 between corners that are swapped in x or y."""
    return np.clip(high - low, 0, None).prod(1)


def paired_giou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Generalised IoU (Rezatofighi et al. 2019) of `a[q]` with `b[q]`, in -1..1: the IoU minus the
    share of the box around both that neither covers. Arguments are those of `paired_iou`."""
    with np.errstate(over="ignore", invalid="ignore"):
        inner = _area(np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:]))
        union = _area(a[:, :2], a[:, 2:]) + _area(b[:, :2], b[:, 2:]) - inner
        around = _area(np.minimum(a[:, :2], b[:, :2]), np.maximum(a[:, 2:], b[:, 2:]))
        gap = np.divide(around - union, around, out=np.zeros_like(inner), where=around > 0)
    return paired_iou(a, b) - gap
