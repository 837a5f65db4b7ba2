"""Small faithful files of every source format, made from records, and how each is read.

The painted pictures carry their truth: a region's box is filled with one colour, so a reader that
takes the wrong frame finds other colours under its box.
"""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cloc_mllm.data.readers.coco import read_coco
from cloc_mllm.data.readers.cvat import read_cvat
from cloc_mllm.data.readers.ferret import read_ferret
from cloc_mllm.data.readers.flickr30k_entities import read_flickr30k_entities
from cloc_mllm.data.readers.grit import read_grit, read_grit_parquet, read_grit_tars
from cloc_mllm.data.readers.hf_objects import read_hf_objects
from cloc_mllm.data.readers.label_studio import read_label_studio
from cloc_mllm.data.readers.labelme import read_labelme
from cloc_mllm.data.readers.llava import read_llava
from cloc_mllm.data.readers.mdetr import read_mdetr
from cloc_mllm.data.readers.ms_swift import read_ms_swift
from cloc_mllm.data.readers.odgt import read_odgt
from cloc_mllm.data.readers.open_images import read_open_images
from cloc_mllm.data.readers.pascal_voc import read_pascal_voc
from cloc_mllm.data.readers.plain_csv import read_csv
from cloc_mllm.data.readers.qwen_vl import read_qwen_vl
from cloc_mllm.data.readers.refcoco import read_refcoco
from cloc_mllm.data.readers.refer import read_refer
from cloc_mllm.data.readers.shikra import read_shikra
from cloc_mllm.data.readers.via import read_via
from cloc_mllm.data.readers.visual_genome import read_visual_genome
from cloc_mllm.data.readers.yolo import read_yolo
from cloc_mllm.data.records import DropLog, Record, Region, validate_record
from tests.data import layouts

COLORS = [(220, 20, 20), (20, 160, 20), (20, 20, 220), (200, 160, 0)]
WORDS = ["red", "green", "blue", "yellow"]
SIZES = [(96, 40), (40, 100), (75, 55), (64, 64)]


def painted_records() -> list[Record]:
    """A wide, a tall, an odd and a square picture with 1 to 4 filled boxes each."""
    records = []
    for number, (width, height) in enumerate(SIZES, 1):
        image = Image.new("RGB", (width, height), "white")
        regions = []
        for i in range(number):
            x, y = 2 + (i % 2) * width // 2, 3 + (i // 2) * height // 2
            box = (x, y, x + width // 3, y + height // 4)
            image.paste(COLORS[i], box)
            regions.append(
                Region(
                    box=(x / width, y / height, box[2] / width, box[3] / height),
                    phrase=f"the {WORDS[i]} box",
                    expressions=[f"the {WORDS[i]} box", f"{WORDS[i]} one of {number}"],
                    category=f"{WORDS[i]} box",
                )
            )
        file = io.BytesIO()
        image.save(file, "PNG")
        caption = "a picture of " + " and ".join(region.phrase for region in regions)
        records.append(
            Record(str(number), file.getvalue(), width, height, [caption], regions, "painted")
        )
    log = DropLog()
    return [valid for record in records if (valid := validate_record(record, log))]


def color_index(region: Region) -> int:
    """Which of `COLORS` a region of `painted_records` is filled with, by its own words."""
    said = " ".join([region.phrase, *region.expressions])
    return next(i for i, word in enumerate(WORDS) if word in said)


def write_images(records: Iterable[Record], folder: Path) -> None:
    for record in records:
        path = folder / "images" / f"{record.id}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(record.image)


def xyxy(record: Record, region: Region) -> list[float]:
    sides = (record.width, record.height) * 2
    return [round(value * side, 6) for value, side in zip(region.box, sides, strict=True)]


def xywh(record: Record, region: Region) -> list[float]:
    x1, y1, x2, y2 = xyxy(record, region)
    return [x1, y1, round(x2 - x1, 6), round(y2 - y1, 6)]


def expressions_of(region: Region) -> list[str]:
    return region.expressions or [region.phrase]


def regions_of(records: Iterable[Record]) -> Iterable[tuple[Record, Region]]:
    return ((record, region) for record in records for region in record.regions)


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def size_of(record: Record) -> dict[str, int]:
    return {"width": record.width, "height": record.height}


# one writer a format: `write(records, folder)`


def write_coco_files(records: list[Record], folder: Path) -> None:
    names = sorted({region.category for _, region in regions_of(records)})
    images = [{"id": int(r.id), "file_name": f"{r.id}.png", **size_of(r)} for r in records]
    annotations = [
        {"image_id": int(record.id), "category_id": names.index(region.category), "bbox": box}
        for record, region in regions_of(records)
        if (box := xywh(record, region))
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    table = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(table))
    texts = [{"image_id": int(r.id), "caption": text} for r in records for text in r.captions]
    (folder / "captions.json").write_text(json.dumps({"annotations": texts}))


def write_refcoco_rows(records: list[Record], folder: Path) -> None:
    rows = [
        {"img_id": record.id, "sents": text, "bbox": xywh(record, region), **size_of(record)}
        for record, region in regions_of(records)
        for text in region.expressions
    ]
    (folder / "rows.json").write_text(json.dumps(rows))


def write_refer_files(records: list[Record], folder: Path) -> None:
    write_coco_files(records, folder)
    table = json.loads((folder / "instances.json").read_text())
    for number, annotation in enumerate(table["annotations"]):
        annotation["id"] = number
    (folder / "instances.json").write_text(json.dumps(table))
    refs = []
    for number, (record, region) in enumerate(regions_of(records)):
        sentences = [{"sent": text, "raw": text} for text in region.expressions]
        ref = {"ref_id": number, "ann_id": number, "image_id": int(record.id), "split": "val"}
        category = table["annotations"][number]["category_id"]
        refs.append({**ref, "category_id": category, "sentences": sentences})
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))


