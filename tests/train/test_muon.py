from __future__ import annotations

import pytest
import torch
from torch import nn

from cloc_mllm.train.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(8, 8), (4, 20), (20, 4)], ids=["square", "wide", "tall"])
def test_orthogonalized_matrices_keep_their_directions(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    u, values, vh = torch.linalg.svd(orthogonalize(matrices), full_matrices=False)
    assert values.min() > 0.6 and values.max() < 1.3
    closest = torch.linalg.svd(matrices, full_matrices=False)
    actual, expected = u @ vh, closest.U @ closest.Vh
    assert nn.functional.cosine_similarity(actual.flatten(1), expected.flatten(1)).min() > 0.99


def test_a_zero_gradient_moves_nothing() -> None:
    assert not orthogonalize(torch.zeros(1, 3, 5)).any()


def test_steps_are_those_of_torch() -> None:
    """Against torch.optim.Muon, which computes in bfloat16, and AdamW for the vector."""
    torch.manual_seed(0)
    start = [torch.randn(6, 4), torch.randn(6, 4), torch.randn(4, 6), torch.randn(5)]
    ours, theirs = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    rates = {"lr": 0.02, "weight_decay": 0.1}
    groups = [{"params": ours[:3], "muon": True}, {"params": ours[3:], "muon": False}]
    optimizer = Muon([group | rates for group in groups], betas=(0.9, 0.98), dtype=torch.bfloat16)
    expected = [
        torch.optim.Muon(theirs[:3], momentum=0.95, **rates),
        torch.optim.AdamW(theirs[3:], betas=(0.9, 0.98), **rates),
    ]
    for _ in range(5):
        gradients = [torch.randn_like(value) for value in start]
        for parameters in (ours, theirs):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
        optimizer.step()
        for other in expected:
            other.step()
    for actual, value in zip(ours, theirs, strict=True):
        # Each of the five steps moves an entry by about 0.01, and bf16 products, whose rounding
        # differs with the hardware, part them by up to 3.3e-3; another momentum by over 1e-2.
        torch.testing.assert_close(actual, value, atol=6e-3, rtol=0)


def test_parameters_without_a_gradient_stay_as_they_are() -> None:
    weight = nn.Parameter(torch.ones(3, 3))
    Muon(
        [{"params": [weight], "muon": True, "lr": 0.1, "weight_decay": 0.1}], betas=(0.9, 0.9)
    ).step()
    assert torch.equal(weight, torch.ones(3, 3))
