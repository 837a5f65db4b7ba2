"""Runs what a GPU must be able to do, once, in at most 8 minutes on an H100-class card:

    make gpu-check        # or: python eval/bench/gpu_check.py [--output runs/bench/gpu_check.json]

1. tests      the tests marked `gpu`
2. losses     a CLOC step's losses in float32 equal those of the CPU
3. steps      CLIP and CLOC steps of ViT-B/16 and L/14 in bf16 beside open_clip's own: images/s,
              share of the card's peak (MFU), peak memory
4. training   stage 1 for 3 steps through DeepSpeed, with a checkpoint
5. stage 2    steps of an MLLM of SmolLM2-135M's shape, in bf16 and in 4 bits, and an answer

It needs what `pip install` brought and no network: weights are random. What is missing (a GPU,
DeepSpeed, bitsandbytes) is said and left out. Without a GPU the other parts run on tiny models,
which shows that the check itself works and nothing about speed. The exit status is 1 if a part
failed.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.config import (
    ConversationConfig,
    LoraConfig,
    MllmConfig,
    ModelConfig,
    Quantization,
    Stage1Config,
    Stage1DataConfig,
    Stage1RunConfig,
)
from cloc_mllm.data.parquet import write_records
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.data.tokenizer import load_text_tokenizer, train_byte_level_bpe
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.mllm import build_mllm
from cloc_mllm.mllm.collate import ConversationCollator
from cloc_mllm.models.build import build_cloc, load_tokenizer, save_cloc
from cloc_mllm.models.clip_config import resolve_model
from cloc_mllm.train.entry import CARDS
from cloc_mllm.train.stage1 import run_stage1
from cloc_mllm.train.stage2 import answer_step
from ratio import machine_state, save_samples
from step import ClocStep, matched_steps, read_batch

_ROOT = Path(__file__).resolve().parents[2]
_NO_GPU = "left out: no GPU"
_TOKENIZER = "open_clip:ViT-B-16"
# the largest difference between losses of GPU and CPU in float32, of losses around 1 to 10
_LOSS_TOLERANCE = 1e-3
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What the parts run on.

    Attributes:
        architectures: open_clip's name -> images of a step.
        image_size: pixels, of all of them.
        llm: shape of the language model, as arguments of `LlamaConfig`.
        steps: timed steps of each kind.
    """

    architectures: dict[str, int]
    image_size: int
    llm: dict[str, int]
    steps: int


_SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
}
_ON_GPU = Sizes({"ViT-B-16": 256, "ViT-L-14": 128}, 224, _SMOLLM2_135M, steps=10)
_TINY = "gpu-check-tiny"
_ON_CPU = Sizes(
    {_TINY: 4},
    64,
    {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 1024,
    },
    steps=2,
)


def marked_tests(device: str) -> list[Row]:
    """Runs `pytest -m gpu`.

    Raises:
        RuntimeError: a test failed; its output is the message.
    """
    if device == "cpu":
        return [{"what": "tests marked gpu", "result": _NO_GPU}]
    if importlib.util.find_spec("pytest") is None:
        return [{"what": "tests marked gpu", "result": "left out: no pytest"}]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(_ROOT / "tests")]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-4000:] + done.stderr[-1000:])
    return [{"what": "tests marked gpu", "result": done.stdout.strip().splitlines()[-1]}]


def equal_losses(device: str, sizes: Sizes) -> list[Row]:
    """Compares all losses of one batch in float32 with those of the CPU.

    Raises:
        ValueError: one differs by more than `_LOSS_TOLERANCE`.
    """
    if device == "cpu":
        return [{"what": "losses equal the CPU's", "result": _NO_GPU}]
    name = next(iter(sizes.architectures))
    tokenizer = load_text_tokenizer(_TOKENIZER)
    batch = read_batch("", 8, tokenizer, sizes.image_size)
    torch.manual_seed(0)
    config = resolve_model(ModelConfig(name, image_size=sizes.image_size))
    on_cpu = ClocStep(config, tokenizer, batch, bf16=False)
    on_gpu = copy.copy(on_cpu)
    on_gpu.model = copy.deepcopy(on_cpu.model).to(device)
    on_gpu.batch, on_gpu.device = batch.to(device), torch.device(device)
    with torch.no_grad():
        expected, actual = on_cpu.forward(), on_gpu.forward()
    worst = max(abs(float(actual[key]) - float(expected[key])) for key in expected)
    if worst > _LOSS_TOLERANCE:
        raise ValueError(f"losses differ from the CPU's by {worst}: {actual} and {expected}")
    return [{"what": f"losses of {name} equal the CPU's", "result": f"within {worst:.1e}"}]


