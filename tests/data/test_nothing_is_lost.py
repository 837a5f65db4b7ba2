"""Whatever is odd: read == delivered + dropped + set aside, and a loss is never exit status 0."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloc_mllm import cli
from cloc_mllm.data.parquet import load_records, read_manifest
from cloc_mllm.data.readers.coco import read_coco
from cloc_mllm.data.readers.odgt import read_odgt
from cloc_mllm.data.readers.refer import read_refer
from cloc_mllm.data.records import DropLog, Record, Region
from tests.data.formats import (
    BY_NAME,
    FORMATS,
    painted_records,
    write_coco_files,
    write_images,
    write_lines,
    write_refer_files,
)
from tests.data.test_hostile_annotations import (
    EXPRESSION_FORMATS,
    PLAIN_TEXT_FORMATS,
    REGION_FORMATS,
    boxes,
    phrases,
)
from tests.photos import encoded

GOOD = (0.1, 0.2, 0.5, 0.6)
items = st.lists(
    st.tuples(st.one_of(st.just(GOOD), boxes), st.one_of(st.just("the cat"), phrases)),
    min_size=1,
    max_size=4,
)
images = st.sampled_from(["fine", "fine", "fine", "missing", "broken", "bmp", "deeper", "upper"])
pictures = st.lists(st.tuples(images, items), min_size=1, max_size=3)
# how the command is called: `--x FILE` for the annotations, `--images images` is added
COMMANDS = {
    "coco": "coco --instances instances.json --captions captions.json",
    "refcoco": "refcoco --rows rows.json",
    "refer": "refer --refs refs(unc).p --instances instances.json --split val",
    "mdetr": "mdetr --annotations mdetr.json",
    "shikra_referring": "shikra --as regions --rows rows.jsonl",
    "shikra_captions": "shikra --as regions --rows rows.jsonl",
    "qwen_vl_lines": "qwen-vl --as regions --rows rows.jsonl",
    "qwen_vl_conversations": "qwen-vl --as regions --rows rows.jsonl",
    "visual_genome_regions": "visual-genome --annotations vg.json",
    "visual_genome_objects": "visual-genome --annotations vg.json",
    "grit_rows": "grit --rows rows.jsonl",
    "odvg_detection": "odgt --rows rows.jsonl",
    "odvg_grounding": "odgt --rows rows.jsonl",
    "odgt": "odgt --rows rows.jsonl",
    "yolo": "yolo --labels labels --names data.yaml",
    "pascal_voc": "pascal-voc --annotations Annotations",
    "llava_padded": "llava --frame padded --as regions --rows rows.json",
    "llava_original": "llava --frame original --as regions --rows rows.json",
    "ferret": "ferret --as regions --rows rows.json",
    "ms_swift_real": "ms-swift --as regions --rows rows.jsonl",
    "ms_swift_norm1": "ms-swift --as regions --rows rows.jsonl",
    "ms_swift_norm1000": "ms-swift --as regions --rows rows.jsonl",
    "cvat": "cvat --annotations annotations.xml --expression_attribute expression",
    "label_studio": "label-studio --annotations export.json",
    "label_studio_min": "label-studio --annotations export.json",
    "labelme": "labelme --annotations labels --descriptions",
    "via_project": "via --annotations via_project.json",
    "via_json": "via --annotations via.json",
    "via_csv": "via --annotations via.csv",
    "open_images": "open-images --boxes boxes.csv --classes classes.csv",
    "hf_rows": "hf-objects --dataset rows.jsonl --frame pixels --box_order xywh",
    "csv": "csv --rows boxes.csv --frame pixels",
}
# files that hold no NUL and no lone surrogate; GRIT's phrases stand in its caption
PLAIN_TEXT = dict.fromkeys([*PLAIN_TEXT_FORMATS], "cat") | {"grit_rows": "the cat"}
ROWS_PER_ITEM = {"shikra_referring": 2, "qwen_vl_lines": 2}
ROWS_PER_ITEM |= dict.fromkeys(["ms_swift_real", "ms_swift_norm1", "ms_swift_norm1000"], 3)
ROWS_PER_PICTURE = ["shikra_captions", "qwen_vl_conversations", "llava_padded", "llava_original"]
ROWS_PER_PICTURE += ["ferret"]
CAPTIONED = ["coco", "shikra_captions", "grit_rows", "odvg_grounding"]
CAPTIONED += ["label_studio", "via_project", "via_json", "via_csv"]
ONLY_BOXES = ["refer", "csv", "open_images"]  # an image without a box is not in their files


def odd_records(drawn: list[tuple[str, Any]], plain: str | None) -> list[Record]:
    records = []
    for number, (_, picture_boxes) in enumerate(drawn, 1):
        regions = [
            Region(box, plain or text, expressions=[plain or text, "it"], category="cat")
            for box, text in picture_boxes
        ]
        painted = painted_records()[number - 1]
        size = painted.width, painted.height
        records.append(Record(str(number), painted.image, *size, ["the cat"], regions, ""))
    return records


def spoil_images(drawn: list[tuple[str, Any]], folder: Path) -> None:
    for number, (state, _) in enumerate(drawn, 1):
        path = folder / "images" / f"{number}.png"
        if state == "missing":
            path.unlink()
        elif state == "broken":
            path.write_bytes(path.read_bytes()[:-40])
        elif state == "bmp":
            path.write_bytes(encoded(painted_records()[number - 1].load_image(), "BMP"))
        elif state == "upper":
            path.rename(path.with_suffix(".PNG"))
        elif state == "deeper":
            (path.parent / "x").mkdir(exist_ok=True)
            path.rename(path.parent / "x" / path.name)


def write(name: str, drawn: list[tuple[str, Any]], folder: Path) -> None:
    records = odd_records(drawn, PLAIN_TEXT.get(name))
    write_images(records, folder)
    BY_NAME[name].write(records, folder)
    spoil_images(drawn, folder)


def total(log: DropLog, kind: Any) -> int:
    return log.delivered[kind] + log.num_dropped(kind) + log.num_set_aside(kind)


@pytest.mark.parametrize("name", COMMANDS)
@settings(deadline=None, max_examples=10)
@given(drawn=pictures)
def test_every_item_is_accounted_for(name: str, drawn: list[tuple[str, Any]]) -> None:
    num_items = sum(len(picture_boxes) for _, picture_boxes in drawn)
    log = DropLog()
    with tempfile.TemporaryDirectory() as place:
        write(name, drawn, Path(place))
        records = list(BY_NAME[name].read(Path(place), log))
    assert log.delivered["record"] == len(records)
    assert log.delivered["region"] == sum(len(record.regions) for record in records)
    if name == "yolo":  # goes by its images; a label file alone is as many dropped regions
        assert total(log, "record") == sum(state != "missing" for state, _ in drawn)
    else:
        assert total(log, "record") == len(drawn)
    if name in REGION_FORMATS:
        assert total(log, "region") == num_items
    if name in EXPRESSION_FORMATS:
        assert total(log, "expression") == 2 * num_items
    if name in CAPTIONED:
        assert total(log, "caption") == len(drawn)
    expected = num_items * ROWS_PER_ITEM.get(name, 0)
    expected += len(drawn) if name in ROWS_PER_PICTURE else 0
    assert total(log, "row") == expected


def build(name: str, folder: Path, *more: str) -> int:
    source, *options = COMMANDS[name].split()
    paths = [str(folder / o) if (folder / o).exists() else o for o in options]
    where = ["--images", str(folder / "images"), "--out", str(folder / "out")]
    return cli.main(["data", "build", source, *paths, *where, *more])


@pytest.mark.parametrize("name", COMMANDS)
@settings(deadline=None, max_examples=6)
@given(drawn=pictures)
def test_a_loss_is_never_success(name: str, drawn: list[tuple[str, Any]]) -> None:
    """Judged by what was written and what can be loaded, not by the log."""
    with tempfile.TemporaryDirectory() as place:
        write(name, drawn, Path(place))
        status = build(name, Path(place))
        assert status in (0, 2)
        assert (Path(place) / "out").exists() == (status == 0)
        if status:
            return
        records = list(load_records(Path(place) / "out"))
        assert len(records) >= 0.95 * sum(state != "missing" for state, _ in drawn)
        num_regions = sum(len(record.regions) for record in records)
        assert num_regions > 0
        if name in REGION_FORMATS:
            assert num_regions >= 0.95 * sum(len(picture_boxes) for _, picture_boxes in drawn)
        assert cli.main(["data", "validate", str(Path(place) / "out")]) == 0


LOST: dict[str, Callable[[list[tuple[str, Any]]], list[tuple[str, Any]]]] = {
    "no_numbers": lambda drawn: [(s, [((float("nan"),) * 4, t) for _, t in i]) for s, i in drawn],
    "outside": lambda drawn: [(s, [((5.0, 5.0, 6.0, 6.0), t) for _, t in i]) for s, i in drawn],
    "images_missing": lambda drawn: [("missing", i) for _, i in drawn],
    "images_broken": lambda drawn: [("broken", i) for _, i in drawn],
}


@pytest.mark.parametrize("loss", LOST)
@pytest.mark.parametrize("name", COMMANDS)
def test_all_is_lost(
    name: str, loss: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(name, LOST[loss]([("fine", [(GOOD, "the cat")])] * 2), tmp_path)
    assert build(name, tmp_path) == 2
    said = capsys.readouterr()
    assert "were dropped, at most 5.0% may be; nothing was written" in said.err or (
        name == "yolo" and loss == "images_missing"  # without an image there is nothing to read
    )
    assert "most frequent reasons" in said.out and "expected" in said.out
    rows = [json.loads(line) for line in (tmp_path / "out.drops.jsonl").open()]
    assert all(row["found"] for row in rows if row["kind"] == "record")


@pytest.mark.parametrize(
    "name", [n for n in COMMANDS if n in REGION_FORMATS and n not in ONLY_BOXES]
)
def test_nothing_to_learn_is_refused_unless_asked_for(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(name, [("fine", [])] * 2, tmp_path)
    if name in CAPTIONED:  # captions alone are a set of their own
        assert build(name, tmp_path) == 0
        return
    assert build(name, tmp_path) == 2
    assert "none of" in capsys.readouterr().err
    assert build(name, tmp_path, "--allow-no-regions") == 0
    assert len(load_records(tmp_path / "out")) == 2


# what a declared rule leaves out


def test_crowds_and_images_not_asked_for(tmp_path: Path) -> None:
    write_images(painted_records(), tmp_path)
    write_coco_files(painted_records(), tmp_path)
    table = json.loads((tmp_path / "instances.json").read_text())
    for row in table["annotations"][:4]:
        row["iscrowd"] = 1
    (tmp_path / "instances.json").write_text(json.dumps(table))
    paths = tmp_path / "instances.json", tmp_path / "images"
    log = DropLog()
    list(read_coco(*paths, captions=tmp_path / "captions.json", ids={"2", "3"}, drop_log=log))
    assert log.counts == {}
    assert [total(log, kind) for kind in ("record", "region", "caption")] == [4, 10, 4]
    assert log.set_aside == {
        "record": {"not_asked": 2},
        "region": {"not_asked": 5, "crowd": 3},
        "caption": {"not_asked": 2},
    }
    log = DropLog()
    list(read_coco(*paths, keep_crowd=True, drop_log=log))
    assert log.delivered["region"] == 10 and not log.set_aside


def test_refs_of_other_splits(tmp_path: Path) -> None:
    import pickle

    write_images(painted_records(), tmp_path)
    write_refer_files(painted_records(), tmp_path)
    path = tmp_path / "refs(unc).p"
    refs = pickle.loads(path.read_bytes())
    for ref in refs[:3]:
        ref["split"] = "train"
    path.write_bytes(pickle.dumps(refs, protocol=2))
    log = DropLog()
    paths = path, tmp_path / "instances.json", tmp_path / "images"
    list(read_refer(*paths, split="val", drop_log=log))
    assert (log.delivered["region"], log.counts) == (7, {})
    assert log.set_aside == {"region": {"other_split": 3}, "expression": {"other_split": 6}}


def test_places_that_were_not_annotated(tmp_path: Path) -> None:
    write_images(painted_records()[:1], tmp_path)
    things = [{"tag": tag, "fbox": [2, 3, 20, 10]} for tag in ("person", "mask", "mask")]
    write_lines(tmp_path / "rows.jsonl", [{"ID": "1", "gtboxes": things}])
    for keep_ignored, expected in ((False, (1, {"region": {"ignored": 2}})), (True, (3, {}))):
        log = DropLog()
        paths = tmp_path / "rows.jsonl", tmp_path / "images"
        list(read_odgt(*paths, keep_ignored=keep_ignored, drop_log=log))
        assert (log.delivered["region"], log.set_aside) == expected


def test_set_aside_is_no_loss_and_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("coco", [("fine", [(GOOD, "the cat")] * 4)], tmp_path)
    table = json.loads((tmp_path / "instances.json").read_text())
    for row in table["annotations"][1:]:
        row["iscrowd"] = 1
    (tmp_path / "instances.json").write_text(json.dumps(table))
    assert build("coco", tmp_path, "--max_drop_share", "0") == 0
    said = "3 regions, crowd: boxes around a crowd"
    assert said in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "out")
    assert manifest["set_aside"] == {"region": {"crowd": 3}}
    assert manifest["delivered"]["region"] == 1
    for command in ("validate", "stats"):
        assert cli.main(["data", command, str(tmp_path / "out")]) == 0
        assert said in capsys.readouterr().out


def test_all_formats_are_tried() -> None:
    embedded = {"grit_tar", "grit_parquet", "flickr30k_entities", "hf_disk"}
    assert {form.name for form in FORMATS} - embedded == COMMANDS.keys()
