"""Files as people really export them: every format with every oddity, one table per question.

Pictures have painted boxes. Each case writes a format's files, makes them odd, reads them, and
finds every box on its colour.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cloc_mllm.data.readers.boxes import OTHER_SHAPE, RESIZED, TURNED
from cloc_mllm.data.readers.names import CASE, DEEPER, SPELLING, SUFFIX, TAIL
from cloc_mllm.data.readers.photos import UNNAMED_IMAGES, ReadOptions
from cloc_mllm.data.records import DropLog, Record
from tests.data.formats import BY_NAME, FORMATS, Format, painted_records, write_images
from tests.data.test_round_trips import (
    STATE_A_SIZE,
    assert_boxes_lie_on_their_colors,
    before_turn,
)
from tests.photos import encoded

ALL = [form.name for form in FORMATS]
EMBEDDED = ["grit_tar", "grit_parquet", "hf_disk"]  # their images come with the rows
# their annotations name image files; the others go by ids
NAME_FILES = [
    *("coco", "refer", "mdetr", "shikra_referring", "qwen_vl_lines", "qwen_vl_conversations"),
    *("odvg_detection", "odvg_grounding", "llava_padded", "llava_original", "ferret"),
    *("ms_swift_real", "ms_swift_norm1", "ms_swift_norm1000"),
    *("cvat", "label_studio", "label_studio_min", "via_project", "via_json", "via_csv"),
    *("labelme", "hf_rows", "csv"),
]
FILE_BASED = [name for name in ALL if name not in EMBEDDED]
NO_JSON = ["yolo", "pascal_voc", "flickr30k_entities", "cvat", "via_csv", "open_images", "csv"]
JSON_BASED = [name for name in FILE_BASED if name not in NO_JSON]


def annotation_files(form: Format, folder: Path) -> Iterable[Path]:
    return (path for pattern in form.files for path in sorted(folder.glob(pattern)))


def rewrite(form: Format, folder: Path, change: Callable[[str], str]) -> None:
    for path in annotation_files(form, folder):
        before = path.read_text(encoding="utf-8")
        path.write_text(change(before), encoding="utf-8")


def written(name: str, folder: Path, records: list[Record] | None = None) -> Format:
    form, records = BY_NAME[name], records or painted_records()
    write_images(records, folder)
    form.write(records, folder)
    return form


def read_all(form: Format, folder: Path, **options: Any) -> tuple[list[Record], DropLog]:
    """Reads the files and finds all ten boxes where they are painted."""
    log = DropLog()
    more = {"options": ReadOptions(**options)} if options else {}
    records = list(form.read(folder, log, **more))
    assert log.counts == {}
    assert log.set_aside == {}
    assert sum(len(record.regions) for record in records) == 10
    assert_boxes_lie_on_their_colors(records)
    return records, log


# names: how a name is written, and what is said of it


NAMES: dict[str, tuple[Callable[[str], str], str]] = {
    "dot": (lambda name: f"./{name}", SPELLING),
    "leading_slash": (lambda name: f"/{name}", SPELLING),
    "folder_itself": (lambda name: f"images/{name}", SPELLING),
    "backslash": (lambda name: f"images\\{name}", SPELLING),
    "drive": (lambda name: f"C:\\{name}", SPELLING),
    "file_address": (lambda name: f"file:///{name}", SPELLING),
    "quoted": (lambda name: name.replace(".", "%2E"), SPELLING),
    "label_studio": (lambda name: f"/data/local-files/?d=images/{name}", SPELLING),
    "label_studio_upload": (lambda name: f"/data/upload/7/0a1b2c3d-{name}", TAIL),
    "absolute": (lambda name: f"/home/someone/else/{name}", TAIL),
    "windows": (lambda name: f"D:\\export\\job 1\\{name}", TAIL),
    "web_address": (lambda name: f"https://host/x/{name}?token=1", TAIL),
    "letter_case": (lambda name: name.upper(), CASE),
    "other_suffix": (lambda name: name.replace(".png", ".jpg"), SUFFIX),
    "no_suffix": (lambda name: name.replace(".png", ""), ""),
}


@pytest.mark.parametrize("oddity", NAMES)
@pytest.mark.parametrize("name", NAME_FILES)
def test_file_names(name: str, oddity: str, tmp_path: Path) -> None:
    form = written(name, tmp_path)
    change, remark = NAMES[oddity]
    rewrite(
        form,
        tmp_path,
        lambda text: re.sub(r"\d\.png", lambda m: json.dumps(change(m[0]))[1:-1], text),
    )
    records, log = read_all(form, tmp_path)
    assert len({record.id for record in records}) == 4
    assert dict(log.notes) == ({remark: 4} if remark else {})


@pytest.mark.parametrize("name", NAME_FILES)
@pytest.mark.parametrize("place", ["deeper", "same_names", "both"])
def test_folders(name: str, place: str, tmp_path: Path) -> None:
    """Images in folders below; in two folders under equal names; or a name at the top, too."""
    form = written(name, tmp_path)
    images = tmp_path / "images"
    first, second = images / "1.png", images / "2.png"
    if place == "deeper":
        (images / "x").mkdir()
        first.rename(images / "x" / "1.png")
        _, log = read_all(form, tmp_path)
        assert log.notes[DEEPER] == 1
        return
    (images / "night").mkdir()
    second.rename(images / "night" / "1.png")
    if place == "same_names":
        (images / "day").mkdir()
        first.rename(images / "day" / "1.png")
        rewrite(form, tmp_path, lambda text: text.replace("1.png", "day/1.png"))
    rewrite(form, tmp_path, lambda text: text.replace("2.png", "night/1.png"))
    records, _ = read_all(form, tmp_path)
    assert len({record.id for record in records}) == 4
    assert len({record.image for record in records}) == 4


@pytest.mark.parametrize("name", NAME_FILES)
def test_two_names_never_share_a_photo(name: str, tmp_path: Path) -> None:
    form = written(name, tmp_path)
    (tmp_path / "images" / "2.png").unlink()
    rewrite(
        form,
        tmp_path,
        lambda text: text.replace("1.png", "set_a/1.png").replace("2.png", "set_b/1.png"),
    )
    log = DropLog()
    records = list(form.read(tmp_path, log))
    assert_boxes_lie_on_their_colors(records)
    assert len(records) == 2
    assert log.counts["record"] == {"ambiguous_image": 2}
    assert "set_a/1.png" in log.drops[0].found and "set_b/1.png" in log.drops[0].found


@pytest.mark.parametrize("name", FILE_BASED)
@pytest.mark.parametrize("oddity", ["suffix_in_upper_case", "folder_below", "zip"])
def test_image_files(name: str, oddity: str, tmp_path: Path) -> None:
    """Whether annotations name files or ids."""
    form = written(name, tmp_path)
    images = tmp_path / "images"
    for path in sorted(images.iterdir()):
        if oddity == "suffix_in_upper_case":
            path.rename(path.with_suffix(".PNG"))
        elif oddity == "folder_below":
            (images / "part_1").mkdir(exist_ok=True)
            path.rename(images / "part_1" / path.name)
    if oddity == "folder_below" and name == "yolo":
        (tmp_path / "labels" / "part_1").mkdir()
        for path in sorted((tmp_path / "labels").glob("*.txt")):
            path.rename(tmp_path / "labels" / "part_1" / path.name)
    if oddity == "zip":
        import zipfile

        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            for path in sorted(images.iterdir()):
                archive.write(path, f"any/folder/{path.name}")
        for path in images.iterdir():
            path.unlink()
        images.rmdir()
        (tmp_path / "images.zip").rename(images)
        if name == "yolo":  # labels go by the image's path
            pytest.skip("labels of another folder are not taken")
    read_all(form, tmp_path)


@pytest.mark.parametrize("name", FILE_BASED)
def test_missing_and_unnamed_images_are_told(name: str, tmp_path: Path) -> None:
    form = written(name, tmp_path)
    (tmp_path / "images" / "2.png").rename(tmp_path / "images" / "unheard_of.png")
    log = DropLog()
    records = list(form.read(tmp_path, log))
    if name == "yolo":  # goes by its images
        assert len(records) == 4
        assert log.counts == {"region": {"unknown_image": 2}}
        assert log.examples["images without a label file"] == ["unheard_of.png"]
        return
    assert len(records) == 3
    assert log.counts["record"] == {"missing_image": 1}
    assert log.counts["region"] == {"missing_image": 2}
    assert log.examples[UNNAMED_IMAGES] == ["unheard_of.png"]
    drop = next(drop for drop in log.drops if drop.kind == "record")
    assert drop.found.startswith("2") and drop.found.endswith("image files, such as 1.png")


# ids


IDS: dict[str, Callable[[int], Any]] = {
    "texts": str,
    "floats": float,
    "float_texts": lambda number: f"{number}.0",
    "padded_with_spaces": lambda number: f" {number} ",
}


@pytest.mark.parametrize("spelling", IDS)
@pytest.mark.parametrize("where", ["images", "annotations"])
@pytest.mark.parametrize("name", ["coco", "refer", "mdetr"])
def test_ids_of_images(name: str, where: str, spelling: str, tmp_path: Path) -> None:
    form = written(name, tmp_path)
    path = tmp_path / form.files[0]
    table = json.loads(path.read_text())
    key = "id" if where == "images" else "image_id"
    for row in table[where]:
        row[key] = IDS[spelling](row[key])
    path.write_text(json.dumps(table))
    records, _ = read_all(form, tmp_path)
    assert [record.id for record in records] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("spelling", IDS)
@pytest.mark.parametrize("where", ["categories", "annotations"])
@pytest.mark.parametrize("name", ["coco", "refer"])
def test_ids_of_categories(name: str, where: str, spelling: str, tmp_path: Path) -> None:
    form = written(name, tmp_path)
    path = tmp_path / form.files[0]
    table = json.loads(path.read_text())
    key = "id" if where == "categories" else "category_id"
    for row in table[where]:
        row[key] = IDS[spelling](row[key])
    path.write_text(json.dumps(table))
    records, _ = read_all(form, tmp_path)
    assert all(region.category for record in records for region in record.regions)


@pytest.mark.parametrize("spelling", IDS)
@pytest.mark.parametrize("name", ["visual_genome_regions", "visual_genome_objects"])
def test_ids_of_visual_genome(name: str, spelling: str, tmp_path: Path) -> None:
    form = written(name, tmp_path)
    table = json.loads((tmp_path / "vg.json").read_text())
    for row in table:
        key = "id" if "id" in row else "image_id"
        row[key] = IDS[spelling](row[key])
    (tmp_path / "vg.json").write_text(json.dumps(table))
    records, _ = read_all(form, tmp_path)
    assert [record.id for record in records] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("name", ["coco", "refer", "mdetr"])
def test_one_id_of_two_files_is_refused(name: str, tmp_path: Path) -> None:
    form = written(name, tmp_path)
    path = tmp_path / form.files[0]
    table = json.loads(path.read_text())
    first, last = table["images"][0], table["images"][-1]
    last["id"] = float(first["id"])
    path.write_text(json.dumps(table))
    expected = rf"id {first['id']} has {first['file_name']} and {last['file_name']}"
    with pytest.raises(ValueError, match=expected):
        list(form.read(tmp_path, DropLog()))


# numbers


NUMBERS: dict[str, Callable[[float], Any]] = {
    "texts": str,
    "exponents": lambda value: f"{value:e}",
    "without_zero": lambda value: str(value).removeprefix("0"),
    "full_width": lambda value: str(value).translate(
        {ord("0") + digit: 0xFF10 + digit for digit in range(10)} | {ord("."): "．"}
    ),
    "with_spaces": lambda value: f" {value}\n",
}
BOX_KEYS = ("bbox", "box", "fbox", "boxes", "box_x1y1x2y2", "noun_chunks", "ref_exps")
BOX_KEYS += ("points", "all_points_x", "all_points_y", "cx", "cy", "rx", "ry", "r", "rotation")


def respelled(value: Any, spell: Callable[[float], Any], inside: bool = False) -> Any:
    """The numbers of boxes, written otherwise."""
    if isinstance(value, dict):
        is_vg = {"x", "y"} <= value.keys()
        return {
            key: respelled(item, spell, inside or key in BOX_KEYS or (is_vg and key in "xywh"))
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [respelled(item, spell, inside) for item in value]
    return spell(value) if inside and isinstance(value, float) else value


@pytest.mark.parametrize("oddity", NUMBERS)
@pytest.mark.parametrize(
    "name",
    [n for n in JSON_BASED if not n.startswith(("llava", "qwen_vl_conversations", "labelme"))],
)
def test_numbers_of_boxes(name: str, oddity: str, tmp_path: Path) -> None:
    form = written(name, tmp_path)
    path = tmp_path / form.files[0]
    is_lines = path.suffix == ".jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    texts = [json.dumps(respelled(row, NUMBERS[oddity])) for row in rows]
    assert is_lines or len(texts) == 1
    path.write_text("\n".join(texts))
    read_all(form, tmp_path)


# sizes and frames


SIZES: dict[str, Any] = {
    "missing": None,
    "null": "null",
    "zero": "0",
    "negative": "-5",
    "no_number": '"wide"',
    "text": lambda size: f'"{size}"',
    "float": lambda size: f"{size}.0",
}


SIZE_KEYS = dict.fromkeys(["label_studio", "label_studio_min"], "original_width|original_height")
SIZE_KEYS["labelme"] = "imageWidth|imageHeight"


@pytest.mark.parametrize("oddity", SIZES)
@pytest.mark.parametrize("name", [name for name in STATE_A_SIZE if name not in EMBEDDED])
def test_stated_sizes(name: str, oddity: str, tmp_path: Path) -> None:
    form = written(name, tmp_path)
    change = SIZES[oddity]
    keys = SIZE_KEYS.get(name, "width|height|image_w|image_h")
    if name == "cvat":
        texts = {"missing": "", "null": r'\1=""', "no_number": r'\1="wide"', "text": r'\1=" \2 "'}
        text = texts.get(oddity, r'\1="\2.0"' if callable(change) else rf'\1="{change}"')
        pattern = r'\b(width|height)="(\d+)"'
        rewrite(form, tmp_path, lambda t: re.sub(pattern, text, t))
    elif name in ("pascal_voc", "flickr30k_entities"):
        new = {None: r"", "null": r"<\1/>", '"wide"': r"<\1>wide</\1>"}
        if callable(change):
            text = r"<\1> \2 </\1>" if oddity == "text" else r"<\1>\2.0</\1>"
        else:
            text = new.get(change, rf"<\1>{change}</\1>")
        rewrite(form, tmp_path, lambda t: re.sub(r"<(width|height)>(\d+)</\1>", text, t))
    elif oddity == "missing" and name != "refcoco":  # whose rows without a size are refused
        pattern = rf'"({keys})": \d+(, )?'
        rewrite(form, tmp_path, lambda t: re.sub(pattern, "", t).replace(", }", "}"))
    elif oddity == "missing":
        pytest.skip("rows of RefCOCO state a size")
    else:
        rewrite(
            form,
            tmp_path,
            lambda t: re.sub(
                rf'"({keys})": (\d+)',
                lambda m: f'"{m[1]}": {change(m[2]) if callable(change) else change}',
                t,
            ),
        )
    _, log = read_all(form, tmp_path)
    assert not {RESIZED, OTHER_SHAPE, TURNED} & log.notes.keys()


@pytest.mark.parametrize("name", STATE_A_SIZE)
@pytest.mark.parametrize(
    ("scale", "remark"), [((2, 2), RESIZED), ((0.5, 0.5), RESIZED), ((2, 3), OTHER_SHAPE)]
)
def test_resized_copies(name: str, scale: tuple[float, float], remark: str, tmp_path: Path) -> None:
    painted = painted_records()
    annotated = [
        replace(r, width=round(r.width * scale[0]), height=round(r.height * scale[1]))
        for r in painted
    ]
    write_images(painted, tmp_path)
    form = BY_NAME[name]
    form.write(annotated, tmp_path)
    _, log = read_all(form, tmp_path)
    assert log.notes[remark] == 4


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("name", ALL)
def test_boxes_of_the_stored_picture(name: str, orientation: int, tmp_path: Path) -> None:
    """Said by the user, as numbers cannot tell it for shares, half turns and squares."""
    photos = [
        replace(record, image=encoded(record.load_image(), orientation=orientation))
        for record in painted_records()
    ]
    write_images(photos, tmp_path)
    form = BY_NAME[name]
    form.write([before_turn(photo, orientation) for photo in photos], tmp_path)
    read_all(form, tmp_path, boxes_of="stored")


# texts


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", FILE_BASED)
def test_byte_order_marks(name: str, encoding: str, tmp_path: Path) -> None:
    form = written(name, tmp_path)
    for path in annotation_files(form, tmp_path):
        path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    read_all(form, tmp_path)


@pytest.mark.parametrize("encoding", ["cp1252", "gbk"])
@pytest.mark.parametrize("name", FILE_BASED)
def test_other_encodings(name: str, encoding: str, tmp_path: Path) -> None:
    """Named, they are read; not named, nothing is read and the message says what to do."""
    word = {"cp1252": "bôx", "gbk": "盒子"}[encoding]
    form = written(name, tmp_path)
    rewrite(
        form, tmp_path, lambda text: re.sub(r"(red|green|blue|yellow) box", rf"\1 {word}", text)
    )
    for path in annotation_files(form, tmp_path):
        path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    log = DropLog()
    try:
        list(form.read(tmp_path, log))
        said = " ".join(drop.found for drop in log.drops)
        assert log.delivered["record"] == 0
    except ValueError as error:
        said = str(error)
    assert re.search(r"line \d+, byte [\d,]+ \(0x..\): .*--encoding", said)

    log = DropLog()
    records = list(form.read(tmp_path, log, options=ReadOptions(encoding=encoding)))
    assert log.counts == {}
    texts = [r.phrase + r.category for record in records for r in record.regions]
    assert len(texts) == 10
    assert sum(word in text for text in texts) == 10


# images


IMAGE_FILES = {
    "bmp": ("BMP", ".bmp"),
    "tiff": ("TIFF", ".TIF"),
    "gif": ("GIF", ".gif"),
    "ppm": ("PPM", ".ppm"),
    "bmp_named_png": ("BMP", ".png"),
}


@pytest.mark.parametrize("kind", IMAGE_FILES)
@pytest.mark.parametrize("name", FILE_BASED)
def test_images_of_other_formats(name: str, kind: str, tmp_path: Path) -> None:
    form = written(name, tmp_path)
    image_format, suffix = IMAGE_FILES[kind]
    for record in painted_records():
        path = tmp_path / "images" / f"{record.id}.png"
        path.unlink()
        path.with_suffix(suffix).write_bytes(encoded(record.load_image(), image_format))
    records, log = read_all(form, tmp_path)
    assert all(record.image.startswith(b"\x89PNG") for record in records)
    assert log.notes[f"{image_format} images converted to PNG"] == 4
