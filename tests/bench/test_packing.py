"""Both sides of the packing benchmark learn from the same rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cloc_mllm.mllm.packing import PackedRow, pad_sequences
from packing import (
    draw_batches,
    language_model,
    matched_sides,
    packed,
    padded,
    padding_share,
)


def test_padding_share() -> None:
    rows = [PackedRow([1] * n, [-100] * n, list(range(n)), [0] * n, [0]) for n in (10, 5, 3)]
    assert padding_share([rows[:2], rows[2:]]) == pytest.approx(1 - 18 / 23)


def test_a_step_of_both_sides_moves_the_weights_alike(tmp_path: Path) -> None:
    """Adam's first step divides a gradient by itself, so that where it is nothing but rounding,
    weights may part by twice the rate: compared are the losses after it, within 1e-4."""
    model, processor = language_model()
    batches = draw_batches(processor, [1, 1, 16], num_batches=1, batch_size=6)
    pad_id = processor.tokenizer.pad_token_id
    assert len(packed(batches[0], pad_id, 512)["input_ids"]) < 6

    ours, theirs = matched_sides(model, batches, pad_id, 512, str(tmp_path))
    before = float(ours.engine(ours.batches[0])["loss"].detach())
    ours()
    theirs()
    inputs = padded(batches[0], pad_id)
    with torch.no_grad():
        actual, expected = (float(side(**inputs).loss) for side in (model, theirs.trainer.model))
    assert expected < before
    assert actual == pytest.approx(expected, abs=1e-4)


def test_other_losses_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = language_model()
    batches = draw_batches(processor, [1, 1, 16], num_batches=1, batch_size=6)
    monkeypatch.setattr("packing.packed", lambda rows, pad, _: pad_sequences([rows[:2]], pad))
    with pytest.raises(ValueError, match="nothing to compare"):
        matched_sides(model, batches, 0, 512, str(tmp_path))
