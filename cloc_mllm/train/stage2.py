"""Stage 2: a CLOC encoder, projectors and a language model with LoRA learn to answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from cloc_mllm.command_line import parse_options
from cloc_mllm.config import Stage1Config, Stage2Config
from cloc_mllm.data.chats import Chat
from cloc_mllm.data.conversations import needs_negatives, negatives_of
from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.data.mixture import (
    AnyDataset,
    Mixture,
    load_training_data,
    load_training_records,
    missing_sets,
    parts_of,
)
from cloc_mllm.data.parquet import ChatDataset, RecordDataset, load_set
from cloc_mllm.data.records import Record
from cloc_mllm.devices import DTYPES
from cloc_mllm.distributed import all_reduce_sum, launched_rank, world_size
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.mllm import (
    ClocMllmForConditionalGeneration,
    ClocMllmProcessor,
    build_mllm,
    merge_and_save,
)
from cloc_mllm.mllm.build import hold_frozen, mllm_shapes, new_token_ids
from cloc_mllm.mllm.collate import ConversationCollator, MllmBatch
from cloc_mllm.mllm.losses import IGNORE_INDEX
from cloc_mllm.models.clip_config import ResolvedModel, full_clip_config, resolve_model
from cloc_mllm.shipped import CONFIGS
from cloc_mllm.train.alignment import (
    align_projectors,
    check_alignment,
    forget_phrases,
    taught_parts,
)
from cloc_mllm.train.data_order import DataOrder
from cloc_mllm.train.engine import compile_towers, start_processes
from cloc_mllm.train.entry import (
    DRY_RUN_OPTIONS,
    Plan,
    dry_run_report,
    with_frozen_dtype,
    with_precision,
)
from cloc_mllm.train.features import check_encoder_is_frozen, fill_features
from cloc_mllm.train.loop import Evaluate, Job, TrainResult, train
from cloc_mllm.train.memory import StepShape, build_on_meta, cost_of_stage2
from cloc_mllm.train.optim import freeze_by_lr
from cloc_mllm.train.preflight import check_records, skip_chats

SKIPPED_NAME = "skipped_chats.jsonl"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `deepspeed training/stage2.py --config x.yaml [--optim.lr 1e-4] [--dry_run]`.

    Returns:
        the exit code: 0, or 128 + the number of the signal that stopped the run.
    """
    config, options = parse_options(
        Stage2Config,
        argv,
        prog="stage2",
        description="Tuning of the multimodal LLM (stage 2).",
        options=DRY_RUN_OPTIONS,
    )
    return run_stage2(config, options["dry_run"], Plan.of_options(options)).exit_code


def run_stage2(
    config: Stage2Config, dry_run: bool = False, plan: Plan | None = None
) -> TrainResult:
    """Trains an MLLM and writes it, LoRA merged, to `config.run.output_dir/model`.

    A dry run only prints what would be done, and what a step needs on the GPUs of `plan`.

    Raises:
        ValueError, FileNotFoundError: the configuration or the data cannot be used.
    """
    _check(config)
    config = with_frozen_dtype(with_precision(config))
    if dry_run:
        _dry_run(config, plan or Plan())
        return TrainResult(step=0)
    dataset = _load(config)
    start_processes()  # a quantised language model is loaded straight onto this rank's GPU
    model, collator = _build(config, dataset)
    if config.data.skip_chats:
        dataset = _without_unfit_chats(dataset, collator, config.run.output_dir)
    mixture, run = parts_of(dataset), config.run
    order = DataOrder(len(dataset), run.global_batch_size, run.seed, mixture)
    processor = collator.processor
    evaluate = _evaluation(config, processor)
    _check_data(dataset, collator, order, run.steps)
    collator.features = fill_features(model, processor, dataset, config)
    if config.run.compile:
        compile_towers(model, config.run.zero_stage)
    aligned = align_projectors(
        model, processor, cast(Sequence[Record], dataset), config, collator.features
    )
    if aligned is not None and aligned.exit_code:
        return aligned
    if config.run.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()

    def save_model(trained: nn.Module, directory: Path) -> None:
        assert isinstance(trained, ClocMllmForConditionalGeneration)
        merge_and_save(trained, processor, directory)

    job = Job(
        model,
        answer_step,
        dataset,
        collator,
        save_model,
        resolved_config=dataclasses.asdict(config),
        default_config=dataclasses.asdict(Stage2Config()),
        fingerprint=processor.fingerprint,
        evaluate=evaluate,
        eval_every=config.run.eval_every,
        num_workers=config.data.num_workers,
        mixture=mixture,
        kept_frozen=taught_parts(config.alignment),
    )
    return train(job, config.run, config.optim)