def training_steps(device: str, sizes: Sizes) -> list[Row]:
    """Times steps of CLIP and CLOC beside open_clip's on the same weights and batch."""
    tokenizer = load_text_tokenizer(_TOKENIZER)
    rows = []
    for name, num_images in sizes.architectures.items():
        batch = read_batch("", num_images, tokenizer, sizes.image_size, device)
        for kind in ("clip", "cloc"):
            ours, theirs = matched_steps(name, batch, tokenizer, kind, bf16=True)
            sides = {f"{kind}, ours": ours} | (
                {"clip, open_clip": theirs} if kind == "clip" else {}
            )
            for title, step in sides.items():
                rows.append({"what": f"{name} {title}"} | timed(step, num_images, device, sizes))
            del ours, theirs, sides
    return rows


def timed(step: Callable[[], object], num_images: int, device: str, sizes: Sizes) -> Row:
    """Images per second, share of the card's peak, and peak memory of a step."""
    step()  # the optimizer's state, chosen kernels
    with FlopCounterMode(display=False) as counter:
        step()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(sizes.steps):
        step()
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / sizes.steps
    row: Row = {"images_per_second": round(num_images / seconds, 1), "seconds": round(seconds, 4)}
    if device == "cpu":
        return row | {"result": "no GPU: no MFU, no peak memory"}
    name = torch.cuda.get_device_name()
    card = next((card for key, card in CARDS.items() if key.split("-")[0] in name.lower()), None)
    if card is not None:
        row["mfu"] = round(counter.get_total_flops() / seconds / card.bf16, 3)
    return row | {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}


def training_run(device: str, sizes: Sizes, directory: Path) -> list[Row]:
    """Runs stage 1 for 3 steps through DeepSpeed, with a checkpoint and a final model."""
    if importlib.util.find_spec("deepspeed") is None:
        return [{"what": "stage 1, 3 steps", "result": "left out: no DeepSpeed"}]
    write_records(generate_scenes(64, split="train", seed=0), directory / "records")
    name = next(iter(sizes.architectures))
    config = Stage1Config(
        model=ModelConfig(name, image_size=sizes.image_size, tokenizer=_TOKENIZER),
        data=Stage1DataConfig(train=str(directory / "records"), num_workers=0),
        run=Stage1RunConfig(
            str(directory / "run"), steps=3, global_batch_size=8, save_every=2, log_every=1
        ),
    )
    start = time.perf_counter()
    result = run_stage1(config)
    if result.step != 3 or not (directory / "run" / "model" / "model.safetensors").is_file():
        raise RuntimeError(f"stage 1 ended at step {result.step} of 3, or wrote no model")
    seconds = time.perf_counter() - start
    return [{"what": "stage 1, 3 steps", "result": f"done on {device}", "seconds": seconds}]


class Stage2Step:
    """A training step of an MLLM, and the losses of all steps so far."""

    def __init__(self, config: MllmConfig, device: str) -> None:
        torch.manual_seed(0)
        model, self.processor = build_mllm(config)
        self.model = model.to(device).train()
        self.device = device
        self.items = list(enumerate(generate_scenes(8, split="train", seed=1)))
        collator = ConversationCollator(self.processor, ConversationConfig(max_length=1024))
        self.batch = collator(self.items).to(device)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3)
        self.losses: list[float] = []

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device != "cpu"):
            loss = answer_step(self.model, self.batch)["loss"]
        loss.backward()
        self.optimizer.step()
        self.losses.append(float(loss))

    def answers(self) -> str:
        """Asks for two phrases; random weights answer anything, but boxes can be read."""
        picture = self.items[0][1].load_image()
        predictor = GroundingPredictor(self.model.eval(), self.processor)
        found = predictor.ground(picture, ["the crab", "the tent"])
        return f"{len(found.failures)} phrases asked, {sum(map(bool, found.failures))} unreadable"


