"""The training loop of all stages."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cloc_mllm.config import OptimConfig, RunConfig
from cloc_mllm.data.mixture import Part
from cloc_mllm.distributed import (
    barrier,
    gather_objects,
    is_main,
    rank,
    world_size,
)
from cloc_mllm.models.vision_encoder import freeze_batch_norm_statistics
from cloc_mllm.stopping import StopRequest
from cloc_mllm.train.checkpoint import CheckpointWriter, list_checkpoints
from cloc_mllm.train.data_order import DataOrder, RankBatches, load_batches, on_device
from cloc_mllm.train.deepspeed_internals import linear_as_it_was
from cloc_mllm.train.engine import (
    StepFn,
    load_optimizer_state,
    seed_everything,
    start_engine,
    start_processes,
    step_if_finite,
    whole_model,
)
from cloc_mllm.train.logging import Pace, TrainLog
from cloc_mllm.train.optim import freeze_by_lr, lr_factor, set_lr
from cloc_mllm.train.resume import checkpoint_to_resume, load_weights, save_run

MAX_SKIPPED_IN_A_ROW = 10

Evaluate = Callable[[nn.Module], dict[str, float]]


class DivergedError(ValueError):
    """Raised when loss or gradient were not finite for too many steps in a row."""


@dataclass(frozen=True)
class Job:
    """The parts that a stage gives to the loop.

    Attributes:
        model: the same on every rank, with weights in float32 and no 0-dim parameters.
        step_fn: takes `(model, batch)` and returns named scalars. `loss` is differentiated. The
            mean of a scalar over ranks must be what one process would have computed.
        dataset: `dataset[i]` is one sample; its `id`, if it has one, names it in messages.
        collate_fn: makes a batch of a list of `(sample_seed, dataset[i])`. A batch has
            `.to(device)` and, to be copied to a GPU in the background, `.pin_memory()`. Whatever is
            random in it must come from the sample's seed.
        save_model: writes the final model to a directory; called on the main rank alone.
        resolved_config: the settings of the run, stored in every checkpoint. A run resumes only
            from its own checkpoints.
        fingerprint: the preparation of the data, stored and compared likewise.
        default_config: the settings at their defaults, which a checkpoint from before there was one
            of them is taken to have had.
        evaluate: computes metrics from the model; called on the main rank alone, with the model in
            `eval()` and without gradient.
        warn: says what is wrong with the scalars of a logged step, of which it gets the number of
            steps done and the means over ranks; "" if nothing is.
        eval_every: steps between evaluations; 0 evaluates only at the end.
        num_workers: loader processes per rank.
        mixture: the data sets that `dataset` is made of, one after the other; () if it is one.
        kept_frozen: the frozen parameters that a checkpoint holds, by prefixes of their names (""
            is all of them). The others must come with the model.
    """

    model: nn.Module
    step_fn: StepFn
    dataset: Sequence[Any]
    collate_fn: Callable[[list[tuple[int, Any]]], Any]
    save_model: Callable[[nn.Module, Path], None]
    resolved_config: dict[str, Any]
    fingerprint: dict[str, Any]
    default_config: dict[str, Any] = field(default_factory=dict)
    evaluate: Evaluate | None = None
    warn: Callable[[int, dict[str, float]], str] | None = None
    eval_every: int = 0
    num_workers: int = 0
    mixture: tuple[Part, ...] = ()
    kept_frozen: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        step: steps done; below `run.steps` if it was stopped.
        exit_code: 0, or 128 + the number of the signal that stopped it.
        metrics: the results of the last evaluation.
    """

    step: int
    exit_code: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


