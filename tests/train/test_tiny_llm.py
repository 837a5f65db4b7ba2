"""Pre-training of the small language model: it learns from layouts, no picture is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cloc_mllm.config import ConversationConfig, OptimConfig, RunConfig, TinyLlmConfig
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.devices import resolve_precision
from cloc_mllm.train.checkpoint import list_checkpoints, load_checkpoint
from cloc_mllm.train.tiny_llm import Layouts, main, run_tiny_llm


@pytest.fixture
def config(tmp_path: Path) -> TinyLlmConfig:
    return TinyLlmConfig(
        width=32,
        layers=1,
        heads=2,
        mlp_width=32,
        num_scenes=40,
        num_image_tokens=16,
        num_bins=20,
        conversations=ConversationConfig(questions_per_image=3),
        optim=OptimConfig(lr=1e-2, warmup_steps=0),
        run=RunConfig(
            output_dir=str(tmp_path), steps=20, global_batch_size=4, precision="fp32", log_every=1
        ),
    )


def test_layouts_are_the_scenes_without_pictures() -> None:
    scenes = list(generate_scenes(3, split="train", seed=5))
    layouts = Layouts(3, seed=5)
    assert [list(layouts[i].regions) for i in range(3)] == [scene.regions for scene in scenes]
    assert [layouts[i].captions for i in range(3)] == [scene.captions for scene in scenes]
    for layout, scene in zip((layouts[i] for i in range(3)), scenes, strict=True):
        assert layout.image == b""
        assert layout.width / layout.height == pytest.approx(scene.width / scene.height, rel=0.02)


def test_it_learns_and_writes_a_language_model(config) -> None:
    import json

    assert run_tiny_llm(config).exit_code == 0
    output = Path(config.run.output_dir)
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    assert "<loc_19>" in tokenizer.get_vocab() and tokenizer.chat_template
    assert torch.isfinite(
        model(torch.tensor([tokenizer("Where is it?")["input_ids"]])).logits
    ).all()


def test_it_stores_the_precision_that_was_used(config) -> None:
    config.run.steps, config.run.precision = 1, "auto"
    run_tiny_llm(config)
    (directory,) = list_checkpoints(Path(config.run.output_dir) / "checkpoints")
    stored = load_checkpoint(directory).state["config"]["run"]["precision"]
    assert stored == resolve_precision("auto")


def test_it_can_learn_what_is_not_there(config) -> None:
    config.conversations = ConversationConfig(ground=0, refer=0, caption=0, absent=1)
    config.run.steps = 1
    assert run_tiny_llm(config).step == 1


def test_dry_run(config, capsys) -> None:
    assert main(["--dry_run", "--width", "32", "--run.output_dir", config.run.output_dir]) == 0
    said = capsys.readouterr().out
    assert "parameters" in said and "100,000 images" in said
    assert not (Path(config.run.output_dir) / "log.jsonl").exists()
