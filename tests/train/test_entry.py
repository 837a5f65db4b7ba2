"""What a dry run says of the loader, beside its use in the recipes (`test_recipes.py`)."""

from __future__ import annotations

import pytest
import torch

from cloc_mllm.config import DataConfig
from cloc_mllm.distributed import num_cores
from cloc_mllm.train.entry import _loader


def test_workers_that_share_cores_are_warned_of() -> None:
    (told,) = _loader(DataConfig(num_workers=0))
    assert told == f"loader workers:   0 per rank, 1 rank(s) on {num_cores()} cores"
    _, warning = _loader(DataConfig(num_workers=num_cores()))
    assert warning.startswith("warning: ranks and workers share cores; lower data.num_workers")


@pytest.mark.skipif(num_cores() < 2, reason="one core is shared anyway")
def test_too_few_workers_for_a_gpu_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    _, warning = _loader(DataConfig(num_workers=0))
    assert warning.startswith(
        "warning: 0 worker(s) may not feed a GPU (docs/how-to/scale.md); raise"
    )
    assert "warning" not in " ".join(_loader(DataConfig(num_workers=num_cores() - 1)))
