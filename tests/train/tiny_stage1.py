"""The smallest stage-1 run: 32 scenes of 64 px, towers of width 32 and depth 1."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from cloc_mllm.config import (
    ModelConfig,
    Stage1Config,
    Stage1DataConfig,
    Stage1OptimConfig,
    Stage1RunConfig,
)
from cloc_mllm.data.parquet import write_records
from cloc_mllm.data.records import Record
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.data.tokenizer import train_byte_level_bpe


def write_tiny_inputs(directory: Path, num_scenes: int = 32) -> None:
    """`directory/records` and `directory/tokenizer`."""
    records = list(generate_scenes(num_scenes, split="train", long_side=64))
    write_records(records, directory / "records")
    texts = [text for record in records for text in record.captions]
    train_byte_level_bpe(texts, 400).save_pretrained(directory / "tokenizer")


def without_regions(record: Record) -> Record:
    return dataclasses.replace(record, regions=[])


def tiny_config(inputs: Path, output_dir: Path, **run: Any) -> Stage1Config:
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir),
        "steps": 6,
        "global_batch_size": 8,
        "precision": "fp32",
        "save_every": 0,
        "log_every": 1,
    }
    return Stage1Config(
        model=ModelConfig(
            clip_config={
                "embed_dim": 24,
                "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
                "text_cfg": {"layers": 1, "width": 32, "heads": 2},
            },
            image_size=64,
            tokenizer=str(inputs / "tokenizer"),
            context_length=24,
        ),
        data=Stage1DataConfig(train=str(inputs / "records"), num_workers=0, regions_per_image=2),
        optim=Stage1OptimConfig(lr=1e-3, warmup_steps=2),
        run=Stage1RunConfig(**(defaults | run)),
    )
