"""Models and data sets go to a hub and come back the same; the hub is one of our own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloc_mllm.card import CARD_NAME, write_export_card
from cloc_mllm.data.parquet import write_records
from cloc_mllm.data.scenes import generate_scenes
from tests.integration.hub import Hub, running_hub

_DEAD = "http://127.0.0.1:9"  # any request to elsewhere ends here

CLOC = """
from cloc_mllm import ClocPredictor
mine = ClocPredictor.from_pretrained({directory!r})
print(mine.push_to_hub("you/cloc", private=True))
theirs = ClocPredictor.from_pretrained("hf-hub:you/cloc")
for predictor in (mine, theirs):
    found = predictor.locate("photo.png", ["a crab"])
    print(found.boxes.xyxy.tolist(), found.scores.tolist())
"""
PREDICTOR = """
from cloc_mllm import GroundingPredictor
mine = GroundingPredictor.from_pretrained({directory!r})
print(mine.push_to_hub("you/mllm"))
theirs = GroundingPredictor.from_pretrained("hf-hub:you/mllm@main")
for predictor in (mine, theirs):
    print(repr(predictor.ask("photo.png", "Where is a crab?").text))
"""
TRANSFORMERS = """
from transformers import AutoModelForImageTextToText, AutoProcessor
from cloc_mllm import ClocMllmForConditionalGeneration, ClocMllmProcessor, GroundingPredictor
model = ClocMllmForConditionalGeneration.from_pretrained({directory!r})
processor = ClocMllmProcessor.from_pretrained({directory!r})
model.push_to_hub("you/parts", private=True)
print(processor.push_to_hub("you/parts").repo_url)
model2 = AutoModelForImageTextToText.from_pretrained("you/parts")
processor2 = AutoProcessor.from_pretrained("you/parts")
for pair in ((model, processor), (model2, processor2)):
    print(repr(GroundingPredictor(*pair).ask("photo.png", "Where is a crab?").text))
"""
MISSING = """
import sys
from cloc_mllm.cli import main
sys.exit(main(["ground", "photo.png", "a crab", "--model", "hf-hub:you/nothing"]))
"""
GROUND = """
import sys
from cloc_mllm.cli import main
sys.exit(main(["ground", "photo.png", "a crab", "--model", "hf-hub:you/cloc"]))
"""
RECORDS = """
from cloc_mllm.data.parquet import load_set
items = load_set("hf://datasets/you/records")
print("hf upload")
print(items[0].id, len(items))
print({first!r}, 3)
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def environment(hub: Hub, tmp_path: Path, project_root: Path) -> dict[str, str]:
    (picture,) = generate_scenes(1, split="test", long_side=64)
    picture.load_image().save(tmp_path / "photo.png")
    elsewhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), _DEAD)
    return {
        **os.environ,
        **elsewhere,
        "NO_PROXY": "127.0.0.1",
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_token",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(project_root),
    }


def run(code: str, environment: dict[str, str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("code", "name"),
    [(CLOC, "cloc"), (PREDICTOR, "mllm"), (TRANSFORMERS, "parts")],
    ids=["ClocPredictor", "GroundingPredictor", "Transformers"],
)
def test_what_is_pushed_loads_and_answers_the_same(
    code: str,
    name: str,
    hub: Hub,
    environment: dict[str, str],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    directory = request.getfixturevalue("cloc_dir" if name == "cloc" else "mllm_dir")
    write_export_card(directory, directory)

    done = run(code.format(directory=str(directory)), environment, tmp_path)

    assert done.returncode == 0, done.stderr
    address, mine, theirs = done.stdout.splitlines()[-3:]  # DeepSpeed may say something first
    assert address == f"{hub.url}/you/{name}" and mine == theirs
    files = hub.repos[f"models/you/{name}"]
    assert (f"models/you/{name}" in hub.private) == ("private" in code)
    if name == "parts":  # Transformers writes a card of its own
        assert {"model.safetensors", "processor_config.json", CARD_NAME} <= files.keys()
    else:
        local = {p for p in directory.rglob("*") if p.is_file()}
        assert files == {str(p.relative_to(directory)): p.read_bytes() for p in local}
        assert files[CARD_NAME].decode() in hub.cards


def test_a_command_takes_a_model_of_the_hub(
    hub: Hub, environment: dict[str, str], cloc_dir: Path, tmp_path: Path
) -> None:
    names = [path for path in cloc_dir.rglob("*") if path.is_file()]
    files = {str(path.relative_to(cloc_dir)): path.read_bytes() for path in names}
    hub.repos["models/you/cloc"] = files
    done = run(GROUND, environment, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("drawn: ground.png\n")


def test_a_model_that_is_not_there_is_one_line(environment: dict[str, str], tmp_path: Path) -> None:
    done = run(MISSING, environment, tmp_path)
    assert done.returncode == 2
    said = "cloc-mllm: error: hf-hub:you/nothing: the hub has no such model that you may read"
    assert done.stderr.splitlines()[-1].startswith(said)


def test_a_data_set_is_uploaded_and_read_in_place(
    hub: Hub, environment: dict[str, str], tmp_path: Path
) -> None:
    records = list(generate_scenes(3, split="test", long_side=64))
    write_records(records, tmp_path / "records")
    hf = Path(sys.executable).with_name("hf")
    upload = [str(hf), "upload", "you/records", "records", "--repo-type", "dataset", "--private"]
    done = subprocess.run(upload, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {CARD_NAME, "manifest.json"} <= hub.repos["datasets/you/records"].keys()

    done = run(RECORDS.format(first=records[0].id), environment, tmp_path)

    assert done.returncode == 0, done.stderr
    _, actual, expected = done.stdout.splitlines()
    assert actual == expected
