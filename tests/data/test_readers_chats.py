"""Conversation files of every layout -> chats and, where there is a writer, back to the letter."""

from __future__ import annotations

import base64
import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cloc_mllm import cli
from cloc_mllm.data.chats import Chat
from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.data.parquet import load_chats, load_records
from cloc_mllm.data.readers.chat_texts import Frame
from cloc_mllm.data.readers.chats import (
    LAST_SHOWN,
    MARKS_OF,
    read_chats,
    style_of,
)
from cloc_mllm.data.reasons import NUMBERS_AS_WORDS
from cloc_mllm.data.writers.chats import (
    write_llava_chats,
    write_ms_swift_chats,
    write_openai_chats,
)
from tests.data.formats import write_lines
from tests.photos import encoded

BOX = (0.1, 0.3, 0.4, 0.7)  # of every picture
WH = (200, 100)
Talk = list[tuple[str, str]]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", WH, "red").save(tmp_path / "images" / name)
    return tmp_path


def llava_row(*talk: str, **more: Any) -> dict[str, Any]:
    speakers = ("human", "gpt")
    turns = [{"from": speakers[i % 2], "value": text} for i, text in enumerate(talk)]
    return {"id": "1", "image": "a.png", "conversations": turns, **more}


def messages_row(*talk: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(talk)]
    return {"id": "1", "messages": turns, **more}


def read(
    source: str, rows: list[Any], folder: Path, frame: Frame | None = None
) -> tuple[list[Chat], DropLog]:
    write_lines(folder / "rows.jsonl", rows)
    log = DropLog()
    style = style_of(source, frame)
    return list(read_chats(folder / "rows.jsonl", folder / "images", style, drop_log=log)), log


def texts_of(chat: Chat) -> list[str]:
    return [turn.text for turn in chat.turns]


def boxes_of(chat: Chat) -> list[tuple[float, ...]]:
    return [box for piece in chat.places for box in piece.boxes]


def phrases_of(chat: Chat) -> list[str]:
    return [piece.phrase for turn in chat.turns for piece in turn.pieces if piece.phrase]


ASK = "<image>\nFind the red box."
BRACKETS = "[0.1, 0.3, 0.4, 0.7]"
# `[x1, y1, x2, y2]` of the same box in each frame; a picture of 200 x 100 is padded to 200 x 200
IN_FRAMES = {
    "original": BRACKETS,
    "padded": "[0.1, 0.4, 0.4, 0.6]",
    "pixels": "[20, 30, 80, 70]",
    "hundredths": "[10, 30, 40.0, 70]",
    "thousandths": "[100, 300, 400, 700]",
}


@pytest.mark.parametrize("frame", IN_FRAMES)
def test_brackets_in_every_frame(frame: Any, photos: Path) -> None:
    box = IN_FRAMES[frame]
    talk = ["<image>\nWhat is in " + box + "?", f"A box {box}, and a cat."]
    (chat,), log = read("llava", [llava_row(*talk)], photos, frame)
    assert texts_of(chat) == talk
    assert boxes_of(chat) == [pytest.approx(BOX)] * 2
    assert not any(
        c.isdigit() for t in chat.turns for p in t.pieces if p.kind == "words" for c in p.text
    )
    assert log.delivered == {"chat": 1, "turn": 2, "place": 2}


@pytest.mark.parametrize(
    "text",
    [
        "[0.1, 0.2]",
        "[0.1, 0.2, 0.3]",
        "[0.1, 0.2, 0.3, 0.4, 0.5]",
        "x = [1, 2, 3, 4]",
        "```python\nx = [0.1, 0.3, 0.4, 0.7]\n```",
        "call `f([0.1, 0.3, 0.4, 0.7])` now",
        "| a | 0.1, 0.3, 0.4, 0.7 |\n|---|---|\n| b | 1 |",
        "(0.1, 0.3, 0.4, 0.7)",
        "[a, b, c, d]",
        "between [0.1 and 0.3]",
    ],
)
def test_what_is_no_box_stays_as_it_is(text: str, photos: Path) -> None:
    talk = ["<image>\n" + text, f"So: {text}."]
    (chat,), log = read("llava", [llava_row(*talk)], photos, "original")
    assert texts_of(chat) == talk
    assert not list(chat.places)
    assert log.counts == {}


def test_numbers_of_no_image_are_no_box(photos: Path) -> None:
    row = {"conversations": llava_row(f"What is {BRACKETS}?", BRACKETS)["conversations"]}
    (chat,), _ = read("llava", [row], photos, "original")
    assert chat.images == [] and not list(chat.places)


