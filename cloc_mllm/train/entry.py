"""The parts that the entry points of all trainings share: the precision and the dry run."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, TypeVar

import torch
import yaml
from torch import nn

from cloc_mllm.config import DataConfig, RunConfig, Stage1Config, Stage2Config, TinyLlmConfig
from cloc_mllm.devices import resolve_frozen_dtype, resolve_precision
from cloc_mllm.distributed import num_cores, num_local_ranks
from cloc_mllm.train.data_order import DataOrder, choose_workers

_FED_BY = 5  # workers that a ViT-B/16 keeps busy on an H100, by the estimate in docs/scale.md

Config = TypeVar("Config", Stage1Config, Stage2Config, TinyLlmConfig)


def with_precision(config: Config) -> Config:
    """Resolves `run.precision: auto`, once per run.

    Checkpoints store the result, so a run that resumes on other hardware keeps its precision.
    """
    precision = resolve_precision(config.run.precision)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, precision=precision))


def with_frozen_dtype(config: Stage2Config) -> Stage2Config:
    """Resolves `model.dtype: auto`, once per run, like the precision, which it depends on."""
    dtype = resolve_frozen_dtype(config.model.dtype, config.run.precision)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))


def dry_run_report(
    config: Stage1Config | Stage2Config | TinyLlmConfig, model: nn.Module, order: DataOrder
) -> str:
    """Lists the resolved config, the parts that train or are frozen, and the size of batches."""
    resolved = yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)
    return "\n".join(
        [
            resolved,
            *_parameter_table(model),
            "",
            *_batch_arithmetic(config.run, order),
            *([] if isinstance(config, TinyLlmConfig) else _loader(config.data)),
        ]
    )


def _loader(data: DataConfig) -> list[str]:
    """The loader's processes beside this machine's cores, with a warning where they do not fit."""
    workers, ranks, cores = choose_workers(data.num_workers), num_local_ranks(), num_cores()
    lines = [f"loader workers:   {workers} per rank, {ranks} rank(s) on {cores} cores"]
    if (workers + 1) * ranks > cores:
        lines.append(
            "warning: ranks and workers share cores; lower data.num_workers or take more cores"
        )
    elif torch.cuda.is_available() and workers < min(_FED_BY, cores // ranks - 1):
        lines.append(
            f"warning: {workers} worker(s) may not feed a GPU (docs/scale.md); raise "
            "data.num_workers, or set it to -1"
        )
    return lines


def _parameter_table(model: nn.Module) -> list[str]:
    counts: dict[str, list[int]] = {}  # part -> [trainable, frozen]
    for name, parameter in model.named_parameters():
        part = ".".join(name.split(".")[:2])
        counts.setdefault(part, [0, 0])[not parameter.requires_grad] += parameter.numel()
    width = max(len(part) for part in counts)
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    rows = [*counts.items(), ("all", total)]
    return [
        f"{'parameters':<{width}}  {'trainable':>13}  {'frozen':>13}",
        *(f"{part:<{width}}  {train:>13,}  {frozen:>13,}" for part, (train, frozen) in rows),
    ]


def _batch_arithmetic(run: RunConfig, order: DataOrder) -> list[str]:
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    images = run.steps * run.global_batch_size
    return [
        f"images per step:  {run.global_batch_size} = {num_ranks} rank(s) x "
        f"{run.global_batch_size // num_ranks}",
        f"images seen:      {images:,} = {run.steps:,} steps x {run.global_batch_size}",
        *_epochs(run, order),
    ]


def _epochs(run: RunConfig, order: DataOrder) -> list[str]:
    epochs = [
        seen / part.num_samples
        for part, seen in zip(order.parts, order.num_seen(run.steps), strict=True)
    ]
    if not order.mixture:
        return [f"epochs:           {epochs[0]:.2f} of {order.num_samples:,} images"]
    total = sum(part.weight for part in order.mixture)
    width = max(len(part.name) for part in order.mixture)
    return [
        f"{'mixture':<{width}}  {'images':>13}  {'weight':>8}  {'share':>8}  {'epochs':>8}",
        *(
            f"{part.name:<{width}}  {part.num_samples:>13,}  {part.weight:>8g}  "
            f"{part.weight / total:>8.2%}  {num_epochs:>8.2f}"
            for part, num_epochs in zip(order.mixture, epochs, strict=True)
        ),
    ]


def _plain(value: Any) -> Any:
    """Turns tuples into lists, which YAML can write."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
