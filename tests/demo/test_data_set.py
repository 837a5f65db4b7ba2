"""Looking at records, chats and what a build dropped."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloc_mllm.data.chats import Chat, ChatImage, Piece, Turn, words
from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.data.parquet import write_chats, write_records
from cloc_mllm.data.records import Record
from cloc_mllm.demo.data_set import DataSet
from cloc_mllm.demo.tabs.data import drops_html, item_html, marks_of

BOX = (0.1, 0.2, 0.3, 0.4)


@pytest.fixture(scope="module")
def records(tiny_scenes: list[Record], tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    drops = DropLog()
    drops.add("record", "img-7", "missing_image", "<b>photo.jpg</b>")
    drops.add("region", "img-8", "inverted", [3, 2, 1, 0], count=60)
    directory = tmp_path_factory.mktemp("set") / "records"
    write_records(tiny_scenes, directory, drop_log=drops)
    return DataSet(str(directory))


def test_records_are_found_by_words(records: DataSet, tiny_scenes: list[Record]) -> None:
    assert records.find("") == list(range(16))
    phrase = tiny_scenes[3].regions[0].phrase
    found = records.find(phrase.upper())
    expected = [
        index
        for index, scene in enumerate(tiny_scenes)
        if all(word in str(vars(scene)).lower() for word in phrase.lower().split())
    ]
    assert 3 in found and set(found) <= set(expected)
    assert records.find("no such words") == []


def test_a_record_is_shown_with_its_boxes(records: DataSet, tiny_scenes: list[Record]) -> None:
    item, scene = records.read(3), tiny_scenes[3]
    assert item.id == scene.id and item.record is not None
    marks = marks_of(item)
    assert [mark.box for mark in marks] == [
        pytest.approx(region.box, abs=1e-6) for region in scene.regions
    ]
    html = item_html(item, "4 of 16")
    assert "4 of 16" in html and scene.captions[0] in html
    assert html.count("data-group") == len(scene.regions)


def test_drops_are_counted_by_reason_and_filtered(records: DataSet) -> None:
    html = drops_html(records, "")
    assert "missing_image 1" in html and "inverted 60" in html
    assert "&lt;b&gt;photo.jpg" in html and "<b>photo" not in html
    assert "expected a file of this name" in html
    assert "and 11 more" in html
    assert "inverted" not in drops_html(records, "img-7 missing").split("</pre>")[1]
    assert "No dropped item" in drops_html(records, "nothing like it")


def test_chats_are_shown_by_their_first_image(tiny_scenes: list[Record], tmp_path: Path) -> None:
    images = [
        ChatImage(scene.image, scene.width, scene.height, f"{scene.id}.png")
        for scene in tiny_scenes[:2]
    ]
    turns = [
        Turn("user", (Piece("image", "<image>", 0), Piece("image", "<image>", 1), words("What?"))),
        Turn(
            "assistant",
            (
                Piece("place", "<i>a crab</i> [1]", 0, "<i>a crab</i>", (BOX,)),
                Piece("place", "a boat [2]", 1, "a boat", (BOX,)),
            ),
        ),
    ]
    write_chats([Chat("talk", images, turns, "llava")], tmp_path / "chats")
    data_set = DataSet(str(tmp_path / "chats"))
    assert data_set.find("crab") == [0]
    item = data_set.read(0)
    assert [(mark.box, mark.tag) for mark in marks_of(item)] == [(BOX, "<i>a crab</i>")]
    html = item_html(item, "1 of 1")
    assert "2 images; the first is shown" in html and "user: " in html
    assert "<i>" not in html


def test_what_is_no_set_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no manifest"):
        DataSet(str(tmp_path))
