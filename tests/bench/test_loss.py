from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch

import loss
from loss import check_equal, full_matrix_loss, random_regions
from memory import extra_peak_mib


def test_both_sides_compute_the_same() -> None:
    check_equal(100, 32)
    inputs = random_regions(100)
    once, twice = (full_matrix_loss(*inputs, both_products=both) for both in (False, True))
    torch.testing.assert_close(once, twice)


def test_the_gate_finds_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "THRESHOLD", 1.0)
    other = functools.partial(loss.contrastive_loss, same_text_threshold=0.9)
    monkeypatch.setattr(loss, "contrastive_loss", lambda *inputs, tile_rows: other(*inputs[:3]))
    with pytest.raises(AssertionError):
        check_equal(100, 32)


def prepare(mib: int) -> Callable[[], object]:
    return lambda: np.ones(mib * 2**17)


def test_peak_memory_is_that_of_the_work() -> None:
    assert extra_peak_mib(functools.partial(prepare, 64)) == pytest.approx(64, abs=4)
