"""Questions that share their image's prefill against one `generate` call per question: the shipped
model on built-in test scenes, then k questions on one image for a model with 196 image tokens,
beside k(I+q)/(I+kq).

    python eval/bench/generation.py --output runs/bench/generation.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from transformers import LlamaConfig

from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.config import ModelConfig
from cloc_mllm.data.conversations import PROMPTS
from cloc_mllm.data.records import Record
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.evaluation.record_index import RecordIndex
from cloc_mllm.inference.grounding_predictor import GroundingPredictor, Question
from cloc_mllm.inference.results import Answer
from cloc_mllm.inference.shared_prefix import shared_length
from cloc_mllm.mllm.configuration import ClocMllmConfig
from cloc_mllm.mllm.coordinates import BoxFormat
from cloc_mllm.mllm.modeling import ClocMllmForConditionalGeneration
from cloc_mllm.mllm.processing import ClocMllmProcessor, add_special_tokens
from ratio import interleaved_ratio, machine_state, report, save_samples

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
    return [
        Question(images[asked.image_id], PROMPTS["ground"].format(phrase=asked.text))
        for asked in RecordIndex(records).expressions
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


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="generation", description=__doc__)
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--questions", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--output", default="runs/bench/generation.json")
    args = parser.parse_args(argv)
    machine, results = machine_state(), {}
    print(machine)
    scenes = list(generate_scenes(args.scenes, split="test"))
    questions = scene_questions(scenes)
    sides = together_and_apart(GroundingPredictor.from_pretrained(device="cpu"), questions)
    check_equal(sides[0](), sides[1]())
    title = f"{len(questions)} questions on {len(scenes)} scenes, answers identical"
    results[title] = interleaved_ratio(*sides, pairs=args.pairs, warmups=0)
    cpu = results[title].cpu.median
    print(f"{report(title, results[title])}: {1 / cpu:.1f} x faster (CPU)", flush=True)

    predictor = random_predictor(args.layers)
    image = next(one.image for one in questions)
    about_one = [one for one in questions if one.image is image]
    for k in args.questions:
        asked = (about_one * k)[:k]
        sides, ideal = together_and_apart(predictor, asked), ideal_speedup(predictor, asked)
        check_equal(sides[0](), sides[1]())
        title = f"k = {k}, answers identical"
        results[title] = interleaved_ratio(*sides, pairs=args.pairs, warmups=0)
        speedup = 1 / results[title].cpu.median
        print(
            f"{report(title, results[title])}: {speedup:.2f} x faster (CPU), "
            f"{speedup / ideal:.0%} of k(I+q)/(I+kq) = {ideal:.2f}",
            flush=True,
        )
    save_samples(args.output, machine, results)


if __name__ == "__main__":
    sys.exit(run(main))
