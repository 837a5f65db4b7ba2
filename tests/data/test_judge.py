"""`data doctor` and `data build auto` name format and frame, and ask where two readings fit."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from cloc_mllm.cli import main
from cloc_mllm.data.checks.judge import judge, the_one, unknown_layout
from cloc_mllm.data.parquet import load_records, read_manifest
from cloc_mllm.data.records import DropLog, Record
from tests.data.formats import (
    BY_NAME,
    FORMATS,
    Format,
    painted_records,
    write_images,
    write_lines,
)
from tests.data.test_round_trips import assert_equal_records
from tests.photos import encoded

FRAMES = {
    "coco": ("pixels", "xywh"),
    "refcoco": ("pixels", "xywh"),
    "refer": ("pixels", "xywh"),
    "mdetr": ("pixels", "xywh"),
    "shikra_referring": ("pixels", "xyxy"),
    "shikra_captions": ("pixels", "xyxy"),
    "qwen_vl_lines": ("pixels", "xyxy"),
    "qwen_vl_conversations": ("0..1000", "xyxy"),
    "visual_genome_regions": ("pixels", "xywh"),
    "visual_genome_objects": ("pixels", "xywh"),
    "grit_tar": ("0..1", "xyxy"),
    "grit_parquet": ("0..1", "xyxy"),
    "grit_rows": ("0..1", "xyxy"),
    "odvg_detection": ("pixels", "xyxy"),
    "odvg_grounding": ("pixels", "xyxy"),
    "odgt": ("pixels", "xywh"),
    "yolo": ("0..1", "cxcywh"),
    "pascal_voc": ("pixels", "xyxy"),
    "flickr30k_entities": ("pixels", "xyxy"),
    "llava_padded": ("0..1 padded", "xyxy"),
    "llava_original": ("0..1", "xyxy"),
    "ferret": ("pixels", "xyxy"),
    "ms_swift_real": ("pixels", "xyxy"),
    "ms_swift_norm1": ("0..1", "xyxy"),
    "ms_swift_norm1000": ("0..1000", "xyxy"),
    "cvat": ("pixels", "xyxy"),
    "label_studio": ("0..100", "xyxy"),
    "label_studio_min": ("0..100", "xyxy"),
    "labelme": ("pixels", "xyxy"),
    "via_project": ("pixels", "xyxy"),
    "via_json": ("pixels", "xyxy"),
    "via_csv": ("pixels", "xyxy"),
    "open_images": ("0..1", "xyxy"),
    "hf_rows": ("pixels", "xywh"),
    "hf_disk": ("pixels", "xywh"),
    "csv": ("pixels", "xyxy"),
}


def many_records(num: int = 12) -> list[Record]:
    """The painted pictures again and again, with a box that reaches the far corner in most."""
    records = []
    for index in range(num):
        record = painted_records()[index % 4]
        corner = replace(record.regions[0], box=(0.55, 0.5, 1.0, 1.0), phrase="the far box")
        corner = replace(corner, expressions=["the far box"], category="far box")
        regions = [*record.regions, corner]
        caption = f"{record.captions[0]} and the far box"
        records.append(replace(record, id=str(index + 1), regions=regions, captions=[caption]))
    return records


def laid_out(form: Format, records: list[Record], folder: Path) -> None:
    form.write(records, folder)
    if form.name not in ("grit_tar", "grit_parquet", "hf_disk"):  # which hold their images
        write_images(records, folder)
    if form.name == "refer":
        (folder / "captions.json").unlink()


def fitting(path: Path, **options: Any) -> list[tuple[str, str, str]]:
    found = [item for item in judge(path, **options) if not item.faults]
    return [(item.source, item.reading.frame, item.reading.order) for item in found]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_auto_builds_every_format(form: Format, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "a set"
    folder.mkdir()
    laid_out(form, many_records(), folder)
    found = the_one(judge(folder, kind="regions"))  # chats: see test_judge_chats
    assert found is not None, fitting(folder)
    assert form.name.replace("_", "-").startswith((found.source, "odvg", "hf-"))
    assert (found.reading.frame, found.reading.order) == FRAMES[form.name]
    assert auto(folder, tmp_path / "out", "--as", "regions") == 0
    printed = capsys.readouterr().out
    assert f"'{folder}" in printed  # the command is quoted for a shell
    expected = list(form.read(folder, DropLog()))
    actual = list(load_records(tmp_path / "out"))
    assert_equal_records(sorted(actual, key=lambda r: r.id), sorted(expected, key=lambda r: r.id))


def auto(path: Path, out: Path, *arguments: str) -> int:
    return main(["data", "build", "auto", str(path), "--output_dir", str(out), *arguments])


def packed(folder: Path, kind: str) -> Path:
    archive = Path(shutil.make_archive(str(folder), kind, folder))
    shutil.rmtree(folder)
    return archive


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("name", ["coco", "yolo", "pascal_voc", "llava_original", "odvg_detection"])
def test_auto_builds_an_archive_as_it_was_downloaded(kind: str, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    laid_out(BY_NAME[name], many_records(), folder)
    expected = list(BY_NAME[name].read(folder, DropLog()))
    assert auto(packed(folder, kind), tmp_path / "out", "--as", "regions") == 0
    actual = list(load_records(tmp_path / "out"))
    assert_equal_records(sorted(actual, key=lambda r: r.id), sorted(expected, key=lambda r: r.id))


def test_images_may_lie_elsewhere(tmp_path: Path) -> None:
    for name in ("yolo", "coco"):
        (tmp_path / name).mkdir()
        laid_out(BY_NAME[name], many_records(), tmp_path / name)
        (tmp_path / name / "images").rename(tmp_path / f"photos of {name}")
        arguments = ["--images", str(tmp_path / f"photos of {name}")]
        assert auto(tmp_path / name, tmp_path / f"out of {name}", *arguments) == 0
        assert len(load_records(tmp_path / f"out of {name}")) == 12


# where two readings fit


def llava_of(records: list[Record], folder: Path, scale: tuple[float, float] | None) -> None:
    """LLaVA rows of the image itself, in 0..1 (None) or in parts of a width and a height."""
    write_images(records, folder)
    rows = []
    for record in records:
        sides = scale or (1, 1)
        if scale == (0, 0):
            sides = (record.width, record.height)
        for region in record.regions:
            box = [round(v * side, 4) for v, side in zip(region.box, sides * 2, strict=True)]
            turns = [f"<image>\nDescribe the region: {box}", region.phrase]
            talk = [
                {"from": who, "value": t} for who, t in zip(("human", "gpt"), turns, strict=True)
            ]
            rows.append({"id": record.id, "image": f"{record.id}.png", "conversations": talk})
    (folder / "rows.json").write_text(json.dumps(rows))


def central_records() -> list[Record]:
    """Boxes that reach no border: read as padded and as they are, all lie in their images."""
    middle = [
        replace(record.regions[0], box=(0.42, 0.42, 0.5, 0.55), expressions=[])
        for record in painted_records()
    ]
    records = painted_records()[:3] * 8
    return [
        replace(record, id=str(number), regions=[middle[number % 3]])
        for number, record in enumerate(records)
    ]


def test_padded_or_not_is_asked_where_both_fit(tmp_path: Path, capsys: Any) -> None:
    llava_of(central_records(), tmp_path, None)
    assert [frame for _, frame, _ in fitting(tmp_path)] == ["0..1 padded", "0..1"]
    assert main(["data", "doctor", str(tmp_path / "rows.json")]) == 1
    capsys.readouterr()
    assert auto(tmp_path / "rows.json", tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert "--frame padded" in printed.out and "--frame original" in printed.out
    assert "0..1 padded, xyxy: 100.0% of 24 boxes lie in their images" in printed.out
    assert "0..1, xyxy: 100.0% of 24 boxes lie in their images" in printed.out
    assert "2 readings fit" in printed.err
    assert not (tmp_path / "out").exists()


def test_parts_of_a_set_are_to_be_joined(tmp_path: Path, capsys: Any) -> None:
    for part in ("train", "valid"):
        (tmp_path / part).mkdir()
        laid_out(BY_NAME["coco"], many_records(), tmp_path / part)
    assert auto(tmp_path, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "2 readings fit, each of other files" in said and "data merge" in said


def test_yolo_of_a_turned_photo_is_asked(tmp_path: Path, capsys: Any) -> None:
    """Nothing of a YOLO file tells whether its tool had turned the photo."""
    laid_out(BY_NAME["yolo"], many_records(), tmp_path)
    photo = Image.open(tmp_path / "images" / "1.png").convert("RGB")
    (tmp_path / "images" / "1.png").write_bytes(encoded(photo, orientation=6))
    assert auto(tmp_path, tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert "--boxes_of upright" in printed.out and "--boxes_of stored" in printed.out
    assert auto(tmp_path, tmp_path / "out", "--boxes_of", "stored") == 0
    assert read_manifest(tmp_path / "out")["arguments"]["boxes_of"] == "stored"


def test_two_sets_in_a_folder_are_asked(tmp_path: Path, capsys: Any) -> None:
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        laid_out(BY_NAME["coco"], many_records(), tmp_path / split)
    assert auto(tmp_path, tmp_path / "out") == 2
    printed = capsys.readouterr().out
    for split in ("train", "valid"):
        command = f"--instances {tmp_path}/{split}/instances.json"
        assert command in printed and f"--images {tmp_path}/{split}/images" in printed


def test_whether_folders_are_classes_is_asked(tmp_path: Path, capsys: Any) -> None:
    for name in ("2021", "2022"):
        write_images(painted_records(), tmp_path / name)
    assert auto(tmp_path, tmp_path / "out") == 2
    assert "whether the folders are classes" in capsys.readouterr().out


def test_which_attribute_names_a_region_is_asked(tmp_path: Path, capsys: Any) -> None:
    laid_out(BY_NAME["via_json"], many_records(), tmp_path)
    table = json.loads((tmp_path / "via.json").read_text())
    for image in table.values():
        for region in image["regions"]:
            region["region_attributes"]["quality"] = "good"
    (tmp_path / "via.json").write_text(json.dumps(table))
    assert auto(tmp_path, tmp_path / "out") == 2
    assert "--phrase_attribute quality" in capsys.readouterr().out


def test_few_turned_photos_among_many_tell_their_turn(tmp_path: Path) -> None:
    """No size is stated; the boxes of one photo lie outside its upright picture."""
    laid_out(BY_NAME["visual_genome_objects"], many_records(60), tmp_path)
    rows = json.loads((tmp_path / "vg.json").read_text())
    (tmp_path / "images" / "99.png").write_bytes(
        encoded(Image.new("RGB", (200, 100), "white"), orientation=6)
    )
    box = {"x": 20, "y": 110, "w": 79, "h": 89, "names": ["a door"]}
    rows.append({"image_id": 99, "objects": [box]})
    (tmp_path / "vg.json").write_text(json.dumps(rows))
    found = the_one(judge(tmp_path))
    assert found is not None and found.options["boxes_of"] == "stored"


# what the numbers say against the layout


@pytest.mark.parametrize(
    ("scale", "frame", "option"),
    [
        ((0, 0), "pixels", "pixels"),
        ((1000, 1000), "0..1000", "thousandths"),
        (None, "0..1", "original"),
    ],
)
def test_frames_of_conversations(
    scale: tuple[float, float] | None, frame: str, option: str, tmp_path: Path
) -> None:
    records = many_records(24)
    llava_of(records, tmp_path, scale)
    found = the_one(judge(tmp_path))
    assert found is not None and found.reading.frame == frame
    assert found.options["frame"] == option
    assert auto(tmp_path, tmp_path / "out", "--as", "regions") == 0
    boxes = {r.id: [region.box for region in r.regions] for r in load_records(tmp_path / "out")}
    for record in records:
        expected = np.array([region.box for region in record.regions])
        assert np.array(boxes[record.id]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("rewrite", "said"),
    [
        (lambda x, y, w, h, across, down: [x, y, x + w, y + h], "pixels, xyxy"),
        (
            lambda x, y, w, h, across, down: [x / across, y / down, w / across, h / down],
            "0..1, xywh",
        ),
        (
            lambda x, y, w, h, across, down: [
                v / side * 1000 for v, side in zip((x, y, w, h), (across, down) * 2, strict=True)
            ],
            "0..1000, xywh",
        ),
        (lambda x, y, w, h, across, down: [x + w / 2, y + h / 2, w, h], "pixels, cxcywh"),
    ],
    ids=["corners", "shares", "thousandths", "centre"],
)
def test_coco_with_other_numbers_is_not_built(
    rewrite: Any, said: str, tmp_path: Path, capsys: Any
) -> None:
    laid_out(BY_NAME["coco"], many_records(24), tmp_path)
    table = json.loads((tmp_path / "instances.json").read_text())
    sizes = {image["id"]: (image["width"], image["height"]) for image in table["images"]}
    for row in table["annotations"]:
        row["bbox"] = rewrite(*row["bbox"], *sizes[row["image_id"]])
    (tmp_path / "instances.json").write_text(json.dumps(table))
    assert auto(tmp_path, tmp_path / "out") == 2
    assert f"as {said}: 100.0%" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_photos_that_were_turned_or_resized_are_found(tmp_path: Path, capsys: Any) -> None:
    laid_out(BY_NAME["coco"], many_records(), tmp_path)
    for number, change in ((1, "turned"), (2, "resized"), (3, "squashed")):
        path = tmp_path / "images" / f"{number}.png"
        photo = Image.open(path).convert("RGB")
        if change == "turned":  # stored as it was annotated, and tagged to be shown turned
            exif = Image.Exif()
            exif[0x0112] = 6
            photo.save(path, exif=exif)
        else:
            size = (photo.width // 2, photo.height // 2) if change == "resized" else (64, 64)
            photo.resize(size).save(path)
    assert main(["data", "doctor", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "1 photos whose stated size is that before their EXIF turn" in printed
    assert "1 photos that were resized after annotation" in printed
    assert "1 photos of another shape than stated" in printed


def test_boxes_tell_the_turn_where_no_size_is_stated(tmp_path: Path) -> None:
    """Pixels of a wide photo stored tall lie outside its upright picture."""
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(24):
        photo = Image.new("RGB", (200, 100), (9 * number, 90, 90))
        (tmp_path / "images" / f"{number}.png").write_bytes(encoded(photo, orientation=6))
        # the picture that was annotated is 100 wide and 200 high, as stored
        box = {"x": 20, "y": 110, "w": 79, "h": 89, "names": ["a door"]}
        rows.append({"image_id": number, "objects": [box]})
    (tmp_path / "objects.json").write_text(json.dumps(rows))
    found = the_one(judge(tmp_path))
    assert found is not None and found.options["boxes_of"] == "stored"


def test_zero_based_pixels_show(tmp_path: Path) -> None:
    laid_out(BY_NAME["pascal_voc"], many_records(), tmp_path)
    (found,) = judge(tmp_path)
    assert not found.options["zero_based"]
    path = tmp_path / "Annotations" / "1.xml"
    path.write_text(path.read_text().replace("<xmin>3", "<xmin>0", 1))
    (found,) = judge(tmp_path)
    assert found.options["zero_based"]
    assert "1 of 42 boxes start before pixel 1" in found.reading.why


# what cannot be built


def test_missing_images_are_said_before_the_build(tmp_path: Path, capsys: Any) -> None:
    laid_out(BY_NAME["coco"], many_records(), tmp_path)
    for number in range(1, 7):
        (tmp_path / "images" / f"{number}.png").unlink()
    assert auto(tmp_path, tmp_path / "out") == 2
    assert "50% of the images are missing" in capsys.readouterr().err
    assert auto(tmp_path, tmp_path / "out", "--max_drop_share", "0.6") == 0


def test_without_images_the_layout_is_named(tmp_path: Path, capsys: Any) -> None:
    laid_out(BY_NAME["coco"], many_records(), tmp_path)
    shutil.rmtree(tmp_path / "images")
    assert main(["data", "doctor", str(tmp_path / "instances.json")]) == 0
    assert "pixels, xywh, as declared" in capsys.readouterr().out
    assert auto(tmp_path / "instances.json", tmp_path / "out") == 2
    assert "none of its images was found" in capsys.readouterr().err


def test_an_unknown_layout_is_said(tmp_path: Path, capsys: Any) -> None:
    write_lines(tmp_path / "rows.jsonl", [{"question": "what?", "answer": "this"}] * 3)
    assert auto(tmp_path / "rows.jsonl", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "no source of `cloc-mllm data build` has this layout" in error
    assert "question, answer" in error
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme.md", "nothing")
    assert auto(tmp_path / "empty.zip", tmp_path / "out") == 2
    assert "cloc-mllm label" not in capsys.readouterr().err
    write_images(painted_records(), tmp_path / "photos")
    assert auto(tmp_path / "photos", tmp_path / "out") == 2
    assert "`cloc-mllm label` finds boxes" in capsys.readouterr().err
    assert auto(tmp_path / "nowhere", tmp_path / "out") == 2


def test_images_beside_the_working_directory_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    laid_out(BY_NAME["coco"], many_records(), tmp_path)
    (tmp_path / "annotations").mkdir(exist_ok=True)
    (name,) = [path for path in tmp_path.rglob("*.json") if "instances" in path.name]
    name.rename(tmp_path / "annotations" / name.name)
    monkeypatch.chdir(tmp_path / "annotations")
    found = the_one(judge(name.name))
    assert found is not None and len(found.items) == 12


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("", None, "there is no file in this folder"),
        ("a.json.gz", "x", "it is compressed, and only zip and tar are looked into; unpack it"),
        ("a.csv", "image,x1,y1,x2,y2,phrase\n", "there is no box to judge"),
        ("a.json", "", "a.json is empty"),
        ("a.xml", "<annotation/>", "of formats with a file per image name the folder"),
        (
            "a.json",
            '{"images": [{"id": 1, "file_name": "a.png"}], "annotations": [], "categories": []}',
            "coco: a.json has COCO's lists",
        ),
    ],
    ids=["folder", "gz", "csv", "json", "xml", "coco"],
)
def test_what_holds_no_box_is_said(
    name: str, content: str | None, said: str, tmp_path: Path, capsys: Any
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    assert main(["data", "doctor", str(tmp_path / name)]) in (0, 1, 2)
    printed = capsys.readouterr()
    assert said in printed.out + printed.err


def test_parquet_of_chats_is_said(tmp_path: Path) -> None:
    Dataset.from_list([{"conversations": "x"}]).to_parquet(str(tmp_path / "chats.parquet"))
    assert judge(tmp_path / "chats.parquet") == []
    assert "save other rows as JSON lines" in unknown_layout(tmp_path / "chats.parquet")


def test_labels_without_class_names_lack_them(tmp_path: Path, capsys: Any) -> None:
    laid_out(BY_NAME["yolo"], many_records(), tmp_path)
    (tmp_path / "data.yaml").unlink()
    assert auto(tmp_path, tmp_path / "out") == 2
    assert "it needs --names" in capsys.readouterr().err


def test_other_files_that_cannot_be_read_are_said(tmp_path: Path, capsys: Any) -> None:
    laid_out(BY_NAME["coco"], many_records(), tmp_path)
    (tmp_path / "broken.json").write_text("[{")
    (tmp_path / "notes.csv").write_bytes(b"name\ncaf\xe9\n")
    assert auto(tmp_path, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "broken.json is not valid JSON" in printed
    assert "notes.csv, line 2" in printed
    assert auto(tmp_path / "broken.json", tmp_path / "other") == 2


# real files


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("coco-mini", ("coco", "pixels", "xywh")),
        ("coco-mini/instances_val.json", ("coco", "pixels", "xywh")),
        ("coco-mini/captions_val.json", ("coco", "pixels", "xywh")),
        ("flickr8k-entities/annotations.zip", ("flickr30k-entities", "pixels", "xyxy")),
        ("refcoco-mini/refcoco_val.json", ("refcoco", "pixels", "xywh")),
        ("refcoco-mini/refcoco+_val.json", ("refcoco", "pixels", "xywh")),
        ("refcoco-mini/refcocog_val.json", ("refcoco", "pixels", "xywh")),
        ("formats/coco_mini_captions_val2017.json", ("coco", "pixels", "xywh")),
        ("formats/coco_mini_instances_val2017.json", ("coco", "pixels", "xywh")),
        ("formats/lvis_val_100.json", ("coco", "pixels", "xywh")),
        ("formats/visual_genome_region_graphs_4.json", ("visual-genome", "pixels", "xywh")),
        ("formats/grit_coyo_1.jsonl", ("grit", "0..1", "xyxy")),
        ("formats/ferret_bench_ground_conv_answer_8.jsonl", ("llava", "0..1", "xyxy")),
        ("formats/ferret_bench_ground_conv_context_8.jsonl", ("llava", "0..1", "xyxy")),
        ("formats/ferret_bench_refer_caption_context_8.jsonl", ("llava", "0..1", "xyxy")),
        ("formats/ferret_bench_refer_caption_question_8.jsonl", ("llava", "0..1", "xyxy")),
        ("formats/ferret_bench_refer_reason_context_8.jsonl", ("llava", "0..1", "xyxy")),
        ("formats/ferret_bench_refer_reason_question_8.jsonl", ("llava", "0..1", "xyxy")),
        ("formats/ferret_bench_ground_conv_question_8.jsonl", ("llava", "", "xyxy")),
        ("formats/ferret_bench_refer_caption_answer_8.jsonl", ("llava", "", "xyxy")),
        ("formats/ferret_bench_refer_reason_answer_8.jsonl", ("llava", "", "xyxy")),
    ],
    ids=str,
)
def test_real_files(path: str, expected: tuple[str, str, str], shared_data: Path) -> None:
    found = the_one(judge(shared_data / path))
    assert found is not None
    assert (found.source, found.reading.frame, found.reading.order) == expected


def test_real_evaluation_files_are_named(shared_data: Path, tmp_path: Path, capsys: Any) -> None:
    assert auto(shared_data / "formats" / "coco_pope_adversarial_60.jsonl", tmp_path / "out") == 2
    assert "these are POPE's questions" in capsys.readouterr().err
    name = "rec_results_refcoco_val_qwen2_5vl_3b_instruct_baseline.json"
    assert auto(shared_data / "vlm-answers" / name, tmp_path / "out") == 2
    assert "no source of `cloc-mllm data build` has this layout" in capsys.readouterr().err