def test_whole_numbers_are_noted_and_an_answer_of_them_alone_is_a_box(photos: Path) -> None:
    rows = [llava_row(ASK, "I see [20, 30, 80, 70] there."), llava_row(ASK, "[20, 30, 80, 70]")]
    chats, log = read("llava", rows, photos, "original")
    assert len(chats) == 1
    assert log.notes[NUMBERS_AS_WORDS] == 1
    assert log.counts["chat"] == {"outside": 1}
    (zeros,), _ = read("llava", [llava_row(ASK, "[0, 0, 1, 1]")], photos, "original")
    assert boxes_of(zeros) == [(0, 0, 1, 1)]


def test_full_width_commas_are_commas(photos: Path) -> None:
    text = "红色的盒子在[0.1，0.3， 0.4，0.7]。"
    (chat,), _ = read("llava", [llava_row(ASK, text)], photos, "original")
    assert boxes_of(chat) == [BOX] and texts_of(chat)[1] == text


@pytest.mark.parametrize(
    "box",
    [
        *("(20, 30, 80, 70)", "(0.2, 0.3, 0.8, 0.7)", "(20,30),(80,70)", "[0.2 0.3 0.8 0.7]"),
        *("[20; 30; 80; 70]", "<0.2, 0.3, 0.8, 0.7>", "{20, 30, 80, 70}", "(20，30，80，70)"),
    ],
)
def test_numbers_in_another_notation_are_noted(box: str, photos: Path) -> None:
    rows = [llava_row(ASK, f"It is at {box}, see `{box}`.")]
    (chat,), log = read("llava", rows, photos, "pixels")
    assert not list(chat.places)
    assert log.notes[NUMBERS_AS_WORDS] == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<phrase>it</phrase><object><patch_index_0044><patch_index_0863></object>", "Kosmos-2"),
        ("<p>it</p>{<10><20><50><70>}", "MiniGPT-v2"),
        ('<point x="30.5" y="45.2" alt="it">it</point>', "Molmo"),
        ('<points x1="30.5" y1="45.2" alt="it">it</points>', "Molmo"),
        ("<poly>(1,2),(5,2),(5,7)</poly>", "<poly>"),
        ("<quad>(1,2),(5,2),(5,7),(1,7)</quad>", "<quad>"),
        ("it<loc_100><loc_200><loc_500><loc_700>", "Florence-2"),
        ("<loc0205><loc0102><loc0716><loc0512> it", "PaliGemma"),
    ],
)
def test_places_in_other_notations_are_named(text: str, found: str, photos: Path) -> None:
    chats, log = read("llava", [llava_row(ASK, text)], photos, "original")
    assert not chats and log.counts["chat"] == {"other_layout": 1}
    assert found in log.drops[-1].found


def test_tags_of_other_meaning_are_words(photos: Path) -> None:
    talk = [ASK, "<location>Paris</location> {<div>x</div>} <point>1</point>"]
    (chat,), _ = read("llava", [llava_row(*talk)], photos, "original")
    assert texts_of(chat) == talk


def test_other_spellings_of_rows(photos: Path) -> None:
    rows = [
        llava_row(ASK, BRACKETS, image=["a.png"]),
        {**llava_row(ASK, BRACKETS), "images": "a.png"},
        messages_row(ASK, BRACKETS, image="a.png"),
        llava_row("Find it.", BRACKETS),
        llava_row("Where?\n<image>", BRACKETS),
        {**llava_row(ASK, BRACKETS), "system": "Be brief."},
    ]
    chats, log = read("llava", rows, photos, "original")
    assert [chat.id for chat in chats] == ["1", "1#2", "1#3", "1#4", "1#5", "1#6"]
    assert all(boxes_of(chat) == [BOX] and len(chat.images) == 1 for chat in chats)
    assert log.counts == {}
    assert texts_of(chats[3]) == ["Find it.", BRACKETS]
    assert texts_of(chats[5]) == ["Be brief.", ASK, BRACKETS]


