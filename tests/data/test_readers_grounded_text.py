"""What names a box in a conversation, and what does not: B stands for a box."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from cloc_mllm import cli
from cloc_mllm.data.parquet import load_records
from cloc_mllm.data.readers.grounded_text import BOX, ground_turns

NAMED = [
    (["Provide a short description for this region: B", "a man on a bench"], ["a man on a bench"]),
    (["What is in B?", "A red box."], ["A red box."]),
    (["What's the object at B?", "the dog"], ["the dog"]),
    (["Describe the region B in a few words.", "no parking sign"], [""]),
    (["Locate the dog.", "B"], ["the dog"]),
    (["Where are the two dogs?", "B and B."], ["the two dogs"]),
    (
        ["... the region this sentence describes: the man on the left.", "B"],
        ["the man on the left"],
    ),
    (['Find "a bow".', "B"], ["a bow"]),
    (["What do you see?", "The man B holds a bat B."], ["The man", "a bat"]),
    (["And?", "The dog is at B."], ["The dog"]),
    # nothing is named
    (["Is the person B taller than the elephant?", "No, the elephant is taller."], ["the person"]),
    (["What is the person B holding?", "A frisbee."], ["the person"]),
    (["What is the purpose of B?", "It stops cars."], [""]),
    (["What is in B?", "Yes."], [""]),
    (["What is in B?", "Nothing."], [""]),
    (["What is in B?", "It is."], [""]),
    (["What is in B and B?", "Two dogs."], [""]),
    (["Which of them is taller?", "B"], [""]),
    (["Where is the man, and what is he doing?", "B"], [""]),
    (["Where is it?", "B"], [""]),
    (["And?", "No, B is taller than B."], ["", ""]),
    (["And?", "It is at B."], [""]),
    (["And?", "Yes, B"], [""]),
]


@pytest.mark.parametrize(("turns", "expected"), NAMED)
def test_what_names_a_box(turns: list[str], expected: list[str]) -> None:
    found = ground_turns([turn.replace("B", BOX) if "B" in turn else turn for turn in turns])
    assert [grounding.text for grounding in found] == expected


def test_pairs_that_give_no_region_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (200, 100), "red").save(tmp_path / "a.png")
    talk = ["What is in [0.1, 0.3, 0.4, 0.7]?", "A box."]
    talk += ["Is the man [0.5, 0.1, 0.9, 0.9] old?", "No, he is young.", "How so?", "He runs."]
    talk += ["Why [0.2, 0.2, 0.3, 0.3]?", "Because."]
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(talk)]
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}]))
    build = ["data", "build", "llava", "--frame", "original", "--as", "regions"]
    paths = ["--rows", str(tmp_path / "rows.json"), "--images", str(tmp_path)]
    assert cli.main([*build, *paths, "--out", str(tmp_path / "out")]) == 0
    (record,) = load_records(tmp_path / "out")
    assert [region.phrase for region in record.regions] == ["A box.", "the man"]
    said = capsys.readouterr().out
    assert "pairs:               2 kept         0 dropped" in said
    assert "2 pairs, no_region: questions with their answers that name no box" in said
    assert "(2 of 4 not kept)" in said
    assert "1 regions, unnamed: boxes that the conversation says nothing of" in said


def conversation(texts: str, **more: object) -> dict[str, object]:
    said = enumerate(texts.splitlines())
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in said]
    return {"image": "a.png", "conversations": turns, **more}


# each asks about a region that is kept, about one without area, and about nothing
IN_TEXT = "What is in [0.1, 0.3, 0.4, 0.7]?\nA box.\nWhat is in [0.5, 0.5, 0.5, 0.9]?\nA pole."
MARKED = "What is in MARK?\nA box.\nWhat is in MARK?\nA pole.\nWhy?\nBecause."
QWEN = (
    "Where?\n<ref>A box</ref><box>(100,300),(400,700)</box>\n"
    "And?\n<ref>A pole</ref><box>(500,500),(500,900)</box>"
)
BOXES = [[20, 30, 80, 70], [100, 50, 100, 90]]
PAIRS = {
    "llava": conversation(f"{IN_TEXT}\nWhy?\nBecause."),
    "ferret": conversation(
        MARKED.replace("MARK", "<bbox_location0>"),
        image_w=200,
        image_h=100,
        box_x1y1x2y2=[BOXES[:1], [], BOXES[1:], [], [], []],
    ),
    "qwen-vl": conversation(f"{QWEN}\nWhy?\nBecause."),
    "ms-swift": {
        "images": ["a.png"],
        "messages": [
            {"role": ("user", "assistant")[i % 2], "content": text}
            for i, text in enumerate(MARKED.replace("MARK", "<bbox>").splitlines())
        ],
        "objects": {"ref": [], "bbox": BOXES},
    },
}


@pytest.mark.parametrize("source", PAIRS)
def test_a_pair_goes_with_its_only_region(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (200, 100), "red").save(tmp_path / "a.png")
    (tmp_path / "rows.json").write_text(json.dumps([PAIRS[source]]))
    build = ["data", "build", source, "--as", "regions", "--max_drop_share", "0.5"]
    build += ["--frame", "original"] if source == "llava" else []
    paths = ["--rows", str(tmp_path / "rows.json"), "--images", str(tmp_path)]
    assert cli.main([*build, *paths, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "regions:             1 kept         1 dropped (zero_area 1)" in said
    assert "pairs:               1 kept         1 dropped (zero_area 1)" in said
    assert "1 pairs, no_region" in said and "(1 of 2 not kept)" in said
