from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from cloc_mllm.config import ModelConfig, PrompterConfig
from cloc_mllm.data.records import Record
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.models.build import build_cloc
from cloc_mllm.models.cloc import Cloc
from tests.tiny_mllm import cloc_dir, llm_dir, mllm_dir

__all__ = ["cloc_dir", "llm_dir", "mllm_dir"]


class CharacterTokenizer:
    """The smallest tokenizer with right padding and a highest last id."""

    vocab_size = 130
    context_length = 12

    def __call__(self, texts: Sequence[str]) -> Tensor:
        rows = [[ord(c) % 128 + 1 for c in text.lower()[:11]] + [129] for text in texts]
        length = max(map(len, rows), default=1)
        padded = [row + [0] * (length - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.long).reshape(len(rows), length)


def build_tiny_cloc(tokenizer: CharacterTokenizer, kind: str = "prompter", seed: int = 0) -> Cloc:
    config = ModelConfig(
        clip_config={
            "embed_dim": 16,
            "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
            "text_cfg": {"layers": 1, "width": 16, "heads": 1},
        },
        image_size=64,
        context_length=12,
        prompter=PrompterConfig(kind=kind),
    )
    torch.manual_seed(seed)
    return build_cloc(config, tokenizer)


@pytest.fixture(scope="session")
def character_tokenizer() -> CharacterTokenizer:
    return CharacterTokenizer()


@pytest.fixture(scope="session")
def tiny_cloc(character_tokenizer: CharacterTokenizer) -> Cloc:
    return build_tiny_cloc(character_tokenizer)


@pytest.fixture(scope="session")
def test_scenes() -> list[Record]:
    """8 built-in test scenes, the first of them without regions."""
    scenes = list(generate_scenes(8, split="test", long_side=64))
    scenes[0].regions = []
    return scenes


@pytest.fixture
def photos(tmp_path: Path) -> Callable[..., Path]:
    """Writes named photos of 100 x 50 pixels into a folder and returns it."""

    def write(*names: str) -> Path:
        folder = tmp_path / "photos"
        folder.mkdir(exist_ok=True)
        for name in names:
            Image.new("RGB", (100, 50), "green").save(folder / name, "JPEG")
        return folder

    return write
