"""What the entry points of both stages share: the command line and `--dry_run`."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from typing import Any, TypeVar

import yaml
from torch import nn

from cloc_mllm.config import DataConfig, RunConfig, Stage1Config, Stage2Config
from cloc_mllm.train.data_order import DataOrder

Config = TypeVar("Config")


def parse_job(
    config_class: type[Config], argv: Sequence[str] | None, *, prog: str, description: str
) -> tuple[Config, bool]:
    """`--config x.yaml --optim.lr 1e-4 --print_config --dry_run` to (config, dry_run).

    `--local_rank`, which the `deepspeed` launcher adds, is accepted and ignored. A wrong argument
    prints what was expected and exits with status 2.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=prog, description=description)
    parser.add_argument("--config", action="config", help="YAML file; later arguments override it")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print the resolved config, parameter counts and batch arithmetic, then stop",
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_class_arguments(config_class)
    values = parser.instantiate(parser.parse_args(argv)).as_dict()
    names = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    return config_class(**{name: values[name] for name in names}), bool(values["dry_run"])


def dry_run_report(config: Stage1Config | Stage2Config, model: nn.Module, order: DataOrder) -> str:
    """The resolved config, what trains and what is frozen, and how the batches add up."""
    resolved = yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)
    arithmetic = _batch_arithmetic(config.run, config.data, order)
    return "\n".join([resolved, *_parameter_table(model), "", *arithmetic])


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


def _batch_arithmetic(run: RunConfig, data: DataConfig, order: DataOrder) -> list[str]:
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    images = run.steps * run.global_batch_size
    return [
        f"images a step:    {run.global_batch_size} = {num_ranks} rank(s) x "
        f"{run.global_batch_size // num_ranks}",
        f"images seen:      {images:,} = {run.steps:,} steps x {run.global_batch_size}",
        *_epochs(run, order),
        f"regions seen:     {_regions(data, images)}",
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
            f"{part.weight / total:>8.2%}  {of_part:>8.2f}"
            for part, of_part in zip(order.mixture, epochs, strict=True)
        ),
    ]


def _regions(data: DataConfig, images: int) -> str:
    if data.regions_per_image == 0:
        return "all of every image"
    return f"at most {images * data.regions_per_image:,} = {data.regions_per_image} an image"


def _plain(value: Any) -> Any:
    """Tuples as lists, which YAML can say."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