def _load(config: Stage2Config) -> AnyDataset | Mixture:
    # alignment tells the projectors of scenes, which records alone hold
    load = load_training_records if config.alignment.steps else load_training_data
    return load(config.data)


def _dry_run(config: Stage2Config, plan: Plan) -> None:
    """Prints what a run would do and need. It reads no weights, and data only if they are there."""
    model_config, processor = mllm_shapes(config.model, config.conversations, _planned_cloc(config))
    new_tokens = new_token_ids(processor)
    model = build_on_meta(config, model_config, new_tokens, "sdpa")
    _check_frozen(model, config)
    if missing := missing_sets(config.data):
        print(dry_run_report(config, model, None, plan.num_gpus))
        print(f"not there yet:    {', '.join(missing)} (`cloc-mllm data build` makes a data set)")
        shape = StepShape.assumed(config, model, plan.num_gpus)
        print(f"assumed:          each sequence is full ({config.conversations.max_length} tokens)")
    else:
        dataset, run = _load(config), config.run
        collator = _collator(config, processor, dataset)
        if config.data.skip_chats:
            dataset = _without_unfit_chats(dataset, collator, "")
        order = DataOrder(len(dataset), run.global_batch_size, run.seed, parts_of(dataset))
        _evaluation(config, processor)
        print(dry_run_report(config, model, order, plan.num_gpus) + "\n")
        _check_data(dataset, collator, order, run.steps)
        share = run.global_batch_size // plan.num_gpus
        step = [(seed, dataset[index]) for seed, index in order.batch(0)[:share]]
        shape = StepShape.of_batch(collator(step))
    if config.data.feature_cache:
        shape = shape.with_features(model)
    print("\n" + cost_of_stage2(config, model_config, new_tokens, shape, plan))


def _planned_cloc(config: Stage2Config) -> ResolvedModel | None:
    """The model of the shipped stage-1 config that writes to `model.cloc`, if that is not there
    yet; so a stage 2 can be planned before stage 1 was run."""
    wanted = Path(config.model.cloc)
    if config.model.init or wanted.exists():
        return None
    for path in sorted((CONFIGS / "training").glob("*.yaml")):
        if f"output_dir: {wanted.parent}\n" in path.read_text() and wanted.name == "model":
            stage1, _ = parse_options(
                Stage1Config, ["--config", str(path)], prog="stage1", description="", options={}
            )
            print(f"{wanted} is not there yet; its shapes are those of the config {path.stem}")
            model = resolve_model(stage1.model)
            clip_config = full_clip_config(model)
            saved = dataclasses.replace(model, clip_config=clip_config, architecture="", init="")
            return ResolvedModel(saved)
    return None


def _build(
    config: Stage2Config, dataset: AnyDataset | Mixture
) -> tuple[ClocMllmForConditionalGeneration, ConversationCollator]:
    """Builds the model, with its frozen parts in their dtype, and the collator of its batches."""
    torch.manual_seed(config.run.seed)  # the initial weights of projectors and LoRA
    asks = config.conversations
    model, processor = build_mllm(config.model, asks)
    freeze_by_lr(model, config.optim)
    taught = taught_parts(config.alignment)
    hold_frozen(model, DTYPES[config.model.dtype], taught)
    forget_phrases(processor, taught)
    _check_frozen(model, config)
    return model, _collator(config, processor, dataset)


def _check_frozen(model: ClocMllmForConditionalGeneration, config: Stage2Config) -> None:
    check_alignment(model, config.alignment)
    if config.data.feature_cache:
        check_encoder_is_frozen(model, config.alignment)


def _collator(
    config: Stage2Config, processor: ClocMllmProcessor, dataset: AnyDataset | Mixture
) -> ConversationCollator:
    asks = config.conversations
    negatives = negatives_of(dataset) if needs_negatives(asks) else []
    return ConversationCollator(processor, asks, negatives=negatives)


