"""Stage 1: CLOC pre-training (arXiv 2410.02746, equation 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from cloc_mllm.command_line import parse_options
from cloc_mllm.config import Stage1Config
from cloc_mllm.data.acceptance import refuse_nothing_to_learn
from cloc_mllm.data.collate import ClocBatch, ClocCollator, log_prior_of_texts
from cloc_mllm.data.mixture import (
    Mixture,
    load_training_records,
    missing_sets,
    missing_validation,
    parts_of,
)
from cloc_mllm.data.noise import NoisyLabels
from cloc_mllm.data.parquet import RecordDataset, load_records
from cloc_mllm.data.records import Record
from cloc_mllm.data.tokenizer import TextTokenizer
from cloc_mllm.data.transforms import Preprocessing
from cloc_mllm.losses.cloc_loss import cloc_loss
from cloc_mllm.models.build import build_cloc, build_cloc_shapes, load_tokenizer, save_cloc
from cloc_mllm.models.clip_config import resolve_model
from cloc_mllm.models.cloc import Cloc
from cloc_mllm.train.data_order import DataOrder
from cloc_mllm.train.engine import StepFn, compile_towers
from cloc_mllm.train.entry import DRY_RUN_OPTIONS, Plan, dry_run_report, with_precision
from cloc_mllm.train.frozen_towers import check_towers_are_frozen, fill_tower_features
from cloc_mllm.train.loop import Evaluate, Job, TrainResult, train
from cloc_mllm.train.memory_stage1 import cost_of_stage1
from cloc_mllm.train.optim import freeze_by_lr

_COLLAPSED = 0.9  # share of pairs left out from which a run is warned of
_EVALUATION_RECORDS = 256  # the first ones of the validation set, in each periodic evaluation


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `deepspeed training/stage1.py --config x.yaml [--optim.lr 1e-4] [--dry_run]`.

    Returns:
        the exit code: 0, or 128 + the number of the signal that stopped the run.
    """
    config, options = parse_options(
        Stage1Config,
        argv,
        prog="stage1",
        description="CLOC pre-training (stage 1).",
        options=DRY_RUN_OPTIONS,
    )
    plan = Plan.of_options(options)
    if options["dry_run"]:
        dry_run_stage1(config, plan)
        return 0
    return run_stage1(config).exit_code


def dry_run_stage1(config: Stage1Config, plan: Plan) -> None:
    """Prints what a run would do and need. It reads no weights, and data only if they are there.

    Raises:
        ValueError: the configuration or the data cannot be used.
    """
    _check(config)
    model_config = resolve_model(config.model)
    config = dataclasses.replace(with_precision(config), model=model_config)
    order, missing = None, missing_sets(config.data)
    if not missing:
        records = _load(config)
        run = config.run
        order = DataOrder(len(records), run.global_batch_size, run.seed, parts_of(records))
    model = build_cloc_shapes(model_config, load_tokenizer(model_config))
    freeze_by_lr(model, config.optim)
    if config.data.feature_cache:
        check_towers_are_frozen(model)
    print(dry_run_report(config, model, order, plan.num_gpus))
    if missing := [*missing, *missing_validation(config.data)]:
        print(f"not there yet:    {', '.join(missing)} (`cloc-mllm data build` makes a data set)")
    print(f"regions seen:     {_regions(config)}\n\n{cost_of_stage1(config, model, plan)}")


def _load(config: Stage1Config) -> RecordDataset | Mixture:
    records = load_training_records(config.data)
    refuse_nothing_to_learn(
        records.without_images(),
        learns_regions=config.model.prompter.kind != "none",
        allow_no_regions=config.data.allow_no_regions,
        allow_no_captions=config.data.allow_no_captions,
    )
    return records