def write_mdetr_file(records: list[Record], folder: Path) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record in records:
        photo = {"file_name": f"{record.id}.png", **size_of(record)}
        for caption in record.captions:
            images.append(
                {**photo, "id": len(images), "caption": caption, "dataset_name": "flickr"}
            )
        for region in record.regions:
            bbox = xywh(record, region)
            start = record.captions[0].find(region.phrase) if record.captions else -1
            if start >= 0 and not region.expressions:
                span = [start, start + len(region.phrase)]
                row = {"image_id": images[-1]["id"], "bbox": bbox, "tokens_positive": [span]}
                annotations.append(row)
        for region in record.regions:
            for text in region.expressions:
                number = len(images)
                row = {"image_id": number, "bbox": xywh(record, region)}
                images.append({**photo, "id": number, "caption": text, "dataset_name": "refcoco"})
                annotations.append({**row, "tokens_positive": [[0, len(text)]]})
    table = {"images": images, "annotations": annotations, "categories": []}
    (folder / "mdetr.json").write_text(json.dumps(table))


def write_shikra_referring(records: list[Record], folder: Path) -> None:
    rows = [
        {"img_path": f"{record.id}.png", "expression": text, "bbox": xyxy(record, region)}
        for record, region in regions_of(records)
        for text in region.expressions
    ]
    write_lines(folder / "rows.jsonl", rows)


def write_shikra_captions(records: list[Record], folder: Path) -> None:
    rows = []
    for record in records:
        sentence = record.captions[0]
        for phrase in dict.fromkeys(region.phrase for region in record.regions):
            sentence = sentence.replace(phrase, f"<ph_st>{phrase}<ph_ed>", 1)
        boxes = [xyxy(record, region) for region in record.regions]
        sequence = [[index] for index in range(len(boxes))]
        row = {"image_id": record.id, "boxes": boxes, "sentence": sentence}
        rows.append({**row, "boxes_seq": sequence})
    write_lines(folder / "rows.jsonl", rows)


def write_qwen_lines(records: list[Record], folder: Path) -> None:
    rows = [
        {"image": f"{r.id}.png", "sent": text, "bbox": xyxy(r, region), **size_of(r)}
        for r, region in regions_of(records)
        for text in region.expressions
    ]
    write_lines(folder / "rows.jsonl", rows)