def _without_unfit_chats(
    dataset: AnyDataset | Mixture, collator: ConversationCollator, output_dir: str
) -> AnyDataset | Mixture:
    """Skips chats that cannot be learnt from, says how many, and lists them in the run's folder."""
    drop_log = DropLog()
    try:
        return skip_chats(dataset, collator, drop_log)
    finally:
        if launched_rank() == 0:
            print(f"chats for the model (data.skip_chats):\n{drop_log.summary()}")
            if output_dir and drop_log.drops:
                path = Path(output_dir) / SKIPPED_NAME
                path.parent.mkdir(parents=True, exist_ok=True)
                drop_log.write(path)
                print(f"every skipped chat with its reason: {path}")


def _check_data(
    dataset: AnyDataset | Mixture, collator: ConversationCollator, order: DataOrder, steps: int
) -> None:
    """Refuses records and chats that the run cannot use, and prints one sample."""
    checked = check_records(
        dataset.without_images(),
        len(dataset),
        collator,
        seed=order.seed,
        num_epochs=order.epochs_of_samples(steps),
    ).report()
    if launched_rank() == 0:
        print(f"{checked}\n{show_sample(dataset[0], collator, order.seed)}")


def answer_step(model: nn.Module, batch: MllmBatch) -> dict[str, Tensor]:
    """Computes the cross-entropy of the answers.

    It is scaled so that the mean over ranks is the mean over all answer tokens of the global batch.
    """
    num_labels = (batch.inputs["labels"] != IGNORE_INDEX).sum()
    num_items = all_reduce_sum(num_labels.float()) / world_size()
    outputs = model(**batch.inputs, num_items_in_batch=num_items, use_cache=False)
    dropped = outputs.loss.new_full((), float(batch.num_dropped))
    return {"loss": outputs.loss, "dropped_questions": dropped}


def _evaluation(config: Stage2Config, processor: ClocMllmProcessor) -> Evaluate | None:
    """Scores answers to questions drawn from `data.validation`, or the perplexity on its chats;
    None if there is no such set.

    Raises:
        ValueError: the records hold nothing to ask, or no question is to be asked.
    """
    if not config.data.validation:
        return None
    from cloc_mllm.evaluation.quick import draw_questions, quick_answer_metrics, quick_chat_metrics

    number = config.run.eval_questions
    if number < 1:
        raise ValueError(
            f"run.eval_questions is {number}; ask at least one, or leave data.validation empty"
        )
    items = load_set(config.data.validation, cache_dir=config.data.cache_dir)
    if items.kind == "chats":
        chats = cast(ChatDataset, items)[:number]
        length = config.conversations.max_length
        return lambda model: quick_chat_metrics(model, processor, chats, max_length=length)
    questions = draw_questions(cast(RecordDataset, items), number, config.run.seed)
    if not questions:
        raise ValueError(
            f"data.validation: the records of {config.data.validation} have no regions to ask "
            "about; leave it empty, or name records with regions"
        )

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, ClocMllmForConditionalGeneration)
        return quick_answer_metrics(GroundingPredictor(model, processor), questions)

    return evaluate


def show_sample(item: Record | Chat, collator: ConversationCollator, seed: int) -> str:
    """Writes a record or chat as the model is taught it, what it must learn to say in [[ ]]."""
    processor = collator.processor
    row = collator.pack(item, seed).row
    ids, labels = row.input_ids, row.labels
    pieces, learning = [f"one sample ({item.id}), learnt parts in [[ ]]:\n"], False
    for token, label in zip([*ids, None], [*labels, IGNORE_INDEX], strict=True):
        if (label != IGNORE_INDEX) != learning:
            learning = not learning
            pieces.append("[[" if learning else "]]\n")
        if token is not None:
            pieces.append(processor.tokenizer.decode([token]))
    image = processor.image_token
    return "".join(pieces).replace(
        image * processor.num_image_tokens, f"{image} x {processor.num_image_tokens} "
    )


def _check(config: Stage2Config) -> None:
    for name, maker in (("cloc", "training/stage1.py"), ("language_model", "training/tiny_llm.py")):
        if not getattr(config.model, name) and not config.model.init:
            raise ValueError(
                f"model.{name} is empty; name one, such as {maker} writes, or in model.init an "
                "MLLM to train further"
            )