@pytest.mark.parametrize(
    ("talk", "images", "is_noted"),
    [
        (
            ("Picture 1: <image> Picture 2: <image>\nWhere is it in Picture 1?", BRACKETS),
            [0],
            False,
        ),
        (("Image-1: <image>\nImage-2: <image>\nWhere in image 2?", BRACKETS), [1], False),
        (
            (
                "Image-1: <image>\nImage-2: <image>\nWhere?",
                f"In Image-1 at {BRACKETS}, in Image-2 at {BRACKETS}",
            ),
            [0, 1],
            False,
        ),
        (("Image-1: <image>\nImage-2: <image>\nIs image-1 like image-2?", BRACKETS), [1], True),
        (("<image><image>\nWhere is it in image 1?", BRACKETS), [1], True),
        (("Image 1: <image>\nImage 2: <image>\nWhere?", f"There {BRACKETS}: image 1"), [1], True),
        (("Image 1: <image> Image 2: <image>\nWhat is in image 1 {}?", "A cat."), [0], False),
    ],
)
def test_images_that_a_chat_names(
    talk: tuple[str, str], images: list[int], is_noted: bool, photos: Path
) -> None:
    talk = (talk[0].replace("{}", BRACKETS), talk[1])
    row = llava_row(*talk, image=["a.png", "b.png"])
    (chat,), log = read("llava", [row], photos, "original")
    assert [piece.image for piece in chat.places] == images
    assert (LAST_SHOWN in log.notes) == is_noted
    assert texts_of(chat) == list(talk)


def test_cells_of_a_table_hold_lists_as_json(photos: Path) -> None:
    turns = json.dumps(llava_row(ASK, BRACKETS)["conversations"])
    history = json.dumps([["<image>Hi", "Hello"]])
    tables = {
        "llava": ("image,conversations", ['["a.png"]', turns]),
        "ms-swift": ("images,query,response,history", ["a.png", "Where?", BRACKETS, history]),
    }
    for source, (header, cells) in tables.items():
        with open(photos / "rows.csv", "w", newline="") as file:
            file.write(header + "\n")
            csv.writer(file).writerow(cells)
        style, log = style_of(source, "original"), DropLog()
        (chat,) = read_chats(photos / "rows.csv", photos / "images", style, drop_log=log)
        assert boxes_of(chat) == [BOX] and log.counts == {}
        assert len(chat.turns) == (4 if source == "ms-swift" else 2)


def test_several_images(photos: Path) -> None:
    row = llava_row("<image><image>\nWhere?", f"There {BRACKETS}", image=["a.png", "b.png"])
    (chat,), log = read("llava", [row], photos, "original")
    assert [image.name for image in chat.images] == ["a.png", "b.png"]
    assert [piece.image for piece in chat.places] == [1]
    assert log.notes[LAST_SHOWN] == 1


MARKED = [
    ("qwen-vl", "<ref>the dog</ref><box>(100,300),(400,700)</box>"),
    ("qwen-vl", "<ref>the dog</ref> <box>(100,300),(400,700)</box><box>(0,0),(500,500)</box>"),
    ("internvl", "<ref>the dog</ref><box>[[100, 300, 400, 700]]</box>"),
    ("internvl", "<ref>the dog</ref><box>[[100, 300, 400, 700], [0, 0, 500, 500]]</box>"),
    (
        "qwen-vl",
        "<|object_ref_start|>the dog<|object_ref_end|><|box_start|>(100,300),(400,700)<|box_end|>",
    ),
]


@pytest.mark.parametrize(("source", "marked"), MARKED)
def test_marks_of_qwen_and_internvl(source: str, marked: str, photos: Path) -> None:
    talk = ["<image>\nFind <ref>the dog</ref>, not <ref>the cat</ref>.", f"Here: {marked}!"]
    (chat,), _ = read(source, [llava_row(*talk)], photos)
    assert texts_of(chat) == talk
    expected = [BOX, (0, 0, 0.5, 0.5)][: 1 + marked.count("500,") + marked.count("500, 5")]
    assert boxes_of(chat)[0] == pytest.approx(BOX) and boxes_of(chat)[1:] == expected[1:2]
    assert phrases_of(chat) == ["the dog", "the cat", "the dog"]


def test_old_qwen_rows_name_their_images_inside(photos: Path) -> None:
    talk = [
        {"from": "user", "value": "Picture 1: <img>a.png</img>\nPicture 2: <img>b.png</img>\nHi"},
        {"from": "assistant", "value": "<ref>it</ref><box>(100,300),(400,700)</box>"},
    ]
    (chat,), _ = read("qwen-vl", [{"id": "x", "conversations": talk}], photos)
    assert [image.name for image in chat.images] == ["a.png", "b.png"]
    assert texts_of(chat) == [turn["value"] for turn in talk]


JSON_ANSWER = '```json\n[\n\t{"bbox_2d": [20, 30, 80, 70], "label": "the dog"}\n]\n```'