def write_qwen_conversations(records: list[Record], folder: Path) -> None:
    rows = []
    for record in records:
        turns = [{"from": "user", "value": f"Picture 1: <img>{record.id}.png</img>\nFind them."}]
        for region in record.regions:
            x1, y1, x2, y2 = (round(value * 1000, 3) for value in region.box)
            text = f"<ref>{region.phrase}</ref><box>({x1},{y1}),({x2},{y2})</box>"
            turns.append({"from": "assistant", "value": text})
        rows.append({"id": record.id, "conversations": turns})
    (folder / "rows.jsonl").write_text(json.dumps(rows))


def write_vg_regions(records: list[Record], folder: Path) -> None:
    rows = []
    for record in records:
        regions = [
            dict(zip(("x", "y", "width", "height"), xywh(record, r), strict=True), phrase=r.phrase)
            for r in record.regions
        ]
        rows.append({"id": int(record.id), "regions": regions})
    (folder / "vg.json").write_text(json.dumps(rows))


def write_vg_objects(records: list[Record], folder: Path) -> None:
    rows = []
    for record in records:
        objects = [
            dict(zip("xywh", xywh(record, region), strict=True), names=[region.category])
            for region in record.regions
        ]
        rows.append({"image_id": int(record.id), "objects": objects})
    (folder / "vg.json").write_text(json.dumps(rows))


def grit_row(record: Record) -> dict[str, Any]:
    caption = record.captions[0]
    chunks, expressions = [], []
    for region in record.regions:
        start = caption.index(region.phrase)
        chunks.append([start, start + len(region.phrase), *region.box, region.score])
        for text in region.expressions:
            if (at := caption.find(text)) >= 0:
                expressions.append([at, at + len(text), *region.box, region.score])
    row = {"id": 1_000_000, "key": record.id, "caption": caption}
    return {**row, "noun_chunks": chunks, "ref_exps": expressions, **size_of(record)}


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def write_grit_tar(records: list[Record], folder: Path) -> None:
    with tarfile.open(folder / "00000.tar", "w") as archive:
        for record in records:
            row = grit_row(record)
            add_member(archive, f"{row['key']}.png", record.image)
            add_member(archive, f"{row['key']}.json", json.dumps(row).encode())
            add_member(archive, f"{row['key']}.txt", record.captions[0].encode())


def write_grit_table(records: list[Record], folder: Path) -> None:
    rows = [{**grit_row(record), "jpg": record.image} for record in records]
    pq.write_table(pa.Table.from_pylist(rows), folder / "grit.parquet")


def write_grit_rows(records: list[Record], folder: Path) -> None:
    write_lines(folder / "rows.jsonl", map(grit_row, records))


def write_odvg(records: list[Record], folder: Path) -> None:
    rows = []
    for record in records:
        instances = [
            {"bbox": xyxy(record, region), "category": region.category, "label": 0}
            for region in record.regions
        ]
        row = {"filename": f"{record.id}.png", **size_of(record)}
        rows.append({**row, "detection": {"instances": instances}})
    write_lines(folder / "rows.jsonl", rows)


def write_odvg_grounding(records: list[Record], folder: Path) -> None:
    rows = []
    for record in records:
        regions = [{"bbox": xyxy(record, r), "phrase": r.phrase} for r in record.regions]
        row = {"filename": f"{record.id}.png", **size_of(record)}
        rows.append({**row, "grounding": {"caption": record.captions[0], "regions": regions}})
    write_lines(folder / "rows.jsonl", rows)


def write_odgt(records: list[Record], folder: Path) -> None:
    rows = []
    for record in records:
        boxes = [
            {"tag": region.category, "fbox": xywh(record, region)} for region in record.regions
        ]
        rows.append({"ID": record.id, "gtboxes": boxes})
    write_lines(folder / "rows.jsonl", rows)