def run_stage1(config: Stage1Config) -> TrainResult:
    """Trains a CLOC and writes it to `config.run.output_dir/model`.

    Raises:
        ValueError, FileNotFoundError: the configuration or the data cannot be used.
    """
    _check(config)
    model_config = resolve_model(config.model)
    config = dataclasses.replace(with_precision(config), model=model_config)
    records = _load(config)
    dataset: Sequence[Record] = records
    if config.data.label_noise:
        dataset = NoisyLabels(dataset, config.data.label_noise, config.run.seed)
    tokenizer = load_tokenizer(model_config)
    evaluate = _evaluation(config, tokenizer)
    torch.manual_seed(config.run.seed)  # the initial weights
    model = build_cloc(model_config, tokenizer)
    freeze_by_lr(model, config.optim)
    if config.data.feature_cache:
        check_towers_are_frozen(model)
    if config.run.gradient_checkpointing:
        model.set_gradient_checkpointing(True)
    if config.run.compile:
        compile_towers(model, config.run.zero_stage)
    model.micro_batch_size = config.run.micro_batch_size
    collator = ClocCollator(
        tokenizer,
        Preprocessing.of(model_config),
        config.data.regions_per_image,
        config.data.flip,
        config.data.free_form_share,
        region_texts=config.data.region_texts,
    )
    if prior := model_config.phrase_prior:
        texts = records.without_images()
        collator.log_prior = log_prior_of_texts(texts, config.data.region_texts, prior)
    if config.data.feature_cache:
        fill_tower_features(model, tokenizer, dataset, collator, config)

    def save_model(trained: nn.Module, directory: Path) -> None:
        assert isinstance(trained, Cloc)
        save_cloc(trained, directory, model_config, tokenizer)

    job = Job(
        model,
        stage1_step(config),
        dataset,
        collator,
        save_model,
        resolved_config=dataclasses.asdict(config),
        default_config=dataclasses.asdict(Stage1Config()),
        fingerprint=dict(Preprocessing.of(model_config).fingerprint(tokenizer)),
        evaluate=evaluate,
        warn=partial(warn_of_collapse, config),
        eval_every=config.run.eval_every,
        num_workers=config.data.num_workers,
        mixture=parts_of(records),
    )
    return train(job, config.run, config.optim)


def _check(config: Stage1Config) -> None:
    if bool(config.data.free_form_share) != config.model.prompter.free_form:
        raise ValueError(
            "model.prompter.free_form and data.free_form_share go together: got "
            f"{config.model.prompter.free_form} and {config.data.free_form_share}"
        )
    if config.run.micro_batch_size < 0:
        raise ValueError(
            f"run.micro_batch_size is {config.run.micro_batch_size}; give the number of images "
            "that a rank may hold the activations of at a time, or 0 for all"
        )
    if config.run.micro_batch_size and config.run.zero_stage == 3:
        raise ValueError(
            "run.micro_batch_size does not go with run.zero_stage 3, which wants the same calls on "
            "every rank, while ranks have different numbers of phrases; use zero_stage 2"
        )


def _regions(config: Stage1Config) -> str:
    if config.data.regions_per_image == 0:
        return "all of every image"
    images = config.run.steps * config.run.global_batch_size
    most = images * config.data.regions_per_image
    return f"at most {most:,} = {config.data.regions_per_image} per image"


def stage1_step(config: Stage1Config) -> StepFn:
    """Makes the step: L = L_CLIP + lambda (L_CLOC + L_grounding) of one batch (equation 4)."""

    def step(model: nn.Module, batch: ClocBatch) -> dict[str, Tensor]:
        outputs = model(batch)
        # similarities times a scale of 100 would be off by up to 0.4 in bf16
        with torch.autocast(outputs.image_features.device.type, enabled=False):
            return cloc_loss(outputs, batch, config.loss)

    return step


def warn_of_collapse(config: Stage1Config, done: int, terms: dict[str, float]) -> str:
    """Says so if the filter takes the texts of nearly all regions for the same, so that L_CLOC has
    nothing to tell apart. Texts of an untrained tower are alike, too, so warm-up is left out."""
    share = terms.get("same_text", 0.0)
    if share < _COLLAPSED or done <= config.optim.warmup_steps:
        return ""
    return (
        f"step {done}: loss.same_text_threshold {config.loss.same_text_threshold} leaves out "
        f"{share:.0%} of the pairs of regions and texts, because the texts' features are alike, so "
        "the region loss teaches nothing; lower the rate of the text tower (optim.layer_lr: {text: "
        "...}) or start from a trained one"
    )


def _evaluation(config: Stage1Config, tokenizer: TextTokenizer) -> Evaluate | None:
    """Scores regions on the first records of `data.validation`; None if there are none."""
    if not config.data.validation:
        return None
    validation = load_records(config.data.validation, cache_dir=config.data.cache_dir)

    def evaluate(model: nn.Module) -> dict[str, float]:
        from cloc_mllm.evaluation.quick import quick_region_metrics

        assert isinstance(model, Cloc)
        records = validation[:_EVALUATION_RECORDS]
        return quick_region_metrics(model, tokenizer, records, precision=config.run.precision)

    return evaluate
