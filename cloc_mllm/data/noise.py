"""Spoils labels as a detector might: boxes that miss and phrases that are wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cloc_mllm.box import Box
from cloc_mllm.data.mixture import parts_of
from cloc_mllm.data.records import Record, Region
from cloc_mllm.data.sequences import LazySequence

_SMALLEST_SIDE = 0.01  # smallest side of a jittered box, as a share of the image


class NoisyLabels(LazySequence[Record]):
    """Records whose region labels are wrong to a chosen degree; images and captions stay.

    Each corner coordinate moves by a normal draw with a standard deviation of `noise` times the
    box's side, and with probability `noise` a phrase is replaced by that of a region of another
    record. As with pseudo-labels, a record is wrong in the same way each time it is seen.
    """

    def __init__(self, records: Sequence[Record], noise: float, seed: int) -> None:
        if not 0 <= noise <= 1:
            raise ValueError(f"label noise must lie in 0..1, got {noise}")
        self.records = records
        self.parts = parts_of(records)
        self.noise = noise
        self.seed = seed

    def __len__(self) -> int:
        return len(self.records)

    def _item(self, position: int) -> Record:
        rng = np.random.default_rng([self.seed, position])
        record = self.records[position]
        return replace(record, regions=[self._spoil(region, rng) for region in record.regions])

    def _spoil(self, region: Region, rng: np.random.Generator) -> Region:
        phrase = region.phrase
        if rng.random() < self.noise:
            others = self.records[int(rng.integers(len(self.records)))].regions
            phrase = others[int(rng.integers(len(others)))].phrase if others else phrase
        return replace(region, box=_jitter(region.box, self.noise, rng), phrase=phrase)


def _jitter(box: Box, noise: float, rng: np.random.Generator) -> Box:
    x1, y1, x2, y2 = box
    sides = np.array([x2 - x1, y2 - y1] * 2)
    moved = np.clip(np.array(box) + noise * sides * rng.standard_normal(4), 0, 1)
    low, high = np.minimum(moved[:2], moved[2:]), np.maximum(moved[:2], moved[2:])
    low = np.minimum(low, 1 - _SMALLEST_SIDE)
    left, top, right, bottom = *low, *np.maximum(high, low + _SMALLEST_SIDE)
    return float(left), float(top), float(right), float(bottom)