def test_json_answers_need_a_declared_frame(photos: Path) -> None:
    rows = [llava_row(ASK, JSON_ANSWER)]
    (chat,), _ = read("qwen-vl", rows, photos, "pixels")
    assert texts_of(chat) == [ASK, JSON_ANSWER]
    assert boxes_of(chat) == [pytest.approx(BOX)]
    (chat,), _ = read("qwen-vl", [llava_row(ASK, '{"point_2d": [20, 30]}')], photos, "pixels")
    assert [piece.points for piece in chat.places] == [((pytest.approx(0.1), pytest.approx(0.3)),)]
    chats, log = read("qwen-vl", rows, photos)
    assert chats == [] and log.counts["turn"] == {"undeclared_frame": 2}


SWIFT_ASK, SWIFT_TELL = "<image>Find <ref-object>.", "<bbox>"
SWIFT_OBJECTS = {"ref": ["the dog"], "bbox": [[20, 30, 80, 70]]}


@pytest.mark.parametrize(
    "row",
    [
        messages_row(SWIFT_ASK, SWIFT_TELL, images=["a.png"], objects=SWIFT_OBJECTS),
        messages_row(SWIFT_ASK, SWIFT_TELL, image="a.png", objects=SWIFT_OBJECTS),
        messages_row(
            SWIFT_ASK,
            SWIFT_TELL,
            images=["a.png"],
            objects={**SWIFT_OBJECTS, "bbox": [[100, 300, 400, 700]], "bbox_type": "norm1000"},
        ),
        messages_row(
            SWIFT_ASK,
            SWIFT_TELL,
            images=["a.png"],
            objects={**SWIFT_OBJECTS, "bbox": [list(BOX)], "bbox_type": "norm1"},
        ),
        {
            "query": SWIFT_ASK,
            "response": SWIFT_TELL,
            "images": ["a.png"],
            "objects": json.dumps([{"caption": "the dog", "bbox": [20, 30, 80, 70], "image": 0}]),
        },
        {
            "query": SWIFT_ASK,
            "response": SWIFT_TELL,
            "images": ["a.png"],
            "objects": [{"caption": "the dog", "bbox": [20, 30, 80, 70], "bbox_type": "real"}],
        },
    ],
)
def test_every_layout_of_ms_swift(row: dict[str, Any], photos: Path) -> None:
    (chat,), log = read("ms-swift", [row], photos)
    assert texts_of(chat) == [SWIFT_ASK, SWIFT_TELL]
    assert boxes_of(chat) == [pytest.approx(BOX)]
    assert phrases_of(chat) == ["the dog"]
    assert log.counts == {}


def test_history_and_system_of_ms_swift(photos: Path) -> None:
    row = {"system": "Be brief.", "history": [["a", "b"]], "query": "c", "response": "d"}
    (chat,), _ = read("ms-swift", [row], photos)
    assert texts_of(chat) == ["Be brief.", "a", "b", "c", "d"]


def test_boxes_of_several_images_and_points_of_ms_swift(photos: Path) -> None:
    objects = {
        "ref": ["both", "it"],
        "bbox": [[20, 30, 80, 70], [0, 0, 100, 50], [20, 30]],
        "image_id": [0, 1, 1],
    }
    tell = "<ref-object><bbox><bbox> and <ref-object> <bbox>"
    row = messages_row("<image><image>?", tell, images=["a.png", "b.png"], objects=objects)
    (chat,), _ = read("ms-swift", [row], photos)
    assert texts_of(chat)[1] == tell
    assert [piece.image for piece in chat.places] == [0, 1, 1]
    assert [piece.phrase for piece in chat.places] == ["both", "", "it"]
    assert list(chat.places)[2].points == ((pytest.approx(0.1), pytest.approx(0.3)),)


@pytest.mark.parametrize(
    ("tell", "objects", "reason"),
    [
        ("<bbox><bbox>", SWIFT_OBJECTS, "unknown_annotation"),
        ("<ref-object><bbox>", {"bbox": [[20, 30, 80, 70]]}, "unknown_annotation"),
        ("<bbox>", {**SWIFT_OBJECTS, "image_id": [1]}, "unknown_image"),
        ("<bbox>", {**SWIFT_OBJECTS, "bbox_type": "cm"}, "undeclared_frame"),
        ("<bbox>", {**SWIFT_OBJECTS, "bbox": [[20, 30, 80]]}, "not_finite"),
        ("<bbox>", {**SWIFT_OBJECTS, "bbox": ["x"]}, "not_finite"),
    ],
)
def test_marks_and_objects_that_do_not_match(
    tell: str, objects: dict[str, Any], reason: str, photos: Path
) -> None:
    row = messages_row("<image>?", tell, images=["a.png"], objects=objects)
    chats, log = read("ms-swift", [row], photos)
    assert chats == [] and log.counts["turn"] == {reason: 2}


