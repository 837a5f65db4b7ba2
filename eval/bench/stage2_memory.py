"""Peak memory of stage 2's LoRA step on a random model of a shape, beside what `--dry_run` says.

python eval/bench/stage2_memory.py --shape qwen2.5-0.5b --dtype float32 --precision fp32
python eval/bench/stage2_memory.py --shape qwen2.5-0.5b --dtype bfloat16 --precision bf16
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from cloc_mllm.config import (
    ConversationConfig,
    MllmConfig,
    ModelConfig,
    Stage2Config,
    Stage2DataConfig,
    Stage2RunConfig,
    TowerOptimConfig,
)
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.devices import DTYPES
from cloc_mllm.mllm.build import build_mllm, hold_frozen, new_token_ids
from cloc_mllm.mllm.collate import ConversationCollator
from cloc_mllm.mllm.configuration import ClocMllmConfig
from cloc_mllm.mllm.coordinates import BoxFormat
from cloc_mllm.mllm.language_model import attention_for_training
from cloc_mllm.mllm.tiny_llm import build_tokenizer
from cloc_mllm.models.clip_config import full_clip_config, resolve_model
from cloc_mllm.shipped import shipped_directory
from cloc_mllm.train.engine import start_engine, start_processes, step_if_sound
from cloc_mllm.train.memory import StepEstimate, StepShape, cheaper, estimate_step
from cloc_mllm.train.optim import lr_factor, set_lr
from cloc_mllm.train.stage2 import answer_step

_LLAMA_3_1_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
_SMOLLM2: dict[str, Any] = {"vocab_size": 49152, "tie_word_embeddings": True}
SHAPES: dict[str, PreTrainedConfig] = {
    "smollm2-135m": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        **_SMOLLM2,
    ),
    "smollm2-360m": LlamaConfig(
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
        **_SMOLLM2,
    ),
    "qwen2.5-0.5b": Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "qwen2.5-7b": Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        tie_word_embeddings=False,
    ),
    "llama-3.1-8b": LlamaConfig(**_LLAMA_3_1_8B),
}

_IMAGE_SIZE = 224


@dataclass(frozen=True)
class Measured:
    """A step's peak in bytes above the process's memory before the model, estimate and losses."""

    peak: int
    estimate: StepEstimate
    losses: list[float]


def write_language_model(shape: str, directory: Path) -> None:
    """Saves a random language model of a shape in bfloat16, with the built-in data's tokenizer."""
    tokenizer: Any = build_tokenizer(BoxFormat("location_tokens", 100))
    config = SHAPES[shape]
    config.bos_token_id, config.eos_token_id = None, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def job(language_model: Path, *, dtype: Any, precision: Any, num_images: int) -> Stage2Config:
    """A LoRA run on the built-in scenes, read by the shipped encoder."""
    return Stage2Config(
        model=MllmConfig(
            cloc=str(shipped_directory("cloc")), language_model=str(language_model), dtype=dtype
        ),
        data=Stage2DataConfig(),
        conversations=ConversationConfig(questions_per_image=6),
        optim=TowerOptimConfig(lr=1e-3, warmup_steps=0),
        run=Stage2RunConfig(global_batch_size=num_images, precision=precision),
    )


