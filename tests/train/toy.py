"""A regression small enough to train in milliseconds, with dropout so that randomness shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cloc_mllm.config import OptimConfig, RunConfig
from cloc_mllm.train.loop import Job, TrainResult, train


@dataclass
class Batch:
    x: Tensor
    y: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.x.to(device), self.y.to(device))


class ToyModel(nn.Module):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 3)
        self.logit_scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.norm(self.encoder(x)))) * self.logit_scale


def collate(items: list[tuple[int, tuple[Tensor, Tensor]]]) -> Batch:
    noise = [torch.randn(6, generator=torch.Generator().manual_seed(seed)) for seed, _ in items]
    x = torch.stack([x + 0.1 * n for (_, (x, _)), n in zip(items, noise, strict=True)])
    return Batch(x, torch.stack([y for _, (_, y) in items]))


def step_fn(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    squared = (model(batch.x) - batch.y).square().mean()
    return {"loss": squared, "squared": squared.detach()}


def dataset(num_samples: int = 20) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(num_samples, 6, generator=generator)
    return [(x, torch.stack([x.sum(), x[0], x[1] * x[2]])) for x in xs]


def sample_indices(batch: Batch) -> list[int]:
    """Which samples of `dataset()` these are: their targets are all different."""
    targets = torch.stack([y for _, y in dataset()])
    return (batch.y[:, None] == targets).all(2).nonzero()[:, 1].tolist()


def run_config(output_dir: Path | str, **changes: Any) -> RunConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir),
        "steps": 10,
        "global_batch_size": 8,
        "precision": "fp32",
        "save_every": 4,
        "log_every": 1,
    }
    return RunConfig(**(defaults | changes))


def toy_job(**changes: Any) -> Job:
    defaults: dict[str, Any] = {
        "model": ToyModel(),
        "step_fn": step_fn,
        "dataset": dataset(),
        "collate_fn": collate,
        "save_model": save_weights,
        "resolved_config": {"run": {"seed": 0}},
        "fingerprint": {"image_size": 64},
    }
    return Job(**(defaults | changes))


def train_toy(
    config: RunConfig, optim: OptimConfig | None = None, **changes: Any
) -> tuple[nn.Module, TrainResult]:
    job = toy_job(**changes)
    return job.model, train(job, config, optim or OptimConfig(lr=1e-2, warmup_steps=2))


def save_weights(model: nn.Module, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, directory / "model.safetensors")
