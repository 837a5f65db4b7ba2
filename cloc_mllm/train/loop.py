"""The training loop of all stages."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cloc_mllm.card import write_run_card
from cloc_mllm.config import OptimConfig, RunConfig
from cloc_mllm.data.mixture import Part
from cloc_mllm.data.storage import whole_directory
from cloc_mllm.distributed import (
    barrier,
    gather_objects,
    is_main,
    rank,
    world_size,
)
from cloc_mllm.models.vision_encoder import freeze_batch_norm_statistics
from cloc_mllm.stopping import StopRequest
from cloc_mllm.train.checkpoint import CheckpointWriter
from cloc_mllm.train.claim import claimed
from cloc_mllm.train.data_order import DataOrder, RankBatches, load_batches, on_device
from cloc_mllm.train.deepspeed_internals import linear_as_it_was
from cloc_mllm.train.engine import (
    StepFn,
    load_optimizer_state,
    seed_everything,
    start_engine,
    start_processes,
    step_if_sound,
    whole_model,
)
from cloc_mllm.train.health import Health, runaway_scales
from cloc_mllm.train.logging import Pace, TrainLog
from cloc_mllm.train.optim import freeze_by_lr, lr_factor, set_lr
from cloc_mllm.train.resume import checkpoint_to_resume, load_weights, save_run
from cloc_mllm.train.watch import COMPUTING, EVALUATING, SAVING, WAITING, RankWatch

Evaluate = Callable[[nn.Module], dict[str, float]]


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


def train(job: Job, config: RunConfig, optim: OptimConfig) -> TrainResult:
    """Trains `job.model` in place.

    Writes into `config.output_dir`: `checkpoints/`, `log.jsonl`, `tensorboard/` and, unless a
    signal stopped it, `model/`.

    Raises:
        ValueError: the configuration cannot work, there is no data, another run is at work in
            `output_dir`, it cannot be written into, or its checkpoint is damaged or belongs to
            another run.
        DivergedError: too many of the last steps were not finite, or spikes.
    """
    if config.keep_checkpoints < 2:  # a kill may leave the only one unfinished
        raise ValueError(f"run.keep_checkpoints is {config.keep_checkpoints}; keep at least 2")
    device = start_processes()
    with claimed(Path(config.output_dir)), linear_as_it_was():
        return _train(job, config, optim, device)


def _train(job: Job, config: RunConfig, optim: OptimConfig, device: torch.device) -> TrainResult:
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
    state: dict[str, Any] = checkpoint.state if checkpoint is not None else {"step": 0}
    done = first_step = state["step"]
    health = Health(optim.spike_bound, optim.grad_clip, state.get("health"))

    exit_code, metrics = 0, {}
    log = TrainLog(output_dir, first_step, config.steps, enabled=is_main())
    pace = Pace(config.global_batch_size, first_step)
    keys = RankBatches(order, first_step, config.steps, rank(), world_size())
    batches = load_batches(job.dataset, keys, job.collate_fn, job.num_workers)
    _set_train_mode(model)
    with (
        StopRequest() as stop,
        CheckpointWriter() as writer,
        RankWatch(config.step_timeout, checkpoints, writer.settle) as watch,
        closing(batches),
    ):
        watch.now(WAITING, first_step + 1)
        for step, batch in enumerate(on_device(batches, device), first_step):
            done = step + 1
            last = done == config.steps
            watch.now(COMPUTING, done)
            factor = lr_factor(step, config.steps, optim.warmup_steps)
            set_lr(engine.optimizer, factor)
            seed_everything(config.seed, step, rank())
            losses = engine(batch)
            engine.backward(losses["loss"])
            wants_to_stop = stop.requested or time.monotonic() > deadline
            outcome = step_if_sound(
                engine, losses["loss"], optim.grad_clip, health.fault, flag=wants_to_stop
            )
            stopping = outcome.flagged
            health.note(outcome.loss, outcome.grad_norm, skipped=bool(outcome.fault))
            writer.check()
            log.advance()

            numbers = {"lr": factor * optim.lr, "grad_norm": outcome.grad_norm}
            if outcome.fault:
                why = {"fault": outcome.fault, "sample_ids": _sample_ids(job, order, step)}
                log.row(done, "skipped", _mean_over_ranks(losses) | numbers | why)
                writer.wait()
                health.check(done, checkpoints)
            if _due(config.log_every, done, last or stopping):
                terms = _mean_over_ranks(losses)
                log.row(done, "train", terms | numbers | pace.since_last(done))
                _warn(job, log, done, terms)
            if job.evaluate is not None and not stopping and _due(job.eval_every, done, last):
                watch.now(EVALUATING, done)
                metrics = _evaluate(whole_model(engine, model, device), job.evaluate)
                log.row(done, "eval", metrics)
            if _due(config.save_every, done, last or stopping):
                watch.now(SAVING, done)
                write = partial(writer.write, checkpoints, keep=config.keep_checkpoints)
                kept = identity | {"step": done, "health": health.state()}
                save_run(engine, model, kept, write, job.kept_frozen)
            if stopping and not last:
                exit_code = _agreed_exit_code(stop.signal_number)
                log.message(f"stopped after step {done}; the same command continues from there")
                break
            watch.now(WAITING, done + 1)
        log.close()
        if exit_code == 0:
            watch.now(SAVING, done)
            _save_model(job, whole_model(engine, model, "cpu"), output_dir)
        writer.wait()
        barrier()
    return TrainResult(done, exit_code, metrics)


def _warn(job: Job, log: TrainLog, done: int, terms: dict[str, float]) -> None:
    """Tells what is wrong with a logged step."""
    for warning in (job.warn(done, terms) if job.warn else "", runaway_scales(job.model)):
        if warning:
            log.message(warning)


def _save_model(job: Job, model: nn.Module, output_dir: Path) -> None:
    if is_main():
        with whole_directory(output_dir / "model") as partial_directory:
            job.save_model(model, partial_directory)
            write_run_card(
                partial_directory, job.resolved_config, job.default_config, output_dir / "log.jsonl"
            )


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


def _agreed_exit_code(signal_number: int) -> int:
    """128 + the number of the signal that any rank got, or 0 if the time was up."""
    number = max(gather_objects(signal_number))
    return 128 + number if number else 0
