"""The recipes for real data, each planned on the meta device: no GPU, no data, no weights, no hub.

Tokenizers and the shapes of language models come from the hub for a user; here the tokenizer is one
at hand and the shapes are written down.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from transformers import BertConfig, LlamaConfig, PreTrainedConfig, Qwen2Config

from cloc_mllm.data.tokenizer import train_byte_level_bpe
from cloc_mllm.shipped import CONFIGS
from cloc_mllm.train import stage1, stage2
from tests.tiny_mllm import llm_dir

__all__ = ["llm_dir"]

VICUNA_7B = LlamaConfig()  # the defaults of Transformers are LLaMA's 7 B, which Vicuna has
QWEN2_5_05B = Qwen2Config(
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    vocab_size=151_936,
    tie_word_embeddings=True,
)
PRETRAINING = [
    # name, GPUs, expected millions of parameters, largest expected GPU-days
    ("coco-hours", 1, 162.5, 0.5),
    ("b16-day", 8, 159.5, 8.0),
    ("l14-day", 8, 445.9, 8.0),
    ("paper", 64, 159.5, 200.0),
]


def gpu_days(told: str) -> str:
    (found,) = re.findall(r"= ([\d.,]+) GPU-days", told)
    return str(found)


@pytest.mark.parametrize(
    ("name", "gpus", "millions", "most_days"), PRETRAINING, ids=[row[0] for row in PRETRAINING]
)
def test_pretraining_is_planned(  # noqa: PLR0913  fixtures
    name: str,
    gpus: int,
    millions: float,
    most_days: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    offline = ["--model.tokenizer", "open_clip:ViT-B-16"]
    asked = ["--dry_run", "--gpu", "h100", "--gpus", str(gpus)]

    assert stage1.main(["--config", name, *asked, *offline]) == 0

    told = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    counts = re.search(r"^all +([\d,]+) +([\d,]+)$", told, re.MULTILINE)
    assert counts is not None
    total = sum(int(count.replace(",", "")) for count in counts.groups())
    assert total / 1e6 == pytest.approx(millions, rel=0.01)
    assert "not there yet:    runs/data/" in told
    assert "FLOPs of a step, per GPU:" in told
    assert "fits into 80 GiB of a GPU" in told
    assert re.search(r"^loading: [\d,]+ images/s per GPU need \d+ worker", told, re.MULTILINE)
    assert "cannot feed such a GPU" not in told
    assert 0 < float(gpu_days(told).replace(",", "")) <= most_days
    header = (CONFIGS / "training" / f"{name}.yaml").read_text()
    (gibibytes,) = re.findall(r"^  all +([\d.]+) GiB$", told, re.MULTILINE)
    assert f"By the dry run {float(gibibytes):.0f} GiB" in header
    assert f"{gpu_days(told)} GPU-days" in header


@pytest.mark.parametrize("name", ["stage1_flickr8k", "stage1_photos"])
def test_towers_of_files_are_planned_without_their_weights(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = train_byte_level_bpe(["a dog"], 300)
    tokenizer.save_pretrained("runs/towers/minilm")
    sizes = {"hidden_size": 384, "num_hidden_layers": 1, "num_attention_heads": 12}
    pad = tokenizer.pad_token_id
    BertConfig(vocab_size=400, pad_token_id=pad, **sizes).save_pretrained("runs/towers/minilm")

    assert stage1.main(["--config", name, "--dry_run"]) == 0

    told = capsys.readouterr().out
    assert re.search(r"^vision.encoder +[\d,]+ +[1-9][\d,]+$", told, re.MULTILINE)
    assert f"not there yet:    runs/data/{name.removeprefix('stage1_')}-train" in told


def test_too_few_workers_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["--dry_run", "--gpu", "h100", "--gpus", "8", "--model.tokenizer", "open_clip:ViT-B-16"]
    assert stage1.main(["--config", "b16-day", *asked, "--data.num_workers", "2"]) == 0
    told = capsys.readouterr().out
    assert "warning: data.num_workers 2 cannot feed such a GPU; raise it, or store smaller" in told


@pytest.mark.parametrize(
    ("name", "language_model", "card", "gpus", "millions"),
    [
        ("ferret-like", VICUNA_7B, "a100", 8, 7_056),
        ("llava15-like", VICUNA_7B, "a100", 8, 7_376),
        ("small", QWEN2_5_05B, "rtx4090", 1, 612),
    ],
    ids=["ferret-like", "llava15-like", "small"],
)
def test_stage_2_is_planned_before_stage_1_was_run(  # noqa: PLR0913  fixtures
    name: str,
    language_model: PreTrainedConfig,
    card: str,
    gpus: int,
    millions: float,
    llm_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(llm_dir, tmp_path / "llm")
    for weights in (tmp_path / "llm").glob("*.safetensors"):
        weights.unlink()
    language_model.save_pretrained(tmp_path / "llm")
    monkeypatch.chdir(tmp_path)
    asked = ["--dry_run", "--gpu", card, "--gpus", str(gpus), "--model.language_model", "llm"]

    assert stage2.main(["--config", name, *asked]) == 0

    told = capsys.readouterr().out
    assert "/model is not there yet; its shapes are those of the config" in told
    counts = re.search(r"^all +([\d,]+) +([\d,]+)$", told, re.MULTILINE)
    assert counts is not None
    total = sum(int(count.replace(",", "")) for count in counts.groups())
    assert total / 1e6 == pytest.approx(millions, rel=0.02)
    assert re.search(r"^fits into \d+ GiB of a GPU", told, re.MULTILINE)
    assert float(gpu_days(told).replace(",", "")) > 0


def test_questions_need_a_dry_run_and_a_known_card() -> None:
    with pytest.raises(ValueError, match="--gpus is a question to --dry_run"):
        stage1.main(["--config", "paper", "--gpus", "8"])
    with pytest.raises(ValueError, match="--gpu h1000 is unknown; known are a100"):
        stage1.main(["--config", "paper", "--gpu", "h1000", "--dry_run"])
