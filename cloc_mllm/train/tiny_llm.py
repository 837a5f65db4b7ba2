"""Pre-training of the small language model, on text alone: scenes in words, and questions.

A document is the layout of a built-in scene, which is never drawn. For each place in the image it
has one scene token, made of the name and the box of what lies there (`mllm/scene_tokens.py`). The
questions of stage 2 and their answers follow as text. The model learns to read such scenes: names,
boxes, sizes, order, left and right. Stage 2 then only has to teach the projectors to write scene
tokens from an image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from cloc_mllm.command_line import parse_job
from cloc_mllm.config import TinyLlmConfig
from cloc_mllm.data.conversations import needs_negatives, negatives_of, tasks_beyond_first
from cloc_mllm.data.records import Record, Region
from cloc_mllm.data.scenes import sample_layout, scene_rng
from cloc_mllm.data.sequences import LazySequence
from cloc_mllm.data.wordings import REGION_TOKEN, load_wordings
from cloc_mllm.devices import without_waiting
from cloc_mllm.distributed import all_reduce_sum, world_size
from cloc_mllm.mllm.collate import ConversationCollator, MllmBatch
from cloc_mllm.mllm.coordinates import BoxFormat
from cloc_mllm.mllm.language_model import attention_for_training
from cloc_mllm.mllm.losses import IGNORE_INDEX, SoftBins, answer_loss
from cloc_mllm.mllm.packing import mask_for
from cloc_mllm.mllm.processing import ClocMllmProcessor, token_ids
from cloc_mllm.mllm.scene_tokens import embed_scene
from cloc_mllm.mllm.tiny_llm import build_language_model, build_tokenizer
from cloc_mllm.train.data_order import DataOrder
from cloc_mllm.train.engine import StepFn
from cloc_mllm.train.entry import dry_run_report, with_precision
from cloc_mllm.train.loop import Job, TrainResult, train

_LONG_SIDE_PX = 600  # of a layout; nothing is drawn, so only proportions count


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `python training/tiny_llm.py --config x.yaml [--run.steps 400] [--dry_run]`.

    Returns:
        the exit code: 0, or 128 + the number of the signal that stopped the run.
    """
    config, dry_run = parse_job(
        TinyLlmConfig, argv, prog="tiny-llm", description="The small language model."
    )
    return run_tiny_llm(config, dry_run=dry_run).exit_code


def run_tiny_llm(config: TinyLlmConfig, *, dry_run: bool = False) -> TrainResult:
    """Trains the model and writes it to `config.run.output_dir/model`, a Hugging Face directory."""
    config = with_precision(config)
    box_format = BoxFormat("location_tokens", config.num_bins)  # scene tokens need them
    asks = config.conversations
    wordings = load_wordings(asks.wordings)
    tokenizer = build_tokenizer(box_format, wordings)
    torch.manual_seed(config.run.seed)
    model = build_language_model(config, tokenizer, box_format)
    model.set_attn_implementation(attention_for_training())
    processor = ClocMllmProcessor(
        tokenizer,
        image_size=config.image_size,
        num_image_tokens=config.num_image_tokens,
        box_format=box_format.kind,
        num_bins=box_format.num_bins,
    )
    processor.teach(wordings, tasks_beyond_first(asks))
    dataset = Layouts(config.num_scenes, config.run.seed)
    if dry_run:
        order = DataOrder(len(dataset), config.run.global_batch_size, config.run.seed)
        print(dry_run_report(config, model, order))
        return TrainResult(step=0)
    negatives = negatives_of(dataset) if needs_negatives(asks) else ()

    def save_model(trained: nn.Module, directory: Path) -> None:
        assert isinstance(trained, LlamaForCausalLM)
        trained.save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    job = Job(
        model,
        reading_step(processor, config),
        dataset,
        ConversationCollator(processor, asks, pictures=False, negatives=negatives),
        save_model,
        resolved_config=dataclasses.asdict(config),
        default_config=dataclasses.asdict(TinyLlmConfig()),
        fingerprint=processor.fingerprint,
        num_workers=1,
    )
    return train(job, config.run, config.optim)


@dataclasses.dataclass(frozen=True)
class Layouts(LazySequence[Record]):
    """The scenes of the training split as records without an image."""

    num_scenes: int
    seed: int

    def __len__(self) -> int:
        return self.num_scenes

    def _item(self, position: int) -> Record:
        layout = sample_layout(scene_rng(self.seed, "train", position))
        return Record(
            id=f"layout-{self.seed}-{position:06d}",
            image=b"",
            width=round(_LONG_SIDE_PX * min(1.0, layout.aspect)),
            height=round(_LONG_SIDE_PX / max(1.0, layout.aspect)),
            captions=list(layout.captions),
            regions=[
                Region(thing.box, thing.name, expressions=list(e), category=thing.name)
                for thing, e in zip(layout.things, layout.expressions, strict=True)
            ],
            source="layouts",
        )


def reading_step(processor: ClocMllmProcessor, config: TinyLlmConfig) -> StepFn:
    """Makes the step: cross-entropy of the answers, with noisy scene tokens as image tokens."""
    location = token_ids(processor.tokenizer, processor.coordinates.tokens())
    [region_id] = token_ids(processor.tokenizer, [REGION_TOKEN])
    smoothing = config.coordinate_smoothing
    soft_bins = SoftBins(location[0], config.num_bins, smoothing) if smoothing > 0 else None

    def step(model: nn.Module, batch: MllmBatch) -> dict[str, Tensor]:
        assert isinstance(model, LlamaForCausalLM) and batch.scene is not None
        embeddings = model.get_input_embeddings()
        cells, regions = embed_scene(
            batch.scene, embeddings, without_waiting(torch.tensor(location), model.device)
        )
        inputs = dict(batch.inputs)
        input_ids, labels = inputs.pop("input_ids"), inputs.pop("labels")
        kernel: Any = model.config._attn_implementation
        inputs["attention_mask"] = mask_for(kernel, inputs["attention_mask"])
        embeds = embeddings(input_ids)
        for token_id, tokens in ((processor.image_token_id, cells), (region_id, regions)):
            scale = config.noise * tokens.detach().std() if tokens.numel() else 0.0
            noisy = tokens + scale * torch.randn_like(tokens)
            here = (input_ids == token_id)[..., None]
            embeds = embeds.masked_scatter(here, noisy.to(embeds.dtype))
        logits = model(inputs_embeds=embeds, use_cache=False, **inputs).logits
        total = answer_loss(logits, labels, soft_bins)
        num_labels = (labels != IGNORE_INDEX).sum().float()
        return {"loss": total / (all_reduce_sum(num_labels) / world_size())}

    return step