def test_ferret(photos: Path) -> None:
    row = llava_row("<image>\nWhat is <bbox_location0>?", "A dog <bbox_location0> and air.")
    row |= {"image_w": 400, "image_h": 200, "box_x1y1x2y2": [[[40, 60, 160, 140]]] * 2}
    (chat,), log = read("ferret", [row], photos)
    assert texts_of(chat) == [turn["value"] for turn in row["conversations"]]
    assert boxes_of(chat) == [pytest.approx(BOX)] * 2
    row["box_x1y1x2y2"] = [[[40, 60, 160, 140], [1, 2, 3, 4]], []]
    chats, log = read("ferret", [row], photos)
    assert chats == [] and log.counts["turn"] == {"unknown_annotation": 2}
    assert log.counts["place"]["box_without_phrase"] == 1


def test_shikra(photos: Path) -> None:
    row = {
        "img_path": "a.png",
        "question": "Is <ph_st>the man<ph_ed> near <ph_st>a dog<ph_ed>?",
        "cot_with_ans": "<ph_st>Two men<ph_ed> are. Yes.",
        "boxes": [[20, 30, 80, 70], [0, 0, 100, 50]],
        "question_boxes_seq": [[0], [1]],
        "answer_boxes_seq": [[0, 1]],
    }
    (chat,), _ = read("shikra", [row], photos)
    assert texts_of(chat) == [row["question"], row["cot_with_ans"]]
    assert phrases_of(chat) == ["the man", "a dog", "Two men"]
    assert [len(piece.boxes) for piece in chat.places] == [1, 1, 2]


def test_openai_parts(photos: Path) -> None:
    url = (
        "data:image/png;base64," + base64.b64encode(encoded(Image.new("RGB", WH, "blue"))).decode()
    )
    content = [
        {"type": "text", "text": "Compare "},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": " with "},
        {"type": "image_url", "image_url": {"url": "a.png"}},
    ]
    row = {"messages": [{"role": "user", "content": content}]}
    row["messages"].append({"role": "assistant", "content": "Both <image>s are alike."})
    (chat,), _ = read("openai", [row], photos)
    assert [image.name for image in chat.images] == ["data URL", "a.png"]
    assert texts_of(chat)[0] == "Compare  with "


def test_texts_alone_need_no_images(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [messages_row("Hi", "Hello")])
    log = DropLog()
    chats = list(read_chats(tmp_path / "rows.jsonl", None, style_of("openai"), drop_log=log))
    assert texts_of(chats[0]) == ["Hi", "Hello"]
    write_lines(tmp_path / "rows.jsonl", [llava_row(ASK, "x")])
    assert not list(read_chats(tmp_path / "rows.jsonl", None, style_of("openai"), drop_log=log))
    assert log.counts["chat"] == {"missing_image": 1}


@pytest.mark.parametrize(
    ("source", "row", "reason"),
    [
        ("llava", [1], "bad_row"),
        ("llava", {"id": "1", "image": "a.png", "text": "A man [0.1, 0.2, 0.3, 0.4]"}, "bad_row"),
        ("llava", llava_row(ASK, "<box>[[1, 2, 3, 4]]</box>"), "other_layout"),
        ("llava", llava_row(ASK, JSON_ANSWER), "other_layout"),
        ("ferret", llava_row(ASK, "<bbox>"), "other_layout"),
        ("llava", llava_row(ASK, "x", video="a.mp4"), "other_media"),
        ("llava", llava_row("<image><image>", "x"), "image_count"),
        ("llava", llava_row("<image>", "x", image=["a.png", "b.png"]), "image_count"),
        ("llava", {"conversations": llava_row(ASK, "x")["conversations"]}, "image_count"),
        ("llava", llava_row(ASK, "x", image="c.png"), "missing_image"),
        ("openai", messages_row([{"type": "input_audio"}], "x"), "other_media"),  # type: ignore[arg-type]
    ],
)
def test_a_row_that_is_no_chat(source: str, row: Any, reason: str, photos: Path) -> None:
    chats, log = read(source, [row], photos, "original" if source == "llava" else None)
    assert chats == [] and log.counts["chat"] == {reason: 1}
    turns = row.get("conversations", row.get("messages", [])) if isinstance(row, dict) else []
    assert log.num_dropped("turn") == len(turns)


def test_unknown_roles_cut_a_chat(photos: Path) -> None:
    row = llava_row(ASK, "x", "do", "y")
    row["conversations"][3]["from"] = "function_call"
    (chat,), log = read("llava", [row], photos, "original")
    assert texts_of(chat) == [ASK, "x"]
    assert log.counts == {"turn": {"unknown_role": 2}}


