"""Muon, an optimizer for the matrices inside a network: it makes the momentum's update orthogonal.

Source: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
torch.optim.Muon is no alternative: it computes in bfloat16 on any hardware, which is 30 times
slower than float32 on most CPUs, and DeepSpeed wants one optimizer for the whole network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the quintic iteration's, chosen to be steep at zero
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Muon for the groups with `"muon": True`, AdamW for all others.

    Args:
        groups: each has `lr`, `weight_decay` and `muon`; Muon's groups hold matrices only.
        betas: AdamW's decay rates.
        dtype: dtype of the orthogonalisation.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(groups, {"betas": betas})
        self.dtype = dtype
        self._adamw: torch.optim.AdamW | None = None
        others = [group for group in self.param_groups if not group["muon"]]
        if others:
            # fused: it keeps its step counts on the GPU and never asks for them
            self._adamw = torch.optim.AdamW(others, betas=betas, fused=True)
            self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if group["muon"]:
                self._orthogonal_step(group)
        if self._adamw is not None:
            self._adamw.step()

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        alike: dict[torch.Size, list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                alike.setdefault(parameter.shape, []).append(parameter)
        for (rows, columns), parameters in alike.items():
            updates = orthogonalize(
                torch.stack([self._direction(p) for p in parameters]).to(self.dtype)
            )
            step_size = group["lr"] * max(1.0, rows / columns) ** 0.5
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(update.to(parameter.dtype), alpha=step_size)

    def _direction(self, parameter: Tensor) -> Tensor:
        """Computes the gradient with Nesterov momentum."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - _MOMENTUM)
        return parameter.grad.lerp(state["momentum"], _MOMENTUM)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximates the closest orthogonal matrices by Newton-Schulz iterations.

    Args:
        matrices: float[K, A, B].

    Returns:
        float[K, A, B], with singular values between 0.7 and 1.2, which is near enough.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalize(matrices.mT).mT
    a, b, c = _COEFFICIENTS
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
