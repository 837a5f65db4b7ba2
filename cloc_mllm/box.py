"""A box as four numbers, and the check that makes it usable."""

from __future__ import annotations

import math
from collections.abc import Sequence

Box = tuple[float, float, float, float]  # xyxy, normalised to the original image


def clip_box(
    xyxy_px: Sequence[float], width: float, height: float, min_size_px: float = 1.0
) -> tuple[Box | None, str | None]:
    """Clips a pixel box to its image and normalises it, or says why it cannot be used.

    Returns `(box, None)` or `(None, reason)` with reason one of `not_finite`, `inverted`,
    `zero_area`, `outside` (no overlap with the image), `too_small` (a clipped side is under
    `min_size_px`).
    """
    x1, y1, x2, y2 = (float(value) for value in xyxy_px)
    if not all(math.isfinite(value) for value in (x1, y1, x2, y2)):
        return None, "not_finite"
    if x2 < x1 or y2 < y1:
        return None, "inverted"
    if x2 == x1 or y2 == y1:
        return None, "zero_area"
    left, right = max(x1, 0.0), min(x2, float(width))
    top, bottom = max(y1, 0.0), min(y2, float(height))
    if right <= left or bottom <= top:
        return None, "outside"
    if right - left < min_size_px or bottom - top < min_size_px:
        return None, "too_small"
    return (left / width, top / height, right / width, bottom / height), None
