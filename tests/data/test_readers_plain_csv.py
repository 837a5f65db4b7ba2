"""Tables of any tool, by a mapping of their columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cloc_mllm import cli
from cloc_mllm.data.readers.plain_csv import read_csv
from cloc_mllm.data.records import DropLog, Record

BOX = pytest.approx((0.1, 0.2, 0.3, 0.6))


def read(
    folder: Path, text: str, name: str = "t.csv", **options: Any
) -> tuple[list[Record], DropLog]:
    for image in ("a.png", "b.png"):
        Image.new("RGB", (200, 100), "green").save(folder / image)
    (folder / name).write_text(text)
    log = DropLog()
    options = {"frame": "pixels", **options}
    return list(read_csv(folder / name, folder, drop_log=log, **options)), log


TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("image,x1,y1,x2,y2,phrase\na.png,20,20,60,60,cat\n", {}),
    "with_spaces": ("image, x1, y1, x2, y2, phrase\na.png, 20, 20, 60, 60, cat\n", {}),
    "semicolons": (
        "image;x1;y1;x2;y2;phrase\na.png;20;20;60;60;cat\n",
        {"delimiter": ";"},
    ),
    "decimal_commas": ("image;x1;y1;x2;y2;phrase\na.png;20,0;20,00;60,0;60;cat\n", {}),
    "no_header": ("a.png,20,20,60,60,cat\n", {"header": False}),
    "no_header_mapped": (
        "7,cat,20,20,60,60,a.png\n",
        {
            "header": False,
            "columns": {"image": "7", "phrase": "2", "x1": "3", "y1": "4", "x2": "5", "y2": "6"},
        },
    ),
    "other_names": (
        "filename,width,height,class,xmin,ymin,xmax,ymax\na.png,200,100,cat,20,20,60,60\n",
        {
            "columns": {"image": "filename", "category": "class"}
            | {"x1": "xmin", "y1": "ymin", "x2": "xmax", "y2": "ymax"},
        },
    ),
    "xywh": ("image,x,y,w,h,phrase\na.png,20,20,40,40,cat\n", {"box_order": "xywh"}),
    "centre": ("image,cx,cy,w,h,phrase\na.png,40,40,40,40,cat\n", {"box_order": "cxcywh"}),
    "y_first_thousandths": (
        "image,x1,y1,x2,y2,phrase\na.png,100,200,300,600,cat\n",
        {"box_order": "yxyx", "frame": "thousandths"},
    ),
    "normalized": (
        "image,x1,y1,x2,y2,phrase\na.png,0.1,0.2,0.3,0.6,cat\n",
        {"frame": "normalized"},
    ),
    "percent": (
        "image,x1,y1,x2,y2,phrase\na.png,10,20,30,60,cat\n",
        {"frame": "hundredths"},
    ),
    "box_in_one_cell": (
        'image,box,phrase\na.png,"[20, 20, 40, 40]",cat\n',  # as the wheat challenge wrote it
        {"box_order": "xywh"},
    ),
    "box_by_spaces": ("image,box,phrase\na.png,20 20 60 60,cat\n", {}),
    "pixels_of_a_stated_size": (
        "image,x1,y1,x2,y2,phrase,image_width,image_height\na.png,10,10,30,30,cat,100,50\n",
        {},
    ),
}


@pytest.mark.parametrize("table", TABLES)
def test_layouts(table: str, tmp_path: Path) -> None:
    text, options = TABLES[table]
    (record,), log = read(tmp_path, text, **options)
    assert record.id == "a"
    assert [(region.phrase, region.box) for region in record.regions] == [("cat", BOX)]
    assert log.counts == {}


def test_json_rows_and_tabs(tmp_path: Path) -> None:
    row = {"file": "a.png", "bbox": [20, 20, 60, 60], "label": "cat"}
    columns = {"image": "file", "box": "bbox", "phrase": "label"}
    for name, text in (("t.json", json.dumps([row])), ("t.jsonl", json.dumps(row))):
        (record,), _ = read(tmp_path, text, name, columns=columns)
        assert record.regions[0].box == BOX
    (record,), _ = read(
        tmp_path, "image\tx1\ty1\tx2\ty2\tphrase\na.png\t20\t20\t60\t60\tcat\n", "t.tsv"
    )
    assert record.regions[0].box == BOX
    (record,), _ = read(tmp_path, TABLES["plain"][0], "t.txt")
    assert record.regions[0].box == BOX


def test_expressions_of_one_box_are_one_region(tmp_path: Path) -> None:
    text = "image,x1,y1,x2,y2,category,expression,caption,score\n"
    text += "a.png,20,20,60,60,cat,the left cat,A cat.,0.5\n"
    text += "a.png,20,20,60,60,cat,a sleeping cat,A cat.,0.5\n"
    text += "a.png,70,20,90,60,,the dog,A cat.,\n"
    (record,), _ = read(tmp_path, text)
    found = [(r.phrase, r.category, r.expressions, r.score) for r in record.regions]
    assert found == [
        ("cat", "cat", ["the left cat", "a sleeping cat"], 0.5),
        ("the dog", "", ["the dog"], 1.0),
    ]
    assert record.captions == ["A cat."]


def test_several_phrases_of_one_box_are_several_regions(tmp_path: Path) -> None:
    text = "image,x1,y1,x2,y2,phrase\na.png,20,20,60,60,cat\na.png,20,20,60,60,pet\n"
    (record,), _ = read(tmp_path, text)
    assert [(region.phrase, region.box) for region in record.regions] == [
        ("cat", BOX),
        ("pet", BOX),
    ]


def test_what_cannot_be_used(tmp_path: Path) -> None:
    text = "image,x1,y1,x2,y2,phrase\na.png,20,20,x,60,cat\n,20,20,60,60,cat\n"
    text += "a.png,20,20,60,60,\nb.png,,,,,\nc.png,20,20,60,60,cat\na.png,20,20\n"
    text += "a.png,20,20,60,60,a cat, asleep\n"
    records, log = read(tmp_path, text)
    assert [(record.id, len(record.regions)) for record in records] == [("a", 0), ("b", 0)]
    assert log.counts == {
        "record": {"missing_image": 1},
        "region": {"bad_row": 2, "not_finite": 2, "empty_text": 1, "missing_image": 1},
    }


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("file,x1,y1,x2,y2,phrase\na.png,1,2,3,4,c\n", {}, r"columns image, there are file, x1"),
        ("image,x1,y1,x2,y2\na.png,1,2,3,4\n", {}, "columns phrase, there are"),
        ("image|x1\na|1\n", {}, r"there are image\|x1; .*--delimiter"),
        (
            "image,x1,y1,x2,y2,phrase\na.png,1,2,3,4,c\n",
            {"box_order": "xywh"},
            "columns x, y, w, h",
        ),
        ("image,box,phrase\na,1,c\n", {"columns": {"phrase": "label"}}, "columns label"),
        (
            "image,box,phrase\na,1,c\n",
            {"columns": {"name": "label"}},
            "--columns names name; ",
        ),
    ],
)
def test_missing_columns_are_named(text: str, options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text, **options)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read(tmp_path, TABLES["plain"][0])
    (tmp_path / "t.csv").write_text("file|xmin|y1|x2|y2|phrase\na.png|20|20|60|60|cat\n")
    command = ["data", "build", "csv", "--rows", str(tmp_path / "t.csv"), "--images", str(tmp_path)]
    command += ["--out", str(tmp_path / "out"), "--delimiter", "|"]
    mapped = ["--columns", "image=file, x1=xmin"]
    assert cli.main([*command, *mapped, "--frame", "pixels"]) == 0
    with pytest.raises(SystemExit):
        cli.main([*command, *mapped])
    assert "--frame" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*command, "--columns", "image", "--frame", "pixels"])
    assert "expected ROLE=COLUMN" in capsys.readouterr().err
