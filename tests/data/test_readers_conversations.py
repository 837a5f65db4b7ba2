"""Rows of conversation files that are of another layout: counted, and their layout named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cloc_mllm.data.readers.ferret import read_ferret
from cloc_mllm.data.readers.llava import read_llava
from cloc_mllm.data.readers.ms_swift import read_ms_swift
from cloc_mllm.data.readers.qwen_vl import read_qwen_vl
from cloc_mllm.data.records import DropLog, Record
from tests.data.formats import write_lines

QUESTION = {"role": "user", "content": "<image>Find <ref-object>"}
ANSWER = {"role": "assistant", "content": "<bbox>"}
OBJECTS = {"ref": ["the red box"], "bbox": [[20, 30, 80, 70]]}
SWIFT = {"messages": [QUESTION, ANSWER], "images": ["a.png"], "objects": OBJECTS}


def talk(answer: str, question: str = "<image>\nFind the red box") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


LLAVA = {"image": "a.png", "conversations": talk("[0.1, 0.3, 0.4, 0.7]")}
FERRET = {"image": "a.png", "image_w": 200, "image_h": 100, "box_x1y1x2y2": [[], [[1, 2, 30, 40]]]}
FERRET = {**FERRET, "conversations": talk("a box <bbox_location0>")}
QWEN = {"conversations": talk("<ref>box</ref><box>(1,2),(300,400)</box>", "<img>a.png</img>")}
Read = Callable[..., Any]


def llava(*args: Any, **options: Any) -> Any:
    return read_llava(*args, frame="original", **options)


def without(row: dict[str, Any], *keys: str, **new: Any) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in keys} | new


def read(read: Read, row: dict[str, Any], folder: Path) -> tuple[list[Record], DropLog]:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (200, 100), "red").save(folder / name)
    write_lines(folder / "rows.jsonl", [row])
    log = DropLog()
    return list(read(folder / "rows.jsonl", folder, drop_log=log)), log


OTHERS = [
    (read_ms_swift, {"query": "Find", "response": "<bbox>", "images": ["a.png"]}, "query and resp"),
    (
        read_ms_swift,
        without(SWIFT, objects=[{"bbox": [1, 2, 3, 4]}]),
        "objects as a list or a text",
    ),
    (read_ms_swift, without(SWIFT, objects='[{"bbox": [1, 2, 3, 4]}]'), "objects as a list"),
    (read_ms_swift, without(SWIFT, images=["a.png", "b.png"]), "2 images in a row"),
    (read_ms_swift, LLAVA, "no messages; the row has image, conversations"),
    *[
        (read_ms_swift, without(SWIFT, "objects", messages=[{**QUESTION, "content": text}]), said)
        for text, said in (
            ('[{"bbox_2d": [1, 2, 3, 4]}]', "bbox_2d"),
            ("<|box_start|>(1,2),(3,4)<|box_end|>", r"<\|box_start\|>"),
            ("<box>(1,2),(3,4)</box>", "<box>"),
            ('{"box_2d": [1, 2, 3, 4]}', "Gemini"),
            ("<loc0001><loc0002>", "location tokens"),
        )
    ],
    (llava, without(SWIFT, image="a.png"), "no `conversations`; the row has messages, images"),
    (llava, without(LLAVA, image=["a.png", "b.png"]), r"image \['a.png', 'b.png'\], not one"),
    (llava, without(LLAVA, image=7), "image 7, not one name"),
    (llava, without(LLAVA, conversations=talk('{"bbox_2d": [1, 2, 3, 4]}')), "bbox_2d"),
    (llava, without(LLAVA, conversations=talk("<box>[[1, 2, 3, 4]]</box>")), "<box>"),
    (read_ferret, without(FERRET, conversations=talk("<box>[[1, 2, 3, 4]]</box>")), "<box>"),
    (
        read_qwen_vl,
        {"image": "a.png", "conversations": talk("<|box_start|>(1,2),(3,4)<|box_end|>")},
        "Qwen2-VL",
    ),
]


@pytest.mark.parametrize(("reader", "row", "said"), OTHERS)
def test_another_layout_is_named(
    reader: Read, row: dict[str, Any], said: str, tmp_path: Path
) -> None:
    records, log = read(reader, row, tmp_path)
    assert records == []
    assert log.counts == {"row": {"other_layout": 1}}
    (drop,) = log.drops
    assert re.search(said, drop.found), drop.found


@pytest.mark.parametrize(
    ("reader", "row"),
    [
        (read_ms_swift, SWIFT),
        (read_ms_swift, without(SWIFT, "images", image="a.png")),
        (read_ms_swift, without(SWIFT, images="a.png")),
        (read_ms_swift, without(SWIFT, images=[{"bytes": None, "path": "a.png"}])),
        (llava, LLAVA),
        (llava, without(LLAVA, image=["a.png"])),
        (llava, without(LLAVA, "image", images=["a.png"])),
        (read_ferret, FERRET),
        (read_qwen_vl, QWEN),
    ],
)
def test_one_image_however_it_is_named(reader: Read, row: dict[str, Any], tmp_path: Path) -> None:
    (record,), log = read(reader, row, tmp_path)
    assert (record.id, len(record.regions), log.counts) == ("a", 1, {})
    assert log.delivered["row"] == 1


@pytest.mark.parametrize("reader", [llava, read_ferret])
def test_rows_of_text_alone_are_set_aside(reader: Read, tmp_path: Path) -> None:
    records, log = read(reader, {"conversations": talk("hi", "hello")}, tmp_path)
    assert records == [] and log.counts == {}
    assert log.set_aside == {"row": {"no_image": 1}}


@pytest.mark.parametrize(
    ("reader", "row", "found"),
    [
        (read_ms_swift, [1], "no JSON object"),
        (read_ms_swift, without(SWIFT, images=[]), r"images \[\], not one name"),
        (read_ms_swift, without(SWIFT, objects={**OBJECTS, "bbox_type": "x"}), "bbox_type 'x'"),
        (llava, None, "no JSON object"),
        (read_qwen_vl, {"conversations": talk("x")}, "images"),
    ],
)
def test_bad_rows_say_what_was_found(reader: Read, row: Any, found: str, tmp_path: Path) -> None:
    _, log = read(reader, row, tmp_path)
    assert log.counts == {"row": {"bad_row": 1}}
    assert re.search(found, log.drops[0].found)
