"""Perplexity of chats: the numbers, and the command from a set to its rows."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from cloc_mllm import cli, shipped
from cloc_mllm.data.parquet import load_chats
from cloc_mllm.evaluation.perplexity import token_losses
from cloc_mllm.mllm.processing import ClocMllmProcessor
from tests.tiny_mllm import cloc_dir, llm_dir, mllm_dir
from tests.train.test_stage2_chats import ROWS, built, row

__all__ = ["cloc_dir", "llm_dir", "mllm_dir"]
TEXTS = [
    row("Where is the crab?", "left of a clock"),
    row("a boat?", "yes", "and an apple, a red one?", "no, the second apple from the left"),
    row("What is it?", "a crab"),
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("texts"), TEXTS)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_losses_are_those_of_each_answer_after_its_chat(
    texts: Path, llm_dir: Path, batch_size: int
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llm_dir).eval()
    processor = ClocMllmProcessor(AutoTokenizer.from_pretrained(llm_dir))
    chats = load_chats(texts)[:]
    actual = token_losses(model, processor, chats, batch_size=batch_size)
    for chat in chats:
        messages = [{"role": turn.role, "content": turn.text} for turn in chat.turns]
        ids, labels = map(torch.tensor, processor.encode_conversation(messages))
        with torch.inference_mode():
            logits = model(ids[None]).logits[0]
        expected = F.cross_entropy(logits[:-1], labels[1:], reduction="none")[labels[1:] >= 0]
        of_chat = actual.values[np.array(actual.image_ids) == chat.id]
        np.testing.assert_allclose(of_chat, expected, rtol=1e-4)


def test_a_model_beside_itself(texts: Path, llm_dir: Path, capsys: Any) -> None:
    assert cli.main(["eval", "perplexity", str(texts), str(llm_dir), str(llm_dir)]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.startswith("3 chats, ")
    loss = float(first.split("loss ")[1].split()[0])
    perplexity = float(first.split("perplexity ")[1].split()[0])
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-3)
    assert second == f"{first}, +0.0 % [+0.0, +0.0]"


def test_an_mllm_beside_its_language_model(
    texts: Path, mllm_dir: Path, llm_dir: Path, capsys: Any
) -> None:
    """The MLLM's new tokens take some of the mass, so it is a little more perplexed."""
    assert cli.main(["eval", "perplexity", str(texts), str(llm_dir), str(mllm_dir)]) == 0
    change = capsys.readouterr().out.splitlines()[2].split(", ")[-2]
    assert 0 < float(change.split(" %")[0]) < 30


def test_chats_with_pictures_and_boxes(
    mllm_dir: Path, llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = built(tmp_path / "chats", ROWS[:4])
    arguments = ["eval", "perplexity", str(chats)]
    monkeypatch.setattr(shipped, "ASSETS", tmp_path)  # where it ships as `scenes`
    shutil.copytree(mllm_dir, tmp_path / "scenes" / "mllm")
    assert cli.main([*arguments, "scenes", "--limit", "3", "--batch_size", "2"]) == 0
    assert cli.main([*arguments, str(llm_dir)]) == 2


def test_what_is_no_model_is_refused(texts: Path, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["eval", "perplexity", str(texts), str(tmp_path)]) == 2
    assert "holds no model (no config.json)" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "least"), [("limit", 0), ("batch_size", 1), ("max_length", 2)])
def test_a_number_that_cannot_be_is_refused(option: str, least: int, capsys: Any) -> None:
    assert cli.main(["eval", "perplexity", "nowhere", "photos", f"--{option}", "-3"]) == 2
    assert f"--{option}: expected {least} or more, got -3" in capsys.readouterr().err
