"""Chats: what is kept, what is dropped and counted, how they lie on disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from cloc_mllm.config import DataConfig
from cloc_mllm.data.chats import (
    Chat,
    ChatImage,
    Piece,
    Turn,
    exchanges_of,
    image_mark,
    mentioned_boxes,
    validate_chat,
    words,
    write_turn,
)
from cloc_mllm.data.commands import main
from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.data.mixture import load_training_data, load_training_records
from cloc_mllm.data.parquet import (
    load_chats,
    load_records,
    load_set,
    read_manifest,
    write_chats,
    write_records,
)
from cloc_mllm.data.records import Record
from cloc_mllm.mllm.coordinates import BoxFormat
from tests.photos import encoded

PICTURE = ChatImage(encoded(Image.new("RGB", (200, 100), "red")), 200, 100, "a.png")
BOX = (0.1, 0.3, 0.4, 0.7)


def place(text: str = "[0.1, 0.3, 0.4, 0.7]", **changes: Any) -> Piece:
    return dataclasses.replace(Piece("place", text, 0, boxes=(BOX,)), **changes)


def user(*pieces: Piece | str) -> Turn:
    return Turn("user", tuple(words(p) if isinstance(p, str) else p for p in pieces))


def assistant(*pieces: Piece | str) -> Turn:
    return dataclasses.replace(user(*pieces), role="assistant")


def chat(*turns: Turn, images: tuple[ChatImage, ...] = (PICTURE,), name: str = "1") -> Chat:
    return Chat(name, list(images), list(turns), "llava", "llava original")


ASK, TELL = user(image_mark(0), "\nWhat is in ", place(), "?"), assistant("A box.")
GOOD = chat(ASK, TELL, user("Where is it?"), assistant("At ", place(), "."))
SYSTEM = Turn("system", (words("Be brief."),))


def test_a_good_chat_is_kept_to_the_letter() -> None:
    log = DropLog()
    assert validate_chat(GOOD, log) == GOOD
    assert log.counts == {}
    assert log.delivered == {"chat": 1, "turn": 4, "place": 2}


BAD_BOXES = {
    "outside": (1.5, 1.5, 1.8, 1.9),
    "mostly_outside": (0.9, 0.1, 1.9, 0.2),
    "inverted": (0.5, 0.1, 0.2, 0.4),
    "zero_area": (0.5, 0.1, 0.5, 0.4),
    "not_finite": (float("nan"), 0.1, 0.5, 0.4),
}


@pytest.mark.parametrize("reason", BAD_BOXES)
def test_a_chat_is_kept_up_to_its_first_bad_box(reason: str) -> None:
    bad = place(boxes=(BAD_BOXES[reason],))
    log = DropLog()
    valid = validate_chat(chat(ASK, TELL, user("And ", bad, "?"), TELL, user("Hm?"), TELL), log)
    assert valid is not None and valid.turns == [ASK, TELL]
    assert log.counts == {"turn": {reason: 4}, "place": {reason: 1}}
    assert log.delivered == {"chat": 1, "turn": 2, "place": 1}


@pytest.mark.parametrize(
    ("turns", "kept", "reason"),
    [
        ([SYSTEM, ASK, TELL], 3, None),
        ([TELL], 0, "role_order"),
        ([ASK, TELL, user("Well?")], 2, "no_answer"),
        ([ASK], 0, "no_answer"),
        ([ASK, TELL, user("a"), user("b"), TELL], 2, "role_order"),
        ([ASK, TELL, TELL, ASK, TELL], 2, "role_order"),
        ([ASK, TELL, SYSTEM, ASK, TELL], 2, "role_order"),
        ([ASK, assistant(" \n")], 0, "empty_text"),
        ([ASK, TELL, user("Draw it"), assistant("Here: ", image_mark(0))], 2, "image_in_answer"),
        ([ASK, TELL, user(""), TELL], 2, "empty_text"),
        ([ASK, TELL, user("\ud800"), TELL], 2, "bad_text"),
        ([ASK, TELL, user("x", place(image=1)), TELL], 2, "unknown_image"),
        ([ASK, TELL, user("x", place(boxes=(), points=((0.5, 1.2),))), TELL], 2, "outside"),
        ([], 0, "no_turns"),
    ],
)
def test_turns_are_kept_or_counted(turns: list[Turn], kept: int, reason: str | None) -> None:
    log = DropLog()
    valid = validate_chat(chat(*turns), log)
    assert (valid is None) == (kept == 0)
    assert valid is None or valid.turns == turns[:kept]
    assert log.delivered["turn"] + log.num_dropped("turn") == len(turns)
    assert log.delivered["turn"] == kept
    if reason:
        kind = "turn" if turns else "chat"
        assert set(log.counts[kind]) == {reason}


def test_images_of_dropped_turns_go_with_them() -> None:
    second = dataclasses.replace(PICTURE, name="b.png")
    turns = [ASK, TELL, user(image_mark(1), "and this?")]
    log = DropLog()
    valid = validate_chat(chat(*turns, images=(PICTURE, second)), log)
    assert valid is not None and valid.images == [PICTURE]


def test_sizes_are_those_of_the_file_and_boxes_are_clipped() -> None:
    wrong = dataclasses.replace(PICTURE, width=7, height=7)
    sticking_out = place(boxes=((-0.1, 0.2, 0.5, 1.1),))
    log = DropLog()
    valid = validate_chat(chat(user(image_mark(0), sticking_out), TELL, images=(wrong,)), log)
    assert valid is not None
    assert (valid.images[0].width, valid.images[0].height) == (200, 100)
    assert [piece.boxes for piece in valid.places] == [((0.0, 0.2, 0.5, 1.0),)]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [(b"", "missing_image"), (b"no image", "not_an_image"), (PICTURE.image[:-40], "broken_image")],
)
def test_an_image_that_is_none_drops_its_chat(broken: bytes, reason: str) -> None:
    log = DropLog()
    picture = dataclasses.replace(PICTURE, image=broken)
    assert validate_chat(chat(ASK, TELL, images=(picture,)), log) is None
    assert log.counts == {"chat": {reason: 1}, "turn": {reason: 2}, "place": {reason: 1}}


def test_one_id_twice() -> None:
    log = DropLog()
    validate_chat(GOOD, log)
    assert validate_chat(GOOD, log) is None
    assert log.counts["chat"] == {"duplicate_id": 1}


def test_exchanges() -> None:
    turns = [SYSTEM, ASK, TELL, user("b"), TELL]
    assert exchanges_of(chat(*turns)) == [turns[:3], turns[3:]]


# writing


TWO = place("<box>", phrase="two dogs", boxes=(BOX, (0.5, 0.5, 1.0, 1.0)), points=((0.25, 0.5),))


@pytest.mark.parametrize(
    ("box_format", "question", "answer"),
    [
        (
            BoxFormat("integers"),
            "<image>see <p>two dogs</p>[100, 300, 400, 699] [500, 500, 999, 999] [250, 500]!",
            "see <p>two dogs</p>[100, 300, 400, 699] [500, 500, 999, 999] [250, 500]!",
        ),
        (
            BoxFormat("location_tokens", 11),
            "<image>see <p>two dogs</p><loc_1><loc_3><loc_4><loc_7><loc_5><loc_5><loc_10><loc_10>"
            " <loc_2><loc_5>!",
            "see <p>two dogs</p><loc_1><loc_3><loc_4><loc_7><loc_5><loc_5><loc_10><loc_10>"
            " <loc_2><loc_5>!",
        ),
        (
            BoxFormat("location_tokens", 11, head=True),
            "<image>see <p>two dogs</p><loc_1><loc_3><loc_4><loc_7><loc_5><loc_5><loc_10><loc_10>"
            " <loc_2><loc_5>!",
            "see <p>two dogs</p><box><box> <loc_2><loc_5>!",
        ),
    ],
    ids=["integers", "location tokens", "box head"],
)
def test_a_turn_in_each_box_format(box_format: BoxFormat, question: str, answer: str) -> None:
    assert write_turn(user(image_mark(0), "see ", TWO, "!"), box_format) == question
    assert write_turn(assistant("see ", TWO, "!"), box_format) == answer


def test_chats_and_records_write_linked_phrases_alike() -> None:
    box_format = BoxFormat("integers")
    marked = dataclasses.replace(TWO, points=())
    actual = write_turn(assistant("There are ", marked, "."), box_format)
    assert actual == f"There are {box_format.link('two dogs', marked.boxes)}."
    alone = Piece("place", "<ref>two dogs</ref>", phrase="two dogs")
    assert write_turn(user("Find ", alone, "!"), box_format) == "Find two dogs!"
    plain = dataclasses.replace(marked, phrase="")
    assert "<p>" not in write_turn(assistant("two dogs ", plain), box_format)


def test_region_tokens_stand_behind_the_boxes_of_questions() -> None:
    turn = user("What is ", place(), "?")
    box_format = BoxFormat("integers")
    expected = "What is [100, 300, 400, 699] <region>?"
    assert write_turn(turn, box_format, region_tokens=True) == expected
    assert mentioned_boxes(turn) == [(0, BOX)]
    two = user("Compare ", TWO, ".")
    boxes = "[100, 300, 400, 699] <region> [500, 500, 999, 999] <region> [250, 500]"
    expected = f"Compare <p>two dogs</p>{boxes}."
    assert " ".join(write_turn(two, box_format, region_tokens=True).split()) == expected
    said = dataclasses.replace(turn, role="assistant")
    assert "<region>" not in write_turn(said, box_format, region_tokens=True)


side = st.integers(0, 10_000).map(lambda value: value / 10_000)
pair = st.lists(side, min_size=2, max_size=2, unique=True).map(sorted)
boxes = st.tuples(pair, pair).map(lambda b: (b[0][0], b[1][0], b[0][1], b[1][1]))
texts = st.text(st.characters(exclude_characters="[]<>0123456789", codec="utf-8"), max_size=20)


points = st.lists(st.tuples(side, side), max_size=2)
places = st.tuples(texts, st.lists(boxes, max_size=3), points)


@given(st.lists(places.filter(lambda of: of[1] or of[2]), max_size=4))
@example([("", [BOX], [(0.25, 0.5)])])
@example([("", [], [(0.25, 0.25), (0.5, 0.5)])])
def test_a_turn_decodes_to_the_same_boxes_in_every_format(drawn: list[Any]) -> None:
    """Within half a bin and, for sides shorter than a bin, within one."""
    pieces = []
    for text, of, at in drawn:
        pieces += [words(text + "|"), place("?", boxes=tuple(of), points=tuple(at))]
    turn = Turn("user", tuple(pieces))
    expected = [box for _, of, _ in drawn for box in of]
    for box_format in (BoxFormat("integers"), BoxFormat("location_tokens", 100)):
        found, failures = box_format.find(write_turn(turn, box_format))
        assert failures == [] and len(found) == len(expected)
        step = 1 / (box_format.num_bins - 1)
        for placed, box in zip(found, expected, strict=True):
            assert placed.box == pytest.approx(box, abs=step)
    head = BoxFormat("location_tokens", 100, head=True)
    written = write_turn(dataclasses.replace(turn, role="assistant"), head)
    assert [placed.box for placed in head.find(written, expected)[0]] == expected


# on disk


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    text_only = chat(user("Hi"), assistant("Hello, 猫"), images=(), name="text")
    two = chat(
        user(image_mark(0), Piece("image", "", 1), TWO), assistant("b"), images=(PICTURE,) * 2
    )
    many = [dataclasses.replace(two, id=f"c{i}") for i in range(20)]
    write_chats([GOOD, text_only, *many], tmp_path / "chats", shard_size=8)
    return tmp_path / "chats"


def test_written_and_read_again(folder: Path) -> None:
    chats = load_chats(folder, verify=True)
    assert len(chats) == 22
    assert chats[0] == GOOD
    assert chats[1].turns[1].text == "Hello, 猫" and chats[1].images == []
    assert [chat.id for chat in chats] == ["1", "text", *[f"c{i}" for i in range(20)]]
    assert list(chats[2].places) == [TWO]
    assert read_manifest(folder)["kind"] == "chats"
    assert load_set(folder).kind == "chats"
    one_file = load_set(folder / "shard-00001.parquet")
    assert one_file.kind == "chats" and one_file[0] == chats[8]


def test_chats_about_one_picture_store_it_once_per_row_group(tmp_path: Path) -> None:
    noise = encoded(Image.effect_noise((128, 128), 80).convert("RGB"))
    image = ChatImage(noise, 128, 128, "a.png")
    chats = [dataclasses.replace(GOOD, id=f"c{i}", images=[image]) for i in range(8)]
    write_chats(chats, tmp_path / "chats")
    assert list(load_chats(tmp_path / "chats")) == chats
    size = (tmp_path / "chats" / "shard-00000.parquet").stat().st_size
    assert len(image.image) < size < 2 * len(image.image)


def test_without_images(folder: Path) -> None:
    chats = load_chats(folder)
    bare = [
        dataclasses.replace(c, images=[dataclasses.replace(of, image=b"") for of in c.images])
        for c in chats
    ]
    assert list(chats.without_images()) == bare


def test_any_parquet_reader_decodes_the_images(folder: Path) -> None:
    import datasets

    files = sorted(map(str, folder.glob("*.parquet")))
    rows = datasets.load_dataset("parquet", data_files=files, split="train")
    assert rows[0]["images"][0]["image"].size == (200, 100)
    assert rows[0]["turns"][0]["pieces"][2]["boxes"] == [list(BOX)]


def test_chats_and_records_are_not_taken_for_each_other(
    folder: Path, tiny_scenes: list[Record], tmp_path: Path
) -> None:
    write_records(tiny_scenes[:3], tmp_path / "records")
    with pytest.raises(ValueError, match=r"holds chats; records are needed here.*--as regions"):
        load_records(folder)
    with pytest.raises(ValueError, match="holds records, chats are needed"):
        load_chats(tmp_path / "records")
    mixture = {str(folder): 1.0, str(tmp_path / "records"): 3.0}
    mixed = load_training_data(DataConfig(mixture=mixture))
    assert [type(mixed[i]) for i in (0, 21, 22, 24)] == [Chat, Chat, Record, Record]
    assert len(list(mixed.without_images())) == 25
    with pytest.raises(ValueError, match="holds chats, but stage 1 and the alignment"):
        load_training_records(DataConfig(mixture=mixture))


def test_parted_and_merged(tiny_scenes: list[Record], tmp_path: Path) -> None:
    shown = [chat(ASK, TELL, name=f"shown {i}") for i in range(5)]
    said = [chat(user("Hi"), TELL, images=(), name=f"said {i}") for i in range(30)]
    write_chats([*shown, *said], tmp_path / "all")
    parts = ["--parts", "a=0.5", "b=0.5", "--output_dir", str(tmp_path)]
    assert main(["split", str(tmp_path / "all"), *parts]) == 0
    found = {name: {of.id for of in load_chats(tmp_path / name)} for name in "ab"}
    assert found["a"].isdisjoint(found["b"]) and all(len(ids) > 5 for ids in found.values())
    together = {of.id for of in shown}
    assert any(together <= ids for ids in found.values())  # they show the same picture
    both = [str(tmp_path / name) for name in "ab"]
    assert main(["merge", *both, "--output_dir", str(tmp_path / "merged")]) == 0
    assert {of.id for of in load_chats(tmp_path / "merged")} == found["a"] | found["b"]
    write_records(tiny_scenes[:2], tmp_path / "records")
    mixed = ["merge", str(tmp_path / "all"), str(tmp_path / "records")]
    with pytest.raises(ValueError, match=r"train on both with data\.mixture"):
        main([*mixed, "--output_dir", str(tmp_path / "x")])
