from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cloc_mllm.data.readers import ReadOptions
from cloc_mllm.data.readers.boxes import OTHER_SHAPE, RESTORED
from cloc_mllm.data.readers.flickr30k_entities import (
    parse_sentences,
    read_flickr30k_entities,
    read_mentions,
)
from cloc_mllm.data.records import DropLog, Record

SENTENCES = """\
[/EN#1/people A woman] holds [/EN#2/clothing/other her red hats] in [/EN#3/scene the park] .
[/EN#1/people The lady] and [/EN#1/people a woman] with [/EN#0/notvisual nothing else]
"""


def to_object(names: str, content: str) -> str:
    return f"<object>{''.join(f'<name>{n}</name>' for n in names.split())}{content}</object>"


def to_bndbox(*corners: object) -> str:
    tags = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    return f"<bndbox>{''.join(f'<{tag}>{value}</{tag}>' for tag, value in tags)}</bndbox>"


OBJECTS = (
    to_object("1", to_bndbox(50, 25, 250, 100))
    + to_object("2", to_bndbox(0, 0, 100, 100))
    + to_object("2", to_bndbox(100, 0, 200, 100))
    + to_object("3", "<scene>1</scene><nobndbox>1</nobndbox>")
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """One annotated photo `7`: stated as 500 x 250, its file squashed to 64 x 64."""
    for folder in ("Annotations", "Sentences", "images"):
        (tmp_path / folder).mkdir()
    write_xml(tmp_path, OBJECTS)
    (tmp_path / "Sentences" / "7.txt").write_text(SENTENCES)
    Image.new("RGB", (64, 64), "green").save(tmp_path / "images" / "7.jpg")
    return tmp_path


def write_xml(source: Path, objects: str) -> None:
    size = "<size><width>500</width><height>250</height></size>"
    (source / "Annotations" / "7.xml").write_text(f"<annotation>{size}{objects}</annotation>")


def read(source: Path, drop_log: DropLog | None = None, **options: object) -> list[Record]:
    log = drop_log or DropLog()
    return list(read_flickr30k_entities(source, source / "images", drop_log=log, **options))


def test_one_photo(source: Path) -> None:
    log = DropLog()
    (record,) = read(source, log)
    assert (record.id, record.width, record.height) == ("7", 64, 64)
    assert record.captions == [
        "A woman holds her red hats in the park .",
        "The lady and a woman with nothing else",
    ]
    woman, left_hat, right_hat = record.regions
    assert woman.box == pytest.approx((0.1, 0.1, 0.5, 0.4))
    assert (woman.phrase, woman.expressions) == ("A woman", ["The lady"])
    assert (woman.category, woman.group) == ("people", "1")
    assert right_hat.box == pytest.approx((0.2, 0.0, 0.4, 0.4))
    assert {(hat.phrase, hat.group, hat.category) for hat in (left_hat, right_hat)} == {
        ("her red hats", "2", "clothing")
    }
    assert log.counts == {}
    assert log.notes == {
        "chains without a box (the scene, not visual, unmarked)": 2,
        OTHER_SHAPE: 1,  # squashed to a square
    }


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_squash_is_undone(source: Path, suffix: str) -> None:
    squashed = Image.new("RGB", (64, 64), "green")
    corners = (6, 6, 31, 25)  # pixels of the box 50, 25, 250, 100 of 500 x 250
    ImageDraw.Draw(squashed).rectangle(corners, "red")
    (source / "images" / "7.jpg").unlink()
    squashed.save(source / "images" / f"7.{suffix}", quality=95)
    log = DropLog()
    (record,) = read(source, log, options=ReadOptions(restore_shape=True))
    assert (record.width, record.height) == (128, 64)
    assert log.notes[RESTORED] == 1 and OTHER_SHAPE not in log.notes
    left, top, right, bottom = (np.array(record.regions[0].box) * [128, 64, 128, 64]).round()
    inside = np.array(record.load_image().crop((left + 2, top + 2, right - 2, bottom - 2)))
    assert inside[..., 0].min() > 200 and inside[..., 1].max() < 80


def test_a_broken_photo_is_not_stretched(source: Path) -> None:
    (source / "images" / "7.jpg").write_bytes((source / "images" / "7.jpg").read_bytes()[:500])
    log = DropLog()
    assert read(source, log, options=ReadOptions(restore_shape=True)) == []
    assert log.counts["record"] == {"broken_image": 1}


def test_box_of_two_chains_is_a_region_of_each(source: Path) -> None:
    write_xml(source, to_object("1 2", to_bndbox(50, 25, 250, 100)))
    (record,) = read(source)
    assert [region.phrase for region in record.regions] == ["A woman", "her red hats"]
    assert record.regions[0].box == record.regions[1].box


@pytest.mark.parametrize(
    ("thing", "reason"),
    [
        pytest.param(to_object("1", to_bndbox(9, 9, 9, 20)), "zero_area", id="zero_area"),
        pytest.param(to_object("1", to_bndbox(90, 9, 9, 20)), "inverted", id="inverted"),
        pytest.param(to_object("1", to_bndbox(600, 9, 700, 20)), "outside", id="outside"),
        pytest.param(to_object("1", to_bndbox("nan", 9, 99, 99)), "not_finite", id="nan"),
        pytest.param(to_object("1", "<bndbox/>"), "not_finite", id="no_corners"),
        pytest.param(to_object("99", to_bndbox(9, 9, 99, 99)), "empty_text", id="never_mentioned"),
        pytest.param(to_object("", to_bndbox(9, 9, 99, 99)), "empty_text", id="no_name"),
    ],
)
def test_bad_object_is_dropped(source: Path, thing: str, reason: str) -> None:
    write_xml(source, OBJECTS + thing)
    log = DropLog()
    (record,) = read(source, log)
    assert len(record.regions) == 3
    assert log.counts["region"] == {reason: 1}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        pytest.param("Annotations/7.xml", None, "missing_annotation", id="no_xml"),
        pytest.param("Sentences/7.txt", None, "missing_annotation", id="no_sentences"),
        pytest.param("Annotations/7.xml", b"<annotation><obj", "bad_annotation", id="cut_xml"),
        pytest.param("Annotations/7.xml", b"<!DOCTYPE x><x/>", "bad_annotation", id="doctype"),
        pytest.param("Sentences/7.txt", b"caf\xe9", "bad_annotation", id="not_utf8"),
        pytest.param("images/7.jpg", None, "missing_image", id="no_image"),
        pytest.param("images/7.jpg", b"<html></html>", "not_an_image", id="html_as_jpg"),
    ],
)
def test_bad_file_drops_the_photo(
    source: Path, name: str, content: bytes | None, reason: str
) -> None:
    (source / name).unlink()
    if content is not None:
        (source / name).write_bytes(content)
    log = DropLog()
    assert read(source, log, ids=["7"]) == []
    assert log.counts["record"] == {reason: 1}


