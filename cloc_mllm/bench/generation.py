"""Questions that share their image's prefill against one `generate` call a question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from transformers import LlamaConfig

from cloc_mllm.config import ModelConfig
from cloc_mllm.data.records import Record
from cloc_mllm.data.wordings import SINGLE, asked
from cloc_mllm.evaluation.record_index import RecordIndex
from cloc_mllm.inference.grounding_predictor import GroundingPredictor, Question
from cloc_mllm.inference.results import Answer
from cloc_mllm.inference.shared_prefix import shared_length
from cloc_mllm.mllm.configuration import ClocMllmConfig
from cloc_mllm.mllm.coordinates import BoxFormat
from cloc_mllm.mllm.modeling import ClocMllmForConditionalGeneration
from cloc_mllm.mllm.processing import ClocMllmProcessor, add_special_tokens

NEW_TOKENS = 5  # a box of four location tokens and the end
LOCATION_TOKENS = BoxFormat("location_tokens", 100)
_IMAGE_SIZE, _PATCH = 224, 16

Side = Callable[[], list[Answer]]


def random_predictor(
    num_layers: int, box_format: BoxFormat = LOCATION_TOKENS
) -> GroundingPredictor:
    """Random weights in the shape of ViT-S/16 at 224 px (196 image tokens) and SmolLM2-135M (at 30
    layers; the vocabulary is the shipped model's)."""
    tokenizer = GroundingPredictor.from_pretrained(device="cpu").processor.tokenizer
    num_tokens = (_IMAGE_SIZE // _PATCH) ** 2
    add_special_tokens(tokenizer, box_format)
    processor = ClocMllmProcessor(
        tokenizer,
        image_size=_IMAGE_SIZE,
        num_image_tokens=num_tokens,
        box_format=box_format.kind,
        num_bins=box_format.num_bins,
        box_head=box_format.head,
    )
    cloc = ModelConfig(
        clip_config={
            "embed_dim": 384,
            "vision_cfg": {"layers": 12, "width": 384, "patch_size": _PATCH},
            "text_cfg": {},
        },
        image_size=_IMAGE_SIZE,
    )
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=num_layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        initializer_range=0.1,  # far from ties between tokens
        eos_token_id=None,  # every answer has NEW_TOKENS tokens
        pad_token_id=tokenizer.pad_token_id,
    )
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("image", "region", "box")
    }
    torch.manual_seed(0)
    config = ClocMllmConfig(
        llama,
        asdict(cloc),
        image_token_id=ids["image"],
        region_token_id=ids["region"],
        vision_features="encoder",
        box_format=box_format.kind,
        num_bins=box_format.num_bins,
        box_token_id=ids["box"] if box_format.head else None,
        fingerprint=processor.fingerprint,
    )
    return GroundingPredictor(ClocMllmForConditionalGeneration(config), processor)


def scene_questions(records: Sequence[Record]) -> list[Question]:
    """The `rec` questions about the records; those about one image share the object."""
    images = {record.id: record.load_image() for record in records}
    wording = SINGLE.first("ground")
    return [
        Question(images[expression.image_id], asked(wording, phrase=expression.text))
        for expression in RecordIndex(records).expressions
    ]


def together_and_apart(
    predictor: GroundingPredictor, questions: Sequence[Question]
) -> tuple[Side, Side]:
    """(all questions in one call, one call a question)."""

    def apart() -> list[Answer]:
        return [predictor.answer([one], max_new_tokens=NEW_TOKENS)[0] for one in questions]

    return lambda: predictor.answer(questions, max_new_tokens=NEW_TOKENS), apart


def check_equal(together: Sequence[Answer], apart: Sequence[Answer]) -> None:
    """Raise an AssertionError that shows the first answer that differs."""
    for index, (one, other) in enumerate(zip(together, apart, strict=True)):
        assert one.text == other.text, f"question {index}: {one} {other}"


def ideal_speedup(predictor: GroundingPredictor, questions: Sequence[Question]) -> float:
    """k(I + q) / (I + kq): tokens read and written apart and together, q the mean of the k."""
    inputs = predictor.prepare(questions)
    region = predictor.model.config.region_token_id
    k, lengths = len(questions), inputs["attention_mask"].sum(1)
    shared = shared_length(inputs["input_ids"], inputs["attention_mask"], region)
    own = float((lengths - shared + NEW_TOKENS).float().mean())
    return k * (shared + own) / (shared + k * own)