def stage2_steps(device: str, sizes: Sizes, directory: Path) -> list[Row]:
    """Times steps of an MLLM in bf16 and in 4 bits, and lets it answer.

    Raises:
        ValueError: the loss did not fall.
    """
    cloc, llm = write_parts(directory, sizes)
    rows = []
    quantizations: tuple[Quantization, ...] = ("none", "4bit")
    for quantization in quantizations:
        title = "4 bits" if quantization == "4bit" else "float32" if device == "cpu" else "bf16"
        if quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
            rows.append({"what": f"stage 2, {title}", "result": "left out: no bitsandbytes"})
            continue
        config = MllmConfig(
            cloc=str(cloc),
            language_model=str(llm),
            dtype="float32" if device == "cpu" else "bfloat16",
            quantization=quantization,
            lora=LoraConfig(rank=8),
        )
        step = Stage2Step(config, device)
        rows.append({"what": f"stage 2, {title}"} | timed(step, len(step.items), device, sizes))
        if not step.losses[-1] < step.losses[0]:
            raise ValueError(f"stage 2, {title}: the loss did not fall: {step.losses}")
        start = time.perf_counter()
        told = step.answers()
        seconds = round(time.perf_counter() - start, 3)
        rows.append({"what": f"answers, {title}", "result": told, "seconds": seconds})
    return rows


def write_parts(directory: Path, sizes: Sizes) -> tuple[Path, Path]:
    """Writes an encoder and a language model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    name = next(iter(sizes.architectures))
    given = ModelConfig(name, image_size=sizes.image_size, tokenizer=_TOKENIZER)
    config = resolve_model(given)
    tokenizer = load_tokenizer(config)
    save_cloc(build_cloc(config, tokenizer), directory / "cloc", config, tokenizer)
    words = (
        text for scene in generate_scenes(50, split="train", seed=0) for text in scene.captions
    )
    train_byte_level_bpe(words, 512).save_pretrained(directory / "llm")
    llm = LlamaForCausalLM(LlamaConfig(**sizes.llm, tie_word_embeddings=True))
    llm.save_pretrained(directory / "llm")
    return directory / "cloc", directory / "llm"


def add_tiny_architecture(directory: Path) -> None:
    """Tells open_clip of a ViT-B/16 of two narrow layers."""
    import open_clip

    config = open_clip.get_model_config("ViT-B-16")
    config["vision_cfg"] |= {"layers": 2, "width": 64, "image_size": _ON_CPU.image_size}
    config["text_cfg"] |= {"layers": 2, "width": 64, "heads": 2}
    path = directory / f"{_TINY}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)


def table(parts: dict[str, list[Row]]) -> str:
    """One line per row: what it is, its numbers, its result."""
    units = {"images_per_second": "images/s", "seconds": "s", "mfu": "MFU", "peak_gib": "GiB"}
    lines = []
    for part, rows in parts.items():
        for row in rows:
            numbers = [f"{row[key]:,.4g} {unit}" for key, unit in units.items() if key in row]
            told = ", ".join([*numbers, *([row["result"]] if "result" in row else [])])
            lines.append(f"{part:<9} {row['what']:<34} {told}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("--output", default="runs/bench/gpu_check.json")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = _ON_CPU if device == "cpu" else _ON_GPU
    machine = machine_state() | {
        "device": torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    }
    print(json.dumps(machine), flush=True)
    parts: dict[str, list[Row]] = {}
    failed = False
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        add_tiny_architecture(directory)
        calls: dict[str, Callable[[], list[Row]]] = {
            "tests": lambda: marked_tests(device),
            "losses": lambda: equal_losses(device, sizes),
            "steps": lambda: training_steps(device, sizes),
            "training": lambda: training_run(device, sizes, directory),
            "stage 2": lambda: stage2_steps(device, sizes, directory),
        }
        for name, call in calls.items():
            try:
                parts[name] = call()
            except (ValueError, RuntimeError, OSError) as error:  # then the other parts run, too
                traceback.print_exc()
                parts[name] = [{"what": name, "result": f"FAILED: {error}"}]
                failed = True
            print(table({name: parts[name]}), flush=True)
    print(f"\n{machine['device']}, {time.perf_counter() - start:.0f} s\n{table(parts)}")
    save_samples(args.output, machine, parts)
    print(f"written to {args.output}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(run(main))
