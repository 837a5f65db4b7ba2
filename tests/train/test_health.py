from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from cloc_mllm.train.health import MAX_SKIPPED, DivergedError, Health, runaway_scales


def seen(losses: torch.Tensor, norms: torch.Tensor, spike_bound: float = 20.0) -> Health:
    health = Health(spike_bound, grad_clip=1.0)
    for loss, norm in zip(losses.tolist(), norms.tolist(), strict=True):
        fault = health.fault(loss, norm)
        assert not fault, (fault, len(health.state()["losses"]))
        health.note(loss, norm, skipped=False)
    return health


def healthy(num_steps: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss that falls with noise, and norms with a long tail: one in a thousand is 8 times the
    median."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, num_steps, generator=generator)
    falling = 5 * torch.exp(-torch.arange(num_steps) / (num_steps / 5)) + 0.3
    return falling * (1 + 0.15 * noise[0]), torch.exp(0.7 * noise[1])


@pytest.mark.parametrize("seed", range(3))
def test_no_bound_fires_in_5000_healthy_steps(seed: int) -> None:
    seen(*healthy(5000, seed))


@pytest.mark.parametrize(
    ("loss", "grad_norm", "expected"),
    [
        (0.3, 1.0, ""),
        (0.3e6, 1.0, "loss 3e+05 is above its bound"),
        (0.3, 1e19, "gradient norm 1e+19 is above its bound"),
        (math.nan, 1.0, "not finite"),
        (0.3, math.inf, "not finite"),
    ],
)
def test_spikes_are_named(loss: float, grad_norm: float, expected: str) -> None:
    assert expected in (fault := seen(*healthy(300)).fault(loss, grad_norm))
    assert bool(fault) == bool(expected)


def test_zero_switches_the_bound_off_and_few_steps_have_none() -> None:
    assert not seen(*healthy(300), spike_bound=0).fault(1e6, 1e19)
    assert not seen(*healthy(49)).fault(1e6, 1e19)


def test_norms_that_are_not_even_clipped_are_no_spikes() -> None:
    losses, norms = healthy(300)
    assert not seen(losses, norms * 1e-6).fault(0.3, 0.9)


def test_a_resumed_run_decides_as_the_unbroken_one() -> None:
    health = seen(*healthy(300))
    health.note(math.nan, math.nan, skipped=True)
    resumed = Health(20.0, 1.0, health.state())
    assert resumed.state() == health.state()
    assert resumed.fault(9e9, 1.0) == health.fault(9e9, 1.0) != ""


def test_a_share_of_skipped_steps_ends_a_run(tmp_path: Path) -> None:
    health = Health(20.0, 1.0)
    for step in range(2 * MAX_SKIPPED - 2):
        health.note(1.0, 1.0, skipped=step % 2 == 0)
        health.check(step, tmp_path)
    health.note(1.0, 1.0, skipped=True)
    with pytest.raises(DivergedError, match="10 of the last 19 steps were skipped, up to step 19"):
        health.check(19, tmp_path)


def test_a_scale_that_ran_away_is_named() -> None:
    model = nn.Module()
    model.logit_scale = nn.Parameter(torch.tensor([4.6]))
    model.region_logit_scale = nn.Parameter(torch.tensor([1e4]))
    assert runaway_scales(model).startswith("region_logit_scale is 1e+04: the loss cuts")
    model.region_logit_scale.data.fill_(2.7)
    assert runaway_scales(model) == ""
