"""The parts that the entry points of all trainings share: the precision and the dry run."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import yaml
from torch import nn

from cloc_mllm.config import DataConfig, RunConfig, Stage1Config, Stage2Config, TinyLlmConfig
from cloc_mllm.devices import resolve_frozen_dtype, resolve_precision
from cloc_mllm.distributed import num_cores, num_local_ranks
from cloc_mllm.train.data_order import DataOrder, choose_workers

_FED_BY = (
    5  # workers that a ViT-B/16 keeps busy on an H100, by the estimate in docs/how-to/scale.md
)

Config = TypeVar("Config", Stage1Config, Stage2Config, TinyLlmConfig)


RESERVED_GIB = 1.0  # CUDA's context, libraries' workspaces, and what the allocator cannot use
_FLOAT32_SHARE = 0.5  # of the float32 peak that the contrastive losses are taken to reach

DRY_RUN_OPTIONS: dict[str, tuple[Any, str]] = {
    "dry_run": (
        False,
        "print settings, parameters, memory and FLOPs, then stop; reads no weights",
    ),
    "gpu": ("", "with --dry_run: the card to plan for, for instance h100: does it fit, how long"),
    "gpus": (0, "with --dry_run: number of GPUs (default: the launcher's)"),
    "gpu_memory": (0.0, "with --dry_run: GiB of another card"),
    "mfu": (0.3, "with --gpu: the share of the card's bf16 peak that training is taken to reach"),
}


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet.

    Attributes:
        memory_gib: of it.
        bf16, float32: dense peak, in FLOP/s.
    """

    memory_gib: float
    bf16: float
    float32: float


CARDS = {
    "a100": Card(80, 312e12, 19.5e12),
    "a100-40": Card(40, 312e12, 19.5e12),
    "h100": Card(80, 989e12, 67e12),
    "h200": Card(141, 989e12, 67e12),
    "l40s": Card(48, 362e12, 91.6e12),
    "rtx3090": Card(24, 71e12, 35.6e12),
    "rtx4090": Card(24, 165e12, 82.6e12),
}


@dataclass(frozen=True)
class Plan:
    """The GPUs that a dry run is asked about.

    Attributes:
        num_gpus: that share the batch.
        card: the key of `CARDS`; "" if none was named.
        memory_gib: of one GPU; 0 does not ask whether a step fits.
        mfu: the share of the card's bf16 peak that is taken to be reached.
    """

    num_gpus: int = 1
    card: str = ""
    memory_gib: float = 0.0
    mfu: float = 0.3

    @classmethod
    def of_options(cls, options: dict[str, Any]) -> Plan:
        """Reads `DRY_RUN_OPTIONS`.

        Raises:
            ValueError: the card is unknown, or something is asked without `--dry_run`.
        """
        asked = [name for name in ("gpu", "gpus", "gpu_memory") if options[name]]
        if asked and not options["dry_run"]:
            raise ValueError(f"--{asked[0]} is a question to --dry_run; give both")
        card = options["gpu"]
        if card and card not in CARDS:
            raise ValueError(
                f"--gpu {card} is unknown; known are {', '.join(CARDS)}. For another card ask with "
                "--gpu_memory GIB whether a step fits"
            )
        memory = options["gpu_memory"] or (CARDS[card].memory_gib if card else 0.0)
        num_gpus = options["gpus"] or int(os.environ.get("WORLD_SIZE", "1"))
        return cls(num_gpus, card, memory, options["mfu"])

    def seconds(self, flops: int, float32_flops: int = 0) -> float:
        """How long one GPU's step takes that has so many FLOPs in bf16 and in float32."""
        card = CARDS[self.card]
        return flops / (card.bf16 * self.mfu) + float32_flops / (card.float32 * _FLOAT32_SHARE)

    def times(self, flops: int, steps: int, float32_flops: int = 0) -> list[str]:
        """Writes how long a step and the run take; nothing if no card was named."""
        if not self.card:
            return []
        card, seconds = CARDS[self.card], self.seconds(flops, float32_flops)
        hours = seconds * steps / 3600
        return [
            f"time of a step: {seconds:.3g} s at {self.mfu:.0%} of {card.bf16 / 1e12:.0f} TFLOP/s "
            "(assumed; without loading, communication and saving)",
            f"time of the run: {hours:,.1f} h on {self.num_gpus} x {self.card} = "
            f"{hours * self.num_gpus / 24:,.2f} GPU-days",
        ]


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
    config: Stage1Config | Stage2Config | TinyLlmConfig,
    model: nn.Module,
    order: DataOrder | None,
    num_ranks: int = 1,
) -> str:
    """Lists the resolved config, the parts that train or are frozen, and the size of batches.

    Args:
        order: None if the data are not there yet.
    """
    resolved = yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)
    return "\n".join(
        [
            resolved,
            *_parameter_table(model),
            "",
            *_batch_arithmetic(config.run, order, num_ranks),
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
            f"warning: {workers} worker(s) may not feed a GPU (docs/how-to/scale.md); raise "
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


def _batch_arithmetic(run: RunConfig, order: DataOrder | None, num_ranks: int) -> list[str]:
    images = run.steps * run.global_batch_size
    return [
        f"images per step:  {run.global_batch_size} = {num_ranks} rank(s) x "
        f"{run.global_batch_size // num_ranks}",
        f"images seen:      {images:,} = {run.steps:,} steps x {run.global_batch_size}",
        *([] if order is None else _epochs(run, order)),
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