def measure(config: Stage2Config, num_steps: int) -> Measured:
    """Runs some steps in a fresh process, each on other scenes.

    There each tensor from 64 KiB has a mapping of its own, so that what is resident is what lives;
    glibc's heap keeps more than half again of holes between them.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # glibc reads it when a process starts
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
        return process.submit(_measure, config, num_steps).result()


def _measure(config: Stage2Config, num_steps: int) -> Measured:
    device = start_processes()
    size = config.run.global_batch_size
    scenes = iter(generate_scenes(size * num_steps, split="train", seed=0))
    records = [[next(scenes) for _ in range(size)] for _ in range(num_steps)]
    before = bytes_of("VmRSS")
    torch.manual_seed(0)
    model, processor = build_mllm(config.model)
    hold_frozen(model, DTYPES[config.model.dtype])
    collator = ConversationCollator(processor, config.conversations)
    batches = [collator([(i, record) for i, record in enumerate(of)]) for of in records]
    engine = start_engine(model, answer_step, config.run, config.optim)
    model.train()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what loading has freed
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    losses = []
    for step, batch in enumerate(batches):
        set_lr(engine.optimizer, lr_factor(step, num_steps, 0))
        values = engine(batch.to(device))
        engine.backward(values["loss"])
        step_if_sound(engine, values["loss"], config.optim.grad_clip)
        losses.append(float(values["loss"].detach()))
    # files count, too: weights that keep their dtype stay mapped from theirs
    peak = bytes_of("VmHWM") - before
    new = new_token_ids(processor)
    shapes = [StepShape.of_batch(batch) for batch in batches]
    largest = max(shapes, key=lambda shape: shape.num_sequences * shape.num_tokens)
    assert isinstance(model.config, ClocMllmConfig)
    estimate = estimate_step(config, model.config, new, largest, attention=attention_for_training())
    return Measured(peak, estimate, losses)


def estimates(shape: str) -> Iterator[tuple[str, StepEstimate]]:
    """What LoRA of rank 16 needs with ever cheaper settings, behind a ViT-B/16 at 224 px: four
    sequences of 1,024 tokens per GPU, each with an image and 100 labelled tokens."""
    vit = resolve_model(ModelConfig("ViT-B-16", image_size=_IMAGE_SIZE))
    clip_config = {**full_clip_config(vit), "text_cfg": {}}
    vit = dataclasses.replace(vit, architecture="", clip_config=clip_config, tokenizer="")
    shipped = ClocMllmConfig.from_pretrained(shipped_directory("mllm")).to_dict()
    changes = {"cloc_config": dataclasses.asdict(vit), "text_config": SHAPES[shape]}
    model_config = ClocMllmConfig(**{**shipped, **changes, "projector_width": 0})
    num_bytes = 4 * (4 * 3 * _IMAGE_SIZE**2 + 1024**2)  # pixels in float32, masks in bool
    step = StepShape(4, 1024, num_labels=400, num_images=4, num_regions=12, num_bytes=num_bytes)
    config = Stage2Config(model=MllmConfig(dtype="bfloat16"), run=Stage2RunConfig(precision="bf16"))
    for setting, cheaper_config in [("model.dtype: bfloat16", config), *cheaper(config)]:
        yield setting, estimate_step(cheaper_config, model_config, list(range(100)), step)


def bytes_of(name: str) -> int:
    """Reads a line of /proc/self/status (Linux): VmRSS is resident memory, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--images", type=int, default=4, help="per step")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--language_model", type=Path, help="directory to keep the model in")
    parser.add_argument("--estimate", action="store_true", help="only, of three settings")
    args = parser.parse_args()
    if args.estimate:
        for setting, found in estimates(args.shape):
            print(f"{setting:<34} {found.total / 2**30:6.2f} GiB {found}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.language_model or Path(temporary) / args.shape
        if not (directory / "config.json").is_file():
            write_language_model(args.shape, directory)
        config = job(directory, dtype=args.dtype, precision=args.precision, num_images=args.images)
        measured = measure(config, args.steps)
    parts = {name: round(value / MIB) for name, value in vars(measured.estimate).items()}
    parts.pop("flops")
    estimated = measured.estimate.total
    print(f"{args.shape}, weights {args.dtype}, precision {args.precision}, {args.images} images")
    print(
        f"  measured {measured.peak / MIB:,.0f} MiB, estimated {estimated / MIB:,.0f} MiB "
        f"({estimated / measured.peak - 1:+.1%}): {parts}"
    )
    print("  losses " + " ".join(f"{loss:.4f}" for loss in measured.losses))


if __name__ == "__main__":
    main()