def write_yolo_folder(records: list[Record], folder: Path) -> None:
    names = sorted({region.category for _, region in regions_of(records)}) or ["a thing"]
    (folder / "data.yaml").write_text(json.dumps({"names": dict(enumerate(names))}))
    (folder / "labels").mkdir()
    for record in records:
        lines = []
        for region in record.regions:
            x1, y1, x2, y2 = region.box
            numbers = ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)
            text = " ".join(f"{number:.12f}" for number in numbers)
            lines.append(f"{names.index(region.category)} {text}\n")
        (folder / "labels" / f"{record.id}.txt").write_text("".join(lines))


def write_voc_folder(records: list[Record], folder: Path) -> None:
    (folder / "Annotations").mkdir()
    for record in records:
        root = ET.Element("annotation")
        size = ET.SubElement(root, "size")
        for name, value in size_of(record).items():
            ET.SubElement(size, name).text = str(value)
        for region in record.regions:
            thing = ET.SubElement(root, "object")
            ET.SubElement(thing, "name").text = region.category
            box = ET.SubElement(thing, "bndbox")
            x1, y1, x2, y2 = xyxy(record, region)
            corners = {"xmin": x1 + 1, "ymin": y1 + 1, "xmax": x2, "ymax": y2}
            for name, number in corners.items():
                ET.SubElement(box, name).text = str(number)
        ET.ElementTree(root).write(folder / "Annotations" / f"{record.id}.xml")


def write_flickr_folder(records: list[Record], folder: Path) -> None:
    (folder / "Annotations").mkdir()
    (folder / "Sentences").mkdir()
    for record in records:
        sentence = record.captions[0]
        root = ET.Element("annotation")
        size = ET.SubElement(root, "size")
        for name, value in size_of(record).items():
            ET.SubElement(size, name).text = str(value)
        for number, region in enumerate(record.regions, 1):
            chain = region.group or str(number)
            kind = region.category.replace(" ", "-") or "other"
            sentence = sentence.replace(region.phrase, f"[/EN#{chain}/{kind} {region.phrase}]", 1)
            thing = ET.SubElement(root, "object")
            ET.SubElement(thing, "name").text = chain
            box = ET.SubElement(thing, "bndbox")
            corners = zip(("xmin", "ymin", "xmax", "ymax"), xyxy(record, region), strict=True)
            for name, value in corners:
                ET.SubElement(box, name).text = str(value)
        ET.ElementTree(root).write(folder / "Annotations" / f"{record.id}.xml")
        (folder / "Sentences" / f"{record.id}.txt").write_text(sentence + "\n")


def llava_box(record: Record, region: Region, padded: bool) -> str:
    x1, y1, x2, y2 = xyxy(record, region)
    side_w, side_h, left, top = record.width, record.height, 0.0, 0.0
    if padded:
        side = max(record.width, record.height)
        side_w, side_h = side, side
        left, top = (side - record.width) / 2, (side - record.height) / 2
    numbers = ((x1 + left) / side_w, (y1 + top) / side_h, (x2 + left) / side_w, (y2 + top) / side_h)
    return "[" + ", ".join(f"{number:.6f}" for number in numbers) + "]"


def write_llava_rows(records: list[Record], folder: Path, padded: bool = True) -> None:
    rows = []
    for record in records:
        turns = []
        for region in record.regions:
            box = llava_box(record, region, padded)
            turns += [f"Provide a short description for this region: {box}", region.phrase]
            for text in region.expressions:
                ask = "Please provide the bounding box coordinate of the region this sentence"
                turns += [f"{ask} describes: {text}.", box]
        speakers = ("human", "gpt")
        talk = [{"from": speakers[i % 2], "value": turn} for i, turn in enumerate(turns)]
        talk[0]["value"] = "<image>\n" + talk[0]["value"]
        rows.append({"id": record.id, "image": f"{record.id}.png", "conversations": talk})
    (folder / "rows.json").write_text(json.dumps(rows))