# written back

ROUND_TRIPS: dict[str, tuple[str, Frame | None, list[dict[str, Any]]]] = {
    "llava padded": (
        "llava",
        "padded",
        [
            llava_row(
                f"<image>\nWhat is in {IN_FRAMES['padded']}?",
                "A box: [0.10,0.40,0.4,0.6].",
                "And?",
                "x",
            ),
            llava_row("<image> and <image>", "Both.", id="2", image=["a.png", "b.png"]),
            {"id": "3", "conversations": llava_row("Hi", "`[0.1, 0.2]`\n\n| a |")["conversations"]},
        ],
    ),
    "llava original": ("llava", "original", [llava_row(ASK, f"{BRACKETS} {BRACKETS}")]),
    "ms-swift": (
        "ms-swift",
        None,
        [
            messages_row(SWIFT_ASK, "At <bbox> and <bbox>", images=["a.png"], objects={
                "ref": ["the dog"], "bbox": [[20, 30, 80, 70], [0, 0.5, 9, 9.25]]}),
            messages_row("<image>a<image>", "<ref-object><bbox>", id="2", images=["a.png", "b.png"],
                objects={"ref": ["it"], "bbox": [[20, 30, 80, 70]], "image_id": [1]}),
            messages_row("Hi", "Hello", id="3"),
        ],
    ),
    "openai": (
        "openai",
        None,
        [
            {"id": "1", "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [
                    {"type": "image_url", "image_url": {"url": "a.png"}},
                    {"type": "text", "text": "Find <ref>it</ref>"}]},
                {"role": "assistant", "content": "<ref>it</ref><box>(1,2),(300,400)</box>"}]},
            messages_row("Hi", "Hello", id="2"),
        ],
    ),
}  # fmt: skip
FILES = {"llava": "llava.json", "ms-swift": "rows.jsonl", "openai": "messages.jsonl"}


def write_back(source: str, chats: list[Chat], folder: Path, frame: Any) -> list[dict[str, Any]]:
    if source == "llava":
        write_llava_chats(chats, folder, frame=frame)
        return json.loads((folder / "llava.json").read_text())
    write = write_ms_swift_chats if source == "ms-swift" else write_openai_chats
    write(chats, folder)
    return [json.loads(line) for line in (folder / FILES[source]).open()]


def without_image_names(row: Any) -> Any:
    """Image files get the names of their chats."""
    text = json.dumps(row)
    for name in ("images/1/1.png", "images/2/1.png", "1/1.png", "2/1.png", "a.png", "b.png"):
        text = text.replace(f'"{name}"', '"IMAGE"')
    return json.loads(text)


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_written_back_to_the_letter(name: str, photos: Path) -> None:
    source, frame, rows = ROUND_TRIPS[name]
    chats, log = read(source, rows, photos, frame)
    assert log.counts == {}
    written = write_back(source, chats, photos / "out", frame)
    for actual, expected in zip(written, rows, strict=True):
        actual, expected = without_image_names(actual), without_image_names(expected)
        if objects := actual.pop("objects", None):
            stated = expected.pop("objects")
            assert objects["bbox"] == [pytest.approx(box) for box in stated["bbox"]]
            assert objects["ref"] == stated["ref"] and objects["bbox_type"] == "real"
            assert objects["image_id"] == stated.get("image_id", [0] * len(objects["bbox"]))
        assert actual == expected
    style = style_of(source, frame)
    again = list(
        read_chats(
            photos / "out" / FILES[source],
            photos / "out" if source != "llava" else photos / "out" / "images",
            style,
            drop_log=DropLog(),
        )
    )
    assert [texts_of(chat) for chat in again] == [texts_of(chat) for chat in chats]
    assert [list(map(list, boxes_of(chat))) for chat in again] == [
        [pytest.approx(box, abs=1e-6) for box in boxes_of(chat)] for chat in chats
    ]


@pytest.mark.parametrize("target", ["llava", "ms-swift", "openai"])
@pytest.mark.parametrize(("source", "marked"), MARKED)
def test_written_in_another_layout(source: str, marked: str, target: str, photos: Path) -> None:
    """The boxes are the same within the rounding, and all words but the marks."""
    talk = ["<image>\nFind it.", f"Here: {marked}!"]
    (chat,), _ = read(source, [llava_row(*talk)], photos)
    write_back(target, [chat], photos / "out", "original")
    frame: Frame | None = "original" if target == "llava" else None
    (again,) = read_chats(
        photos / "out" / FILES[target],
        photos / "out" if target != "llava" else photos / "out" / "images",
        style_of(target, frame),
        drop_log=DropLog(),
    )
    assert boxes_of(again) == [pytest.approx(box, abs=0.0005) for box in boxes_of(chat)]
    assert texts_of(again)[0].removeprefix("<image>") == "\nFind it."
    assert texts_of(again)[1].startswith("Here: ") and texts_of(again)[1].endswith("!")


