"""`data doctor` and `build auto` on conversations: layout and frame are named, chats built."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cloc_mllm.cli import main
from cloc_mllm.data.checks.judge import judge, the_one
from cloc_mllm.data.parquet import load_chats, load_records
from tests.data.formats import write_lines
from tests.photos import encoded

WH = (200, 100)
# boxes that reach the far corner, so that the frame of their numbers shows
BOXES = [(0.55, 0.5, 1.0, 1.0), (0.1, 0.3, 0.4, 0.7), (0.2, 0.1, 0.99, 0.98)]
ASK, TALK = "<image>\nFind it.", ("Sure?", "Yes, `x = [1, 2]`.")


def conversations(ask: str, tell: str, **more: Any) -> dict[str, Any]:
    turns = [("human", ask), ("gpt", tell), ("human", TALK[0]), ("gpt", TALK[1])]
    return {"conversations": [{"from": who, "value": text} for who, text in turns], **more}


def messages(ask: Any, tell: str, **more: Any) -> dict[str, Any]:
    turns = [("user", ask), ("assistant", tell), ("user", TALK[0]), ("assistant", TALK[1])]
    return {"messages": [{"role": who, "content": text} for who, text in turns], **more}


def in_pixels(box: Any) -> list[int]:
    return [round(value * WH[index % 2]) for index, value in enumerate(box)]


def in_thousandths(box: Any) -> list[int]:
    return [round(value * 1000) for value in box]


def marked(box: Any) -> str:
    x1, y1, x2, y2 = in_thousandths(box)
    return f"<ref>it</ref><box>({x1},{y1}),({x2},{y2})</box>"


def json_answer(numbers: list[int]) -> str:
    return f'```json\n[{{"bbox_2d": {numbers}, "label": "it"}}]\n```'


def parts() -> list[dict[str, Any]]:
    return [
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "text", "text": "Find it."},
    ]


# name -> (source, frame, option --frame, a row with a box)
CHATS: dict[str, tuple[str, str, str, Any]] = {
    "llava in 0..1": ("llava", "0..1", "original",
        lambda box: conversations(ASK, str(list(box)), image="a.png")),
    "llava in pixels": ("llava", "pixels", "pixels",
        lambda box: conversations(ASK, str(in_pixels(box)), image="a.png")),
    "llava in percent": ("llava", "0..100", "hundredths",
        lambda box: conversations(ASK, str([100 * value for value in box]), image="a.png")),
    "ferret": ("ferret", "pixels", "",
        lambda box: conversations(ASK, "At <bbox_location0>.", image="a.png", image_w=200,
            image_h=100, box_x1y1x2y2=[[], [in_pixels(box)], [], []])),
    "shikra": ("shikra", "pixels", "",
        lambda box: {"img_path": "a.png", "question": "Where is <ph_st>it<ph_ed>?", "answer": "x",
            "boxes": [in_pixels(box)], "question_boxes_seq": [[0]], "answer_boxes_seq": []}),
    "qwen-vl": ("qwen-vl", "0..1000", "",
        lambda box: conversations("Picture 1: <img>a.png</img>\nFind it.", marked(box))),
    "qwen2.5-vl": ("qwen-vl", "pixels", "pixels",
        lambda box: conversations(ASK, json_answer(in_pixels(box)), image="a.png")),
    "qwen3-vl": ("qwen-vl", "0..1000", "thousandths",
        lambda box: conversations(ASK, json_answer(in_thousandths(box)), image="a.png")),
    "internvl": ("internvl", "0..1000", "",
        lambda box: conversations(ASK, f"<ref>it</ref><box>[{in_thousandths(box)}]</box>",
            image="a.png", width=200, height=100)),
    "llama-factory, sharegpt": ("llama-factory", "", "",
        lambda box: conversations(ASK, "There.", images=["a.png"], system="Be brief.")),
    "llama-factory, messages": ("llama-factory", "pixels", "pixels",
        lambda box: messages(ASK, json_answer(in_pixels(box)), images=["a.png"])),
    "openai, images": ("openai", "0..1000", "thousandths",
        lambda box: messages(parts(), json_answer(in_thousandths(box)))),
    "openai, texts": ("openai", "", "", lambda box: messages("Hi", "Hello")),
    "ms-swift": ("ms-swift", "pixels", "",
        lambda box: messages(ASK, "<bbox>", images=["a.png"], objects={"ref": [],
            "bbox": [in_pixels(box)]})),
    "ms-swift 2": ("ms-swift", "", "",
        lambda box: {"query": ASK, "response": "There.", "images": ["a.png"]}),
    "texts alone": ("llava", "", "original", lambda box: conversations("Hi", "Hello")),
}  # fmt: skip


def laid_out(name: str, folder: Path) -> Path:
    Image.new("RGB", WH, "red").save(folder / "a.png")
    make = CHATS[name][3]
    write_lines(folder / "rows.jsonl", [make(box) for box in BOXES * 8])
    return folder / "rows.jsonl"


def auto(path: Path, out: Path, *arguments: str) -> int:
    return main(["data", "build", "auto", str(path), "--output_dir", str(out), *arguments])


@pytest.mark.parametrize("name", CHATS)
def test_every_layout_is_named_and_built_as_chats(name: str, tmp_path: Path, capsys: Any) -> None:
    source, frame, option, make = CHATS[name]
    path = laid_out(name, tmp_path)
    found = the_one(judge(path))
    assert found is not None, [(j.source, j.reading, j.faults) for j in judge(path)]
    assert (found.source, found.reading.frame) == (source, frame)
    assert found.options.get("frame", "") == option
    assert main(["data", "doctor", str(path)]) == 0
    assert f"cloc-mllm data build {source} " in capsys.readouterr().out
    assert auto(path, tmp_path / "out") == 0
    chats = load_chats(tmp_path / "out")
    assert len(chats) == 24
    said = json.dumps(make(BOXES[0]))
    for turn in chats[0].turns:
        assert json.dumps(turn.text)[1:-1] in said or not turn.text.strip("\n")
    boxes = [box for chat in chats for piece in chat.places for box in piece.boxes]
    if frame:
        assert boxes[:3] == [pytest.approx(box, abs=0.006) for box in BOXES]
    else:
        assert boxes == []


@pytest.mark.parametrize(
    "name", ["llava in 0..1", "ferret", "shikra", "qwen-vl", "ms-swift", "llava in percent"]
)
def test_conversations_are_records_where_that_is_asked(name: str, tmp_path: Path) -> None:
    path = laid_out(name, tmp_path)
    found = the_one(judge(path, kind="regions"))
    assert found is None or found.source == CHATS[name][0]
    status = auto(path, tmp_path / "out", "--as", "regions", "--max_drop_share", "1")
    if status == 0:
        assert load_records(tmp_path / "out").kind == "records"
    chats_alone = laid_out("internvl", tmp_path)
    assert judge(chats_alone, kind="regions") == []


def test_frames_that_both_fit_are_asked(tmp_path: Path, capsys: Any) -> None:
    Image.new("RGB", (1000, 1000), "red").save(tmp_path / "a.png")
    rows = [messages(ASK, json_answer(in_thousandths(box)), images=["a.png"]) for box in BOXES * 8]
    write_lines(tmp_path / "rows.jsonl", rows)
    assert main(["data", "doctor", str(tmp_path / "rows.jsonl")]) in (0, 1)
    # a square picture of 1,000 pixels: both frames give the same boxes, so one stands for both
    assert "it gives the same boxes as" in capsys.readouterr().out
    few = [conversations(ASK, str([0.4, 0.45, 0.5, 0.55]), image="b.png")] * 12
    Image.new("RGB", WH, "red").save(tmp_path / "b.png")
    write_lines(tmp_path / "few.jsonl", few)
    assert main(["data", "doctor", str(tmp_path / "few.jsonl")]) == 1
    printed = capsys.readouterr().out
    assert "--frame padded" in printed and "--frame original" in printed
    assert auto(tmp_path / "few.jsonl", tmp_path / "out") == 2


def test_boxes_that_are_words_are_a_doubt(tmp_path: Path, capsys: Any) -> None:
    Image.new("RGB", WH).save(tmp_path / "a.png")
    rows = [
        conversations(ASK, f"({x1}, {y1}, {x2}, {y2})", image="a.png") for x1, y1, x2, y2 in BOXES
    ]
    write_lines(tmp_path / "rows.jsonl", rows)
    output = ["--output_dir", str(tmp_path / "out")]
    assert main(["data", "build", "auto", str(tmp_path), *output]) == 2
    assert "doubt    no box was read" in capsys.readouterr().out
    named = ["--rows", str(tmp_path / "rows.jsonl"), "--images", str(tmp_path), *output]
    assert main(["data", "build", "qwen-vl", *named]) == 2
    assert "while 3 groups of four numbers stayed words" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["data", "build", "qwen-vl", *named, "--allow_no_regions"]) == 0


def test_images_inside_the_rows_need_no_folder(tmp_path: Path) -> None:
    data = base64.b64encode(encoded(Image.new("RGB", WH, "blue"))).decode()
    content = parts()
    content[0]["image_url"]["url"] = f"data:image/png;base64,{data}"
    write_lines(tmp_path / "rows.jsonl", [messages(content, "Blue.")] * 3)
    found = the_one(judge(tmp_path / "rows.jsonl"))
    assert found is not None and found.source == "openai"
    assert auto(tmp_path / "rows.jsonl", tmp_path / "out") == 0
    assert load_chats(tmp_path / "out")[0].images[0].width == 200


def test_overlays_of_chats_are_drawn(tmp_path: Path) -> None:
    path = laid_out("llava in 0..1", tmp_path)
    assert main(["data", "doctor", str(path), "--output", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").stat().st_size > 1_000


def test_refs_of_grefcoco_are_named(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", WH, "red").save(tmp_path / "images" / "p.png")
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": box}
        for i, box in ((1, [10, 10, 50, 50]), (2, [100, 20, 90, 75]))
    ]
    listing = {
        "images": [{"id": 1, "file_name": "p.png", "width": 200, "height": 100}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "dog"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(listing))
    refs = [
        {"ref_id": n, "image_id": 1, "ann_id": ids, "split": "val", "sentences": [{"sent": text}]}
        for n, ids, text in ((1, [1], "left dog"), (2, [1, 2], "both dogs"), (3, [-1], "a cat"))
    ]
    (tmp_path / "grefs(unc).json").write_text(json.dumps(refs))
    found = the_one(judge(tmp_path / "grefs(unc).json"))
    assert found is not None and found.source == "refer"
    assert auto(tmp_path / "grefs(unc).json", tmp_path / "out") == 0
    (record,) = load_records(tmp_path / "out")
    assert len(record.regions) == 3
    (tmp_path / "instances.json").unlink()
    assert main(["data", "doctor", str(tmp_path / "grefs(unc).json")]) == 1
    assert "lacks    --instances" in capsys.readouterr().out


def test_brackets_beside_a_reading_without_a_frame(tmp_path: Path) -> None:
    Image.new("RGB", WH).save(tmp_path / "a.png")
    rows = [
        {"query": ASK, "response": str(in_pixels(box)), "images": ["a.png"]} for box in BOXES * 8
    ]
    write_lines(tmp_path / "rows.jsonl", rows)
    found = [judgement for judgement in judge(tmp_path / "rows.jsonl") if not judgement.faults]
    assert [(of.source, of.reading.frame) for of in found] == [("ms-swift", "pixels")]