def write_ferret_rows(records: list[Record], folder: Path) -> None:
    rows = []
    for record in records:
        named = [f"{r.phrase} <bbox_location{i}>" for i, r in enumerate(record.regions)]
        talk = [
            {"from": "human", "value": "<image>\nWhat is in the picture?"},
            {"from": "gpt", "value": "There is " + " and ".join(named) + "."},
        ]
        boxes = [[], [xyxy(record, region) for region in record.regions]]
        row = {"image": f"{record.id}.png", "image_w": record.width, "image_h": record.height}
        rows.append({**row, "conversations": talk, "box_x1y1x2y2": boxes})
    (folder / "rows.json").write_text(json.dumps(rows))


def write_swift_rows(records: list[Record], folder: Path, kind: str = "real") -> None:
    rows = []
    for record, region in regions_of(records):
        scale = {"real": None, "norm1": 1, "norm1000": 1000}[kind]
        box = [v * scale for v in region.box] if scale else xyxy(record, region)
        messages = [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "<image>What is at <bbox>?"},
            {"role": "assistant", "content": "<ref-object>"},
        ]
        objects = {"ref": [region.phrase], "bbox": [box], "bbox_type": kind}
        rows.append({"messages": messages, "images": [f"{record.id}.png"], "objects": objects})
        for text in region.expressions:
            messages = [
                {"role": "user", "content": "<image>Find <ref-object>."},
                {"role": "assistant", "content": "<bbox>"},
            ]
            objects = {"ref": [text], "bbox": [box], "bbox_type": kind}
            rows.append({"messages": messages, "images": [f"{record.id}.png"], "objects": objects})
    write_lines(folder / "rows.jsonl", rows)


class Format(NamedTuple):
    """`read(folder, drop_log)` reads what `write(records, folder)` and `write_images` made."""

    name: str
    write: Callable[[list[Record], Path], None]
    read: Callable[..., Iterable[Record]]
    files: tuple[str, ...]  # that hold annotations; globs


def _rows(read: Any, name: str = "rows.jsonl", **fixed: Any) -> Any:
    return lambda f, log, **more: read(f / name, f / "images", drop_log=log, **fixed, **more)


