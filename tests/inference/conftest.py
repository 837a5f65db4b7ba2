from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest
import torch

from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from tests.tiny_mllm import cloc_dir, llm_dir, mllm_config, mllm_dir, roi_mllm_dir

__all__ = ["cloc_dir", "llm_dir", "mllm_config", "mllm_dir", "roi_mllm_dir"]


@pytest.fixture(scope="session")
def predictor(mllm_dir: Path) -> GroundingPredictor:
    return GroundingPredictor.from_pretrained(mllm_dir, device="cpu")


@pytest.fixture
def always(predictor, monkeypatch):
    """Makes the model write given texts, one per row, whatever it is asked."""

    def write(*texts: str) -> None:
        eos = predictor.processor.tokenizer.eos_token_id
        rows = [[*predictor.processor.tokenize(text), eos] for text in texts]
        steps = itertools.count()

        @functools.wraps(predictor.model.forward)  # generate() reads its signature
        def forward(*args, **kwargs):
            output = original(*args, **kwargs)
            step = next(steps)
            # log probability of the chosen token: log(9/10)
            logits = torch.full_like(output.logits, -1e4)
            for row, ids in enumerate(rows):
                logits[row, -1, 0] = torch.log(torch.tensor(0.1))
                logits[row, -1, ids[min(step, len(ids) - 1)]] = torch.log(torch.tensor(0.9))
            output.logits = logits
            return output

        original = predictor.model.forward
        monkeypatch.setattr(predictor.model, "forward", forward)

    return write
