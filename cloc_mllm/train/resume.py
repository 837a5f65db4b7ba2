"""Moves a run between memory and its checkpoints on disk, the same way on every rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cloc_mllm.distributed import gather_objects, is_main
from cloc_mllm.train.checkpoint import (
    Checkpoint,
    check_same_run,
    list_checkpoints,
    load_checkpoint,
    newest_whole_checkpoint,
    remove_leftovers,
)
from cloc_mllm.train.deepspeed_internals import gathered
from cloc_mllm.train.engine import optimizer_state


def checkpoint_to_resume(
    root: Path, identity: dict[str, Any], *, enabled: bool, defaults: dict[str, Any]
) -> Checkpoint | None:
    """Loads the newest whole checkpoint under `root`, the same on every rank.

    Args:
        identity: `config`, `fingerprint` and `num_samples` of this run.
        defaults: see `check_same_run`.

    Returns:
        the checkpoint; None if the run starts from the beginning.

    Raises:
        ValueError: all checkpoints are damaged, the newest whole one belongs to another run, or
            there are checkpoints although resuming is not enabled.
    """
    if not enabled and list_checkpoints(root):
        raise ValueError(
            f"{root} holds checkpoints, but run.resume is false; remove it or choose another "
            "run.output_dir"
        )
    directory = _choose_on_main(root) if enabled else None
    if directory is None:
        return None
    checkpoint = load_checkpoint(directory)
    check_same_run(
        checkpoint.state,
        identity["config"],
        identity["fingerprint"],
        identity["num_samples"],
        defaults,
    )
    if is_main():
        print(f"resuming from {directory}", flush=True)
    return checkpoint


def save_run(
    engine: Any,
    model: nn.Module,
    state: dict[str, Any],
    write: Callable[[Checkpoint], None],
    kept_frozen: tuple[str, ...],
) -> None:
    """Collects a checkpoint. Every rank must call this; the main rank writes it.

    Args:
        state: the identity of the run and its `step`.
        write: called on the main rank, with tensors that training no longer changes.
        kept_frozen: frozen parameters to store, see `Job`.
    """
    moments, optimizer_steps = optimizer_state(engine, model)
    weights = _weights(model, kept_frozen)
    if is_main():
        state = state | {"optimizer_steps": optimizer_steps}
        write(Checkpoint(weights, moments, state))


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copies saved parameters and buffers into the model.

    Raises:
        ValueError: a trainable parameter is missing, or the model has no such parameter.
    """
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    unknown = sorted(weights.keys() - targets.keys())
    missing = sorted(
        name for name, p in model.named_parameters() if p.requires_grad and name not in weights
    )
    if unknown or missing:
        raise ValueError(
            f"the checkpoint does not fit the model: missing {missing[:3]}, unknown {unknown[:3]}"
        )
    with torch.no_grad():
        for name, tensor in weights.items():
            targets[name].copy_(tensor)


def _weights(model: nn.Module, kept_frozen: tuple[str, ...]) -> dict[str, Tensor]:
    """Collects the weights to store, whole, on the CPU of the main rank. Every rank must call this.

    They are the parameters (tied ones once) and the buffers that a state dict has.
    """
    persistent = model.state_dict().keys()
    parameters = {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad or name.startswith(kept_frozen)
    }
    buffers = {name: b for name, b in model.named_buffers() if name in persistent}
    weights = {}
    for name, tensor in (parameters | buffers).items():
        with gathered(tensor):
            if is_main():
                weights[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return weights


def _choose_on_main(root: Path) -> Path | None:
    """Lets the main rank look for a checkpoint; all ranks get its answer, or its error."""
    found: Path | None = None
    error = ""
    if is_main():
        try:
            remove_leftovers(root)
            found, problems = newest_whole_checkpoint(root)
            for problem in problems:
                print(f"warning: {problem}; falling back to an older checkpoint", flush=True)
        except ValueError as damaged:
            error = str(damaged)
    found, error = gather_objects((found, error))[0]
    if error:
        raise ValueError(error)
    return found