# the real samples


@pytest.fixture
def formats(shared_data: Path) -> Path:
    return shared_data / "formats"


def test_llama_factorys_own_sample(formats: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "mllm_demo_data").mkdir(parents=True)
    for number in (1, 2, 3):
        photo = formats / f"llamafactory_{number}.jpg"
        (tmp_path / "images" / "mllm_demo_data" / f"{number}.jpg").symlink_to(photo)
    file = formats / "llamafactory_mllm_demo.json"
    log = DropLog()
    style = style_of("llama-factory")
    chats = list(read_chats(file, tmp_path / "images", style, drop_log=log))
    rows = json.loads(file.read_text())
    assert log.counts == {}
    assert [texts_of(chat) for chat in chats] == [
        [message["content"] for message in row["messages"]] for row in rows
    ]
    assert [[of.name for of in chat.images] for chat in chats] == [row["images"] for row in rows]
    write_ms_swift_chats(chats, tmp_path / "out")
    written = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").open(encoding="utf-8")]
    assert [row["messages"] for row in written] == [row["messages"] for row in rows]


def test_qwens_own_sample(formats: Path, tmp_path: Path) -> None:
    file = formats / "qwen_vl_finetune_single_images.json"
    rows = json.loads(file.read_text())
    for row in rows:
        Image.new("RGB", WH, "red").save(tmp_path / row["image"])
    log = DropLog()
    chats = list(read_chats(file, tmp_path, style_of("qwen-vl"), drop_log=log))
    assert log.counts == {}
    expected = [[turn["value"] for turn in row["conversations"]] for row in rows]
    assert [texts_of(chat) for chat in chats] == expected


@pytest.mark.parametrize("kind", ["ground_conv", "refer_caption", "refer_reason"])
def test_ferrets_own_benchmark_as_chats(kind: str, formats: Path, tmp_path: Path) -> None:
    questions, answers = (
        [json.loads(line) for line in (formats / f"ferret_bench_{kind}_{part}_8.jsonl").open()]
        for part in ("question", "answer")
    )
    rows = []
    for question, answer in zip(questions, answers, strict=True):
        Image.new("RGB", WH, "red").save(tmp_path / question["image"])
        rows.append(llava_row(question["text"], answer["text"], image=question["image"]))
    (tmp_path / "images").mkdir()
    write_lines(tmp_path / "rows.jsonl", rows)
    log = DropLog()
    style = style_of("llava", "original")
    chats = list(read_chats(tmp_path / "rows.jsonl", tmp_path, style, drop_log=log))
    assert log.counts == {} and len(chats) == 8
    assert [texts_of(c) for c in chats] == [
        [q["text"], a["text"]] for q, a in zip(questions, answers, strict=True)
    ]
    assert log.delivered["place"] == sum(text.count("[") for c in chats for text in texts_of(c))


# hostile rows: turns read = delivered + dropped

pieces = st.sampled_from(
    [
        *[
            "<image>",
            "the man ",
            BRACKETS,
            "[0.1, 0.2]",
            "[1.5, 0.2, 1.9, 0.4]",
            "[0.5, 0.5, 0.1, 1.0]",
        ],
        *["`[0.1, 0.2, 0.3, 0.4]`", "```\n[0.1, 0.2, 0.3, 0.4]", "| a | b |", "\ud800", "\x00", ""],
        *["<ref>a</ref>", "<box>(1,2),(300,400)</box>", "<box>", "</box>", "<box>(1,2)</box>"],
        *["<bbox>", "<ref-object>", "<bbox_location0>", "<ph_st>a<ph_ed>", JSON_ANSWER],
        *['"bbox_2d": []', "<|box_start|>", "[nan, 0.1, 0.2, 0.3]", "[[0.1, 0.2, 0.3, 0.4]]"],
    ]
)
of_parts = st.sampled_from(
    [
        [{"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": {"url": "a.png"}}],
        [{"type": "image_url", "image_url": {"url": None}}, {"type": None}, None, "x", ["y"]],
        [{"type": "image_url", "image_url": {"url": "data:image/png;base64,%%"}}, {"type": "text"}],
        [{"type": ["text"]}, {"type": "input_audio"}, {"type": "text", "text": 7}],
    ]
)
said = st.one_of(
    st.lists(pieces, max_size=4).map("".join), st.none(), st.integers(), st.just({}), of_parts
)
roles = st.sampled_from(["human", "gpt", "human", "gpt", "system", "tool", "", "User"])
turns = st.lists(st.tuples(roles, said), max_size=6)
objects = st.sampled_from(
    [
        *[None, {}, "x", [], [None], SWIFT_OBJECTS, {"bbox": [[1], None, "a"]}],
        {**SWIFT_OBJECTS, "bbox_type": ["real"], "image_id": [None], "width": [1], "height": ["x"]},
        [{"bbox": [1, 2, 3, 4], "bbox_type": {}}, {"bbox": {"x": 1}, "caption": None}],
        {"ref": None, "bbox": [[[10**400, True, "1", 2]]]},
    ]
)
names = st.sampled_from([None, "a.png", ["a.png"], ["a.png", "b.png"], "c.png", 7, [], [None], {}])