FORMATS = [
    Format(
        "coco",
        write_coco_files,
        lambda f, log, **more: read_coco(
            f / "instances.json",
            f / "images",
            captions=f / "captions.json",
            drop_log=log,
            **more,
        ),
        ("instances.json", "captions.json"),
    ),
    Format("refcoco", write_refcoco_rows, _rows(read_refcoco, "rows.json"), ("rows.json",)),
    Format(
        "refer",
        write_refer_files,
        lambda f, log, **more: read_refer(
            f / "refs(unc).p", f / "instances.json", f / "images", split="val", drop_log=log, **more
        ),
        ("instances.json",),
    ),
    Format("mdetr", write_mdetr_file, _rows(read_mdetr, "mdetr.json"), ("mdetr.json",)),
    Format("shikra_referring", write_shikra_referring, _rows(read_shikra), ("rows.jsonl",)),
    Format("shikra_captions", write_shikra_captions, _rows(read_shikra), ("rows.jsonl",)),
    Format("qwen_vl_lines", write_qwen_lines, _rows(read_qwen_vl), ("rows.jsonl",)),
    Format("qwen_vl_conversations", write_qwen_conversations, _rows(read_qwen_vl), ("rows.jsonl",)),
    Format(
        "visual_genome_regions",
        write_vg_regions,
        _rows(read_visual_genome, "vg.json"),
        ("vg.json",),
    ),
    Format(
        "visual_genome_objects",
        write_vg_objects,
        _rows(read_visual_genome, "vg.json"),
        ("vg.json",),
    ),
    Format(
        "grit_tar",
        write_grit_tar,
        lambda f, log, **more: read_grit_tars([f / "00000.tar"], drop_log=log, **more),
        (),
    ),
    Format(
        "grit_parquet",
        write_grit_table,
        lambda f, log, **more: read_grit_parquet([f / "grit.parquet"], drop_log=log, **more),
        (),
    ),
    Format("grit_rows", write_grit_rows, _rows(read_grit), ("rows.jsonl",)),
    Format("odvg_detection", write_odvg, _rows(read_odgt), ("rows.jsonl",)),
    Format("odvg_grounding", write_odvg_grounding, _rows(read_odgt), ("rows.jsonl",)),
    Format("odgt", write_odgt, _rows(read_odgt), ("rows.jsonl",)),
    Format(
        "yolo",
        write_yolo_folder,
        lambda f, log, **more: read_yolo(
            f / "images", f / "labels", f / "data.yaml", drop_log=log, **more
        ),
        ("data.yaml", "labels/*.txt"),
    ),
    Format(
        "pascal_voc",
        write_voc_folder,
        _rows(read_pascal_voc, "Annotations"),
        ("Annotations/*.xml",),
    ),
    Format(
        "flickr30k_entities",
        write_flickr_folder,
        lambda f, log, **more: read_flickr30k_entities(f, f / "images", drop_log=log, **more),
        ("Annotations/*.xml", "Sentences/*.txt"),
    ),
    Format(
        "llava_padded",
        write_llava_rows,
        _rows(read_llava, "rows.json", frame="padded"),
        ("rows.json",),
    ),
    Format(
        "llava_original",
        lambda records, f: write_llava_rows(records, f, padded=False),
        _rows(read_llava, "rows.json", frame="original"),
        ("rows.json",),
    ),
    Format("ferret", write_ferret_rows, _rows(read_ferret, "rows.json"), ("rows.json",)),
    Format("ms_swift_real", write_swift_rows, _rows(read_ms_swift), ("rows.jsonl",)),
    Format(
        "ms_swift_norm1",
        lambda records, f: write_swift_rows(records, f, "norm1"),
        _rows(read_ms_swift),
        ("rows.jsonl",),
    ),
    Format(
        "ms_swift_norm1000",
        lambda records, f: write_swift_rows(records, f, "norm1000"),
        _rows(read_ms_swift),
        ("rows.jsonl",),
    ),
]
FORMATS += [
    Format(
        "cvat",
        layouts.write_cvat_xml,
        _rows(read_cvat, "annotations.xml", expression_attribute="expression"),
        ("annotations.xml",),
    ),
    Format(
        "label_studio",
        lambda records, f: layouts.write_label_studio(records, f, address=""),
        _rows(read_label_studio, "export.json"),
        ("export.json",),
    ),
    Format(
        "label_studio_min",
        lambda records, f: layouts.write_label_studio_min(records, f, address=""),
        _rows(read_label_studio, "export.json"),
        ("export.json",),
    ),
    Format(
        "labelme",
        lambda records, f: layouts.write_labelme(records, f, above=""),
        _rows(read_labelme, "labels", descriptions=True),
        ("labels/*.json",),
    ),
    Format(
        "via_project",
        layouts.write_via_project,
        _rows(read_via, "via_project.json"),
        ("via_project.json",),
    ),
    Format("via_json", layouts.write_via_json, _rows(read_via, "via.json"), ("via.json",)),
    Format("via_csv", layouts.write_via_csv, _rows(read_via, "via.csv"), ("via.csv",)),
    Format(
        "open_images",
        layouts.write_open_images,
        lambda f, log, **more: read_open_images(
            f / "boxes.csv", f / "classes.csv", f / "images", drop_log=log, **more
        ),
        ("boxes.csv", "classes.csv"),
    ),
    Format(
        "hf_rows",
        layouts.write_hf_rows,
        _rows(read_hf_objects, frame="pixels", box_order="xywh"),
        ("rows.jsonl",),
    ),
    Format(
        "hf_disk",
        layouts.write_hf_disk,
        lambda f, log, **more: read_hf_objects(
            f / "set", frame="pixels", box_order="xywh", drop_log=log, **more
        ),
        (),
    ),
    Format(
        "csv",
        layouts.write_plain_csv,
        _rows(read_csv, "boxes.csv", frame="pixels"),
        ("boxes.csv",),
    ),
]
BY_NAME = {form.name: form for form in FORMATS}
