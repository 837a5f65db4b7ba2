from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard

from cloc_mllm.card import CARD_NAME, write_export_card, write_run_card
from cloc_mllm.data.parquet import load_records, write_records
from cloc_mllm.data.scenes import generate_scenes

SETTINGS = {
    "data": {"train": "runs/data/mine", "validation": "runs/data/held", "flip": 0.5},
    "run": {"output_dir": "runs/mine", "steps": 30, "seed": 0},
    "model": {"init": "photos", "tokenizer": "/home/me/tokenizer"},
}
DEFAULTS = {
    "data": {"train": "", "validation": "", "flip": 0.5},
    "run": {"output_dir": "runs/x", "steps": 10, "seed": 0},
}
ROWS = [
    {"step": 10, "kind": "eval", "acc": 0.25},
    {"step": 30, "kind": "eval", "acc": 0.75},
    {"step": 30, "kind": "train", "loss": 1.0},
]


def make(directory: Path, *files: str) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"fingerprint": {}}))
    for file in files:
        (directory / file).write_text("{}")
    return directory


@pytest.fixture
def run_card(tmp_path: Path) -> Path:
    directory = make(tmp_path / "runs" / "mine" / "model")
    log = tmp_path / "log.jsonl"
    log.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    write_run_card(directory, SETTINGS, DEFAULTS, log)
    return directory / CARD_NAME


def test_the_card_of_a_run_has_its_scores_and_settings(run_card: Path) -> None:
    card = ModelCard(run_card.read_text())
    assert card.data.to_dict() == {
        "license": "unknown",
        "library_name": "cloc-mllm",
        "pipeline_tag": "zero-shot-object-detection",
        "tags": ["cloc", "grounding"],
    }
    assert "# mine\n" in card.text and "ClocPredictor.from_pretrained" in card.text
    assert "after step 30, on a part of `runs/data/held`" in card.text
    assert "| acc | 0.75 |" in card.text and "| acc | 0.25 |" not in card.text
    (settings,) = card.text.split("```yaml\n")[1:]
    assert yaml.safe_load(settings.partition("```")[0]) == {
        "data": {"train": "runs/data/mine", "validation": "runs/data/held"},
        "run": {"output_dir": "runs/mine", "steps": 30},
        "model": {"init": "photos"},
    }


def test_a_run_without_evaluations_says_so(tmp_path: Path) -> None:
    directory = make(tmp_path / "model", "processor_config.json")
    write_run_card(directory, SETTINGS, DEFAULTS, tmp_path / "log.jsonl")
    card = ModelCard((directory / CARD_NAME).read_text())
    assert "None yet; `cloc-mllm eval` measures them." in card.text
    assert "GroundingPredictor" in card.text
    assert card.data.pipeline_tag == "image-text-to-text"


def test_other_directories_get_none(tmp_path: Path) -> None:
    write_run_card(tmp_path, SETTINGS, DEFAULTS, tmp_path / "log.jsonl")
    assert not (tmp_path / CARD_NAME).exists()


@pytest.mark.parametrize("source", ["runs/mine/model", "runs/mine"])
def test_an_export_takes_over_what_its_source_says(
    source: str, run_card: Path, tmp_path: Path
) -> None:
    run_card.write_text(run_card.read_text().replace("license: unknown", "license: mit"))
    out = make(tmp_path / "out")
    write_export_card(out, tmp_path / source, library="open_clip", use="import open_clip\n")
    card = ModelCard((out / CARD_NAME).read_text())
    assert card.data.library_name == "open_clip" and card.data.license == "mit"
    assert "# mine\n" in card.text and "## Use\n\n```python\nimport open_clip\n```\n" in card.text
    assert "ClocPredictor" not in card.text and "| acc | 0.75 |" in card.text
    titles = [line for line in card.text.splitlines() if line.startswith("## ")]
    assert titles == [
        f"## {title}"
        for title in ("Use", "What it knows", "Scores", "Training", "Licence", "Made from")
    ]


def test_an_export_of_what_has_no_card(tmp_path: Path) -> None:
    for source, knows in (("photos/cloc", "everyday photos"), ("a/model", "Its author has to say")):
        out = make(tmp_path / source)
        write_export_card(out, tmp_path / source)
        card = ModelCard((out / CARD_NAME).read_text())
        assert card.data.license == "unknown" and knows in card.text


def test_the_card_of_a_data_set(tmp_path: Path) -> None:
    records = generate_scenes(3, split="test", long_side=64)
    write_records(records, tmp_path / "mine", arguments={"source": "scenes", "seed": 0})
    card = DatasetCard((tmp_path / "mine" / CARD_NAME).read_text())
    assert card.data.to_dict()["configs"][0]["data_files"] == "shard-*.parquet"
    assert "# mine\n\n3 records with boxes and phrases, as Parquet." in card.text
    assert "source: scenes\nseed: 0\n" in card.text and "by reason: nothing." in card.text
    assert len(load_records(tmp_path / "mine")) == 3
