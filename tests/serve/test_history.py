"""Several turns with boxes: the model reads a request as training wrote the chat."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="fastapi is not installed")

from cloc_mllm.config import ConversationConfig
from cloc_mllm.data.chats import Chat, ChatImage, Piece, Turn, image_mark, words, write_turn
from cloc_mllm.inference.chat import prepare_chat
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.mllm.collate import ConversationCollator
from cloc_mllm.serve.checks import check_request
from cloc_mllm.serve.limits import Limits
from cloc_mllm.serve.schema import parse_body

WH = (96, 48)
LEFT, RIGHT = (0.125, 0.25, 0.5, 0.75), (0.5, 0.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def predictor(mllm_dir: Path) -> GroundingPredictor:
    return GroundingPredictor.from_pretrained(mllm_dir, device="cpu")


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", WH, "teal").save(file, "png")
    return file.getvalue()


def place(*boxes: Any, phrase: str = "") -> Piece:
    return Piece("place", "?", 0, phrase, boxes)


TURNS = [
    Turn("system", (words("Be brief."),)),
    Turn("user", (image_mark(0), words("What is in "), place(LEFT), words("?"))),
    Turn("assistant", (place(LEFT, RIGHT, phrase="two crabs"), words(" side by side."))),
    Turn("user", (words("And in "), place(RIGHT), words(" or elsewhere?"))),
    Turn("assistant", (words("A boat "), place(RIGHT))),
    Turn("user", (words("Where is it?"),)),
    Turn("assistant", (place(RIGHT),)),
]


def request_of(predictor: GroundingPredictor) -> bytes:
    """The same turns as a client sends them, answers as the server gave them."""
    box_format = predictor.processor.coordinates
    url = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    pixels = [[value * WH[i % 2] for i, value in enumerate(box)] for box in (LEFT, RIGHT)]
    picture = {
        "type": "image_url",
        "image_url": {"url": url},
        "regions": {"unit": "pixels", "boxes": pixels},
    }
    asked = {"type": "text", "text": "What is in {box} <region>?"}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [picture, asked]},
        {"role": "assistant", "content": write_turn(TURNS[2], box_format), "boxes": [{"x": 1}]},
        {"role": "user", "content": "And in {box} <region> or elsewhere?"},
        {"role": "assistant", "content": write_turn(TURNS[4], box_format)},
        {"role": "user", "content": "Where is it?"},
    ]
    return json.dumps({"messages": messages}).encode()


def test_the_model_sees_the_ids_that_training_wrote(predictor: GroundingPredictor) -> None:
    processor = predictor.processor
    checked = check_request(parse_body(request_of(predictor), Limits()), Limits(), processor)
    asked = checked.chat(lambda data, _: predictor.encode(data))
    inputs = prepare_chat(predictor, asked, checked.sampling, lambda _: None).inputs
    actual = inputs["input_ids"][0].tolist()
    chat = Chat("x", [ChatImage(png(), *WH, "x.png")], TURNS, "llava")
    collator = ConversationCollator(processor, ConversationConfig(max_length=2_000))
    row = collator.pack(chat, 0).row
    assert actual == row.input_ids[: len(actual)]
    assert len(actual) < len(row.input_ids) and row.labels[len(actual)] != -100
    expected = collator([(0, chat)]).inputs
    torch.testing.assert_close(inputs["region_boxes"], expected["region_boxes"])
    assert inputs["attention_mask"].tolist() == [[1] * len(actual)]
