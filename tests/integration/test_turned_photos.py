"""A photo stored sideways with its EXIF tag gets the answers of the same photo stored upright."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cloc_mllm.data.parquet import write_records
from cloc_mllm.data.records import DropLog, Record
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.demo.engine import DemoEngine
from cloc_mllm.demo.pictures import open_picture
from cloc_mllm.demo.strokes import Stroke
from cloc_mllm.evaluation.config import EvalConfig
from cloc_mllm.evaluation.run import evaluate
from cloc_mllm.geometry import Boxes
from cloc_mllm.inference.cloc_predictor import ClocPredictor
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from tests.photos import encoded

TASKS = ["rec", "referring", "text_to_box", "region_classification"]
ORIENTATIONS = [3, 5, 6, 8]


@pytest.fixture(scope="module")
def scenes() -> list[Record]:
    return list(generate_scenes(8, split="test", seed=3))


@pytest.fixture(scope="module")
def grounding() -> GroundingPredictor:
    return GroundingPredictor.from_pretrained(device="cpu")


def stored_as(records: Sequence[Record], orientations: Sequence[int]) -> list[Record]:
    """The same pictures, lossless, each stored in the next of the orientations."""
    return [
        replace(record, image=encoded(record.load_image(), orientation=orientation))
        for record, orientation in zip(records, cycle(orientations), strict=False)
    ]


def predictions(records: Sequence[Record], directory: Path) -> list[dict[str, Any]]:
    write_records(records, directory / "data", drop_log=DropLog())
    config = EvalConfig(
        cloc="scenes",
        data=str(directory / "data"),
        output_dir=str(directory / "eval"),
        tasks=TASKS,
        bootstrap_samples=2,
        num_examples=0,
    )
    evaluate(config)
    lines = (directory / "eval" / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_evaluation_rows_are_equal(scenes: list[Record], tmp_path: Path) -> None:
    expected = predictions(stored_as(scenes, [1]), tmp_path / "upright")
    actual = predictions(stored_as(scenes, ORIENTATIONS), tmp_path / "turned")
    assert {row["task"] for row in expected} == set(TASKS)
    assert actual == expected


def test_predictors_answer_alike_for_photos_of_any_kind(
    scenes: list[Record], grounding: GroundingPredictor, tmp_path: Path
) -> None:
    cloc = ClocPredictor.from_pretrained("scenes", device="cpu")
    for upright, turned in zip(scenes[:4], stored_as(scenes[:4], ORIENTATIONS), strict=True):
        phrases = upright.regions[0].expressions[:2]
        box = Boxes.normalized([upright.regions[0].box])
        path = tmp_path / "photo.png"
        path.write_bytes(turned.image)
        expected = grounding.ground(upright.load_image(), phrases)
        name = grounding.refer(upright.load_image(), box)
        located = cloc.locate(upright.load_image(), phrases)
        for photo in (Image.open(io.BytesIO(turned.image)), turned.image, path):
            actual = grounding.ground(photo, phrases)
            assert actual.text == expected.text and actual.image.size == expected.image.size
            assert grounding.refer(photo, box).labels == name.labels
            assert torch.equal(cloc.locate(photo, phrases).boxes.xyxy, located.boxes.xyxy)


def test_the_demo_answers_alike(
    scenes: list[Record], grounding: GroundingPredictor, tmp_path: Path
) -> None:
    engine = DemoEngine(ClocPredictor.from_pretrained("scenes", device="cpu"), grounding)
    for turned, record in zip(stored_as(scenes[:4], ORIENTATIONS), scenes, strict=False):
        answers = []
        for name, stored in (("upright", *stored_as([record], [1])), ("turned", turned)):
            (tmp_path / name).write_bytes(stored.image)
            picture = open_picture(tmp_path / name)
            left, top, right, bottom = record.regions[0].box
            stroke = Stroke("box", ((left, top), (right, bottom)))
            *_, grounding_said = engine.ground(picture, record.regions[0].expressions[:1])
            (found,) = grounding_said.found
            assert found.language_model is not None
            boxes = found.cloc.boxes, found.language_model.boxes
            *_, named = engine.name(picture, stroke, ["crab"])
            answers.append((picture.key, boxes, named.answer))
        assert answers[1] == answers[0]


@pytest.fixture(scope="module")
def client(grounding: GroundingPredictor) -> Iterator[Any]:
    testclient = pytest.importorskip("fastapi.testclient", reason="fastapi is not installed")
    from cloc_mllm.serve.app import build_app
    from cloc_mllm.serve.limits import Limits

    with testclient.TestClient(build_app(grounding, "shipped", Limits())) as client:
        yield client


def test_the_server_answers_alike(scenes: list[Record], client: Any) -> None:
    """Questions with a box and for a box, in pixels of the upright picture."""

    def message(record: Record) -> list[dict[str, Any]]:
        url = f"data:image/png;base64,{base64.b64encode(record.image).decode()}"
        image = {"type": "image_url", "image_url": {"url": url}}
        region = record.regions[0]
        named = {**image, "regions": {"unit": "normalized", "boxes": [region.box]}}
        asked = [
            [image, {"type": "text", "text": f"Where is {region.expressions[0]}?"}],
            [named, {"type": "text", "text": "What is in {box} <region>?"}],
        ]
        answers = []
        for content in asked:
            body = {"messages": [{"role": "user", "content": content}]}
            response = client.post("/v1/chat/completions", json=body).json()
            answers.append(response["choices"][0]["message"])
        return answers

    for upright, turned in zip(scenes[:4], stored_as(scenes[:4], ORIENTATIONS), strict=True):
        expected = message(upright)
        assert expected[0]["boxes"]
        assert message(turned) == expected