def test_truncated_jpeg_drops_the_photo(source: Path) -> None:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(file, "JPEG")
    (source / "images" / "7.jpg").write_bytes(file.getvalue()[: file.tell() // 2])
    log = DropLog()
    assert read(source, log) == []
    assert log.counts["record"] == {"broken_image": 1}
    assert log.counts["region"] == {"broken_image": 3}


def test_id_listed_twice_is_delivered_once(source: Path) -> None:
    log = DropLog()
    assert len(read(source, log, ids=["7", "7", "8"])) == 1
    assert log.counts["record"] == {"duplicate_id": 1, "missing_annotation": 1}


def test_mentions_keep_their_order_and_differ() -> None:
    captions, chains = parse_sentences(
        "[/EN#5/animals a cat] [/EN#5/animals A CAT] [/EN#5/other it]"
    )
    assert captions == ["a cat A CAT it"]
    assert chains["5"].texts == ["a cat", "it"]
    assert chains["5"].category == "animals"


def test_real_validation_photos(shared_data: Path) -> None:
    folder = shared_data / "flickr8k-entities"
    log = DropLog()
    records = list(
        read_flickr30k_entities(
            folder / "annotations.zip",
            folder / "images-val.tar",
            ids=(folder / "val.txt").read_text().split(),
            drop_log=log,
        )
    )
    assert len(records) == 247
    assert all(len(record.captions) == 5 for record in records)
    assert sum(len(record.regions) for record in records) == 1842
    assert log.counts == {}


def test_every_mention_of_a_boxed_chain_is_read(source: Path) -> None:
    notes: Counter[str] = Counter()
    mentions = list(read_mentions(source, ["7"], notes))
    assert [(m.sentence, m.text, m.chain, m.types) for m in mentions] == [
        (0, "A woman", "1", ("people",)),
        (0, "her red hats", "2", ("clothing", "other")),
        (1, "The lady", "1", ("people",)),
        (1, "a woman", "1", ("people",)),
    ]
    assert mentions[0].boxes == [pytest.approx((0.1, 0.1, 0.5, 0.4))]
    assert mentions[1].boxes[1] == pytest.approx((0.2, 0.0, 0.4, 0.4))
    assert notes == {"phrase_without_box": 2}  # the park, nothing else


def test_an_unusable_box_is_no_truth(source: Path) -> None:
    write_xml(source, OBJECTS + to_object("1", to_bndbox(30, 30, 30, 90)))
    notes: Counter[str] = Counter()
    assert len(next(iter(read_mentions(source, ["7"], notes))).boxes) == 1
    assert notes["unusable_box"] == 1


def test_mentions_of_a_photo_without_annotation_are_refused(source: Path) -> None:
    with pytest.raises(ValueError, match="has no annotation of photo '8'"):
        list(read_mentions(source, ["8"], Counter()))
    (source / "Annotations" / "7.xml").write_text("<annotation>")
    with pytest.raises(ValueError, match="photo '7': no element found"):
        list(read_mentions(source, ["7"], Counter()))


def test_real_mentions(shared_data: Path) -> None:
    folder = shared_data / "flickr8k-entities"
    ids = (folder / "val.txt").read_text().split()
    notes: Counter[str] = Counter()
    mentions = list(read_mentions(folder / "annotations.zip", ids, notes))
    assert len({mention.photo_id for mention in mentions}) == len(ids)
    assert (len(mentions), notes["phrase_without_box"], notes["unusable_box"]) == (3239, 594, 0)