def with_keys(drawn: Any) -> dict[str, Any]:
    talk, image, of = drawn
    messages = [{"from": role, "value": text} for role, text in talk]
    more = {"boxes": of, "question_boxes_seq": of, "answer_boxes_seq": [[0, "x"], None]}
    lists = {"objects": of, "box_x1y1x2y2": [of], "image_w": of, "image_h": 7, **more}
    return {"conversations": messages, "image": image, **lists}


rows = st.lists(st.tuples(turns, names, objects).map(with_keys), min_size=1, max_size=3)


@pytest.mark.parametrize("source", MARKS_OF)
@settings(deadline=None, max_examples=60)
@given(drawn=rows)
def test_every_turn_is_accounted_for(
    source: str, drawn: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", WH, "red").save(folder / "images" / name)
    chats, log = read(source, drawn, folder, "original" if source == "llava" else None)
    num_turns = sum(len(row["conversations"]) for row in drawn)
    assert log.delivered["chat"] + log.num_dropped("chat") == len(drawn)
    assert log.delivered["turn"] + log.num_dropped("turn") == num_turns
    assert log.delivered["turn"] == sum(len(chat.turns) for chat in chats)
    for chat in chats:
        said = [turn["value"] for turn in drawn[int(chat.id.split()[-1]) - 1]["conversations"]]
        for actual, expected in zip(texts_of(chat), said, strict=False):
            # the text parts of a turn, one behind the other
            assert actual == expected or isinstance(expected, list)


def test_ten_thousand_turns(photos: Path) -> None:
    talk = [f"<image>\nWhat is in {BRACKETS}?", "x"] + [f"And {BRACKETS}?", "y <ref>z"] * 4_999
    start = time.monotonic()
    (chat,), log = read("llava", [llava_row(*talk)], photos, "original")
    assert time.monotonic() - start < 20  # 1 s on a quiet core; quadratic work takes minutes
    assert len(chat.turns) == 10_000 and log.delivered["place"] == 5_000


# the commands


def test_built_looked_at_and_exported(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(photos / "rows.jsonl", [llava_row(ASK, BRACKETS), llava_row(ASK, "[2, 2, 3, 3]")])
    paths = ["--rows", str(photos / "rows.jsonl"), "--images", str(photos / "images")]
    build = ["data", "build", "llava", "--frame", "original", *paths]
    assert cli.main([*build, "--out", str(photos / "set")]) == 2
    assert "1 chats (50.0%)" in capsys.readouterr().err
    assert cli.main([*build, "--out", str(photos / "set"), "--max-drop-share", "0.5"]) == 0
    assert len(load_chats(photos / "set")) == 1
    for command in (["stats"], ["validate"], ["inspect", "--out", str(photos / "sheet.png")]):
        assert cli.main(["data", command[0], str(photos / "set"), *command[1:]]) == 0
    said = capsys.readouterr().out
    assert "dropped:             1 chats of 2, 50.0% (outside 1)" in said
    assert (photos / "sheet.png").stat().st_size > 1_000
    export = ["data", "export", "llava", "--frame", "padded", str(photos / "set")]
    assert cli.main([*export, "--out", str(photos / "export")]) == 0
    (row,) = json.loads((photos / "export" / "llava.json").read_text())
    assert row["conversations"][1]["value"] == "[0.100, 0.400, 0.400, 0.600]"
    coco = ["data", "export", "coco", str(photos / "set"), "--out", str(photos / "coco")]
    assert cli.main(coco) == 2
    assert "holds chats, and coco is a format of records" in capsys.readouterr().err
    assert cli.main([*build, "--out", str(photos / "r"), "--as", "regions", "--max-drop", "1"]) == 0
    assert len(load_records(photos / "r")) == 1