@linear_as_it_was()
def train(job: Job, config: RunConfig, optim: OptimConfig) -> TrainResult:
    """Trains `job.model` in place.

    Writes into `config.output_dir`: `checkpoints/`, `log.jsonl`, `tensorboard/` and, unless a
    signal stopped it, `model/`.

    Raises:
        ValueError: the configuration cannot work, there is no data, or the checkpoint in
            `output_dir` is damaged or belongs to another run.
        DivergedError: `MAX_SKIPPED_IN_A_ROW` steps in a row were not finite.
    """
    if config.keep_checkpoints < 2:  # a kill may leave the only one unfinished
        raise ValueError(f"run.keep_checkpoints is {config.keep_checkpoints}; keep at least 2")
    device = start_processes()
    deadline = time.monotonic() + (config.max_seconds or math.inf)
    model, output_dir = job.model, Path(config.output_dir)
    checkpoints = output_dir / "checkpoints"
    order = DataOrder(len(job.dataset), config.global_batch_size, config.seed, job.mixture)
    identity = {
        "num_samples": len(job.dataset),
        "config": job.resolved_config,
        "fingerprint": job.fingerprint,
    }
    freeze_by_lr(model, optim)

    checkpoint = checkpoint_to_resume(
        checkpoints, identity, enabled=config.resume, defaults=job.default_config
    )
    if checkpoint is not None:
        load_weights(model, checkpoint.weights)
    engine = start_engine(model, job.step_fn, config, optim)
    if checkpoint is not None:
        load_optimizer_state(engine, model, checkpoint)
    done = first_step = checkpoint.state["step"] if checkpoint is not None else 0

    num_skipped, exit_code, metrics = 0, 0, {}
    log = TrainLog(output_dir, first_step, config.steps, enabled=is_main())
    pace = Pace(config.global_batch_size, first_step)
    keys = RankBatches(order, first_step, config.steps, rank(), world_size())
    batches = load_batches(job.dataset, keys, job.collate_fn, job.num_workers)
    _set_train_mode(model)
    with StopRequest() as stop, CheckpointWriter() as writer:
        for step, batch in enumerate(on_device(batches, device), first_step):
            factor = lr_factor(step, config.steps, optim.warmup_steps)
            set_lr(engine.optimizer, factor)
            seed_everything(config.seed, step, rank())
            losses = engine(batch)
            engine.backward(losses["loss"])
            wants_to_stop = stop.requested or time.monotonic() > deadline
            grad_norm, stopping = step_if_finite(engine, optim.grad_clip, flag=wants_to_stop)
            done = step + 1
            last = done == config.steps
            log.advance()

            numbers = {"lr": factor * optim.lr, "grad_norm": grad_norm}
            if not math.isfinite(grad_norm):
                num_skipped += 1
                ids = {"sample_ids": _sample_ids(job, order, step)}
                log.row(done, "skipped", _mean_over_ranks(losses) | numbers | ids)
                writer.wait()
                _stop_if_diverged(num_skipped, done, checkpoints)
            else:
                num_skipped = 0
            if _due(config.log_every, done, last or stopping):
                terms = _mean_over_ranks(losses)
                log.row(done, "train", terms | numbers | pace.since_last(done))
                if job.warn is not None and (warning := job.warn(done, terms)):
                    log.message(warning)
            if job.evaluate is not None and not stopping and _due(job.eval_every, done, last):
                metrics = _evaluate(whole_model(engine, model, device), job.evaluate)
                log.row(done, "eval", metrics)
            if _due(config.save_every, done, last or stopping):
                write = partial(writer.write, checkpoints, keep=config.keep_checkpoints)
                save_run(engine, model, identity | {"step": done}, write, job.kept_frozen)
            if stopping and not last:
                exit_code = _agreed_exit_code(stop.signal_number)
                log.message(f"stopped after step {done}; the same command continues from there")
                break
    log.close()
    final = whole_model(engine, model, "cpu") if exit_code == 0 else None
    if final is not None and is_main():
        job.save_model(final, output_dir / "model")
    barrier()
    return TrainResult(done, exit_code, metrics)


def _due(every: int, done: int, last: bool) -> bool:
    return last or (every > 0 and done % every == 0)


def _set_train_mode(model: nn.Module) -> None:
    """Training mode for what learns; a module that is frozen as a whole drops nothing out."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
    freeze_batch_norm_statistics(model)


def _evaluate(model: nn.Module, evaluate: Evaluate) -> dict[str, float]:
    model.eval()
    metrics: dict[str, float] = {}
    if is_main():
        with torch.no_grad():
            metrics = evaluate(model)
    _set_train_mode(model)
    return gather_objects(metrics)[0]


def _mean_over_ranks(losses: dict[str, Tensor]) -> dict[str, float]:
    gathered = gather_objects({name: float(value.detach()) for name, value in losses.items()})
    return {name: sum(values[name] for values in gathered) / len(gathered) for name in gathered[0]}


def _sample_ids(job: Job, order: DataOrder, step: int) -> list[str]:
    keys = order.batch(step)
    return [str(getattr(job.dataset[index], "id", index)) for _, index in keys]


def _stop_if_diverged(num_skipped: int, done: int, checkpoints: Path) -> None:
    if num_skipped < MAX_SKIPPED_IN_A_ROW:
        return
    saved = list_checkpoints(checkpoints)
    raise DivergedError(
        f"loss or gradient was not finite in {num_skipped} steps in a row, up to step {done}; "
        f"last good checkpoint: {saved[-1] if saved else 'none was written yet'}. Lower optim.lr, "
        "or look at the samples named in the log"
    )


def _agreed_exit_code(signal_number: int) -> int:
    """128 + the number of the signal that any rank got, or 0 if the time was up."""
    number = max(gather_objects(signal_number))
    return 128 + number if number else 0
