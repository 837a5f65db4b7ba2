"""Data sets as tools export them, made from records: each tool's files, names and keys.

`LAYOUTS` lists them; `layout.write(records, folder)` makes annotations and images, `layout.argv`
the `cloc-mllm data build` command that reads them. Writers of formats that a test also makes odd
(`tests/data/formats.py`) write annotations alone, beside `images/ID.png`.

Looked up: the exporters of Datumaro (which CVAT uses) and Label Studio, which were also run and
read back (docs/how-to/annotations.md), FiftyOne's COCO exporter, CVAT's XML dumper, an export of
Roboflow, files of VIA 2, and AutoTrain's description of its data.
"""

from __future__ import annotations

import csv
import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cloc_mllm.data.readers.coco import read_coco
from cloc_mllm.data.records import DropLog, Record, Region

UPLOAD_PREFIX = "0a1b2c3d-"
Corners = tuple[float, float, float, float]
Write = Callable[[list[Record], Path], None]


def coco_mini_records(shared_data: Path) -> list[Record]:
    """The 79 photos of `coco-mini` with their boxes, in COCO's own order."""
    folder = shared_data / "coco-mini"
    log = DropLog()
    return list(
        read_coco(
            folder / "instances_val.json",
            folder / "images-val.tar",
            captions=folder / "captions_val.json",
            drop_log=log,
        )
    )


# the parts that all layouts share


def file_name(record: Record) -> str:
    return f"{record.id}.png" if record.image.startswith(b"\x89PNG") else f"{record.id}.jpg"


def put_images(records: Iterable[Record], folder: Path, prefix: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        (folder / f"{prefix}{file_name(record)}").write_bytes(record.image)


def class_names(records: Iterable[Record]) -> list[str]:
    names = {region.category or region.phrase for record in records for region in record.regions}
    return sorted(names) or ["a thing"]


def class_name(region: Region) -> str:
    return region.category or region.phrase


def corners_px(record: Record, region: Region) -> Corners:
    x1, y1, x2, y2 = region.box
    return x1 * record.width, y1 * record.height, x2 * record.width, y2 * record.height


def xywh_px(record: Record, region: Region) -> list[float]:
    x1, y1, x2, y2 = corners_px(record, region)
    return [x1, y1, x2 - x1, y2 - y1]


def octagon(corners: Corners) -> list[tuple[float, float]]:
    """Eight points inside a box, two on each of its sides: it is the box around them."""
    x1, y1, x2, y2 = corners
    left, right = x1 + (x2 - x1) / 4, x2 - (x2 - x1) / 4
    top, bottom = y1 + (y2 - y1) / 4, y2 - (y2 - y1) / 4
    return [
        *((left, y1), (right, y1), (x2, top), (x2, bottom)),
        *((right, y2), (left, y2), (x1, bottom), (x1, top)),
    ]


def whole(value: float) -> int:
    """Rounds halves up, so that a side of a pixel or more never becomes 0."""
    return math.floor(value + 0.5) if math.isfinite(value) else 0


def dump(path: Path, table: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table), encoding="utf-8")


def write_csv(path: Path, header: list[str], rows: Iterable[Iterable[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)


def numbered(records: list[Record]) -> Iterator[tuple[int, int, Record, Region]]:
    """The number of each region, that of its record (both from 1), and both."""
    number = 0
    for record_number, record in enumerate(records, 1):
        for region in record.regions:
            number += 1
            yield number, record_number, record, region


# COCO as tools write it


def write_cvat_coco(records: list[Record], folder: Path) -> None:
    """CVAT, "COCO 1.0": `images/default/`, attributes, a polygon for every second shape."""
    put_images(records, folder / "images" / "default")
    names = class_names(records)
    annotations = []
    for number, image_id, record, region in numbered(records):
        x, y, w, h = (round(value, 2) for value in xywh_px(record, region))
        is_polygon = number % 2 == 0
        polygon = [round(v, 2) for point in octagon((x, y, x + w, y + h)) for v in point]
        annotations.append(
            {
                "id": number,
                "image_id": image_id,
                "category_id": names.index(class_name(region)) + 1,
                "segmentation": [polygon] if is_polygon else [],
                "area": w * h,
                "bbox": [x, y, w, h],
                "iscrowd": 0,
                "attributes": {"occluded": False}
                if is_polygon
                else {"occluded": False, "rotation": 0.0},
            }
        )
    table = {
        "licenses": [{"name": "", "id": 0, "url": ""}],
        "info": dict.fromkeys(
            ("contributor", "date_created", "description", "url", "version", "year"), ""
        ),
        "categories": [
            {"id": i, "name": name, "supercategory": ""} for i, name in enumerate(names, 1)
        ],
        "images": [
            {
                "id": number,
                "width": record.width,
                "height": record.height,
                "file_name": file_name(record),
                "license": 0,
                "flickr_url": "",
                "coco_url": "",
                "date_captured": 0,
            }
            for number, record in enumerate(records, 1)
        ],
        "annotations": annotations,
    }
    dump(folder / "annotations" / "instances_default.json", table)


def write_label_studio_coco(records: list[Record], folder: Path) -> None:
    """Label Studio, "COCO": whole pixels, ids from 0, names with the upload's prefix."""
    put_images(records, folder / "images", UPLOAD_PREFIX)
    names = class_names(records)
    annotations = []
    for number, image_number, record, region in numbered(records):
        bbox = [int(value + 1e-6) for value in xywh_px(record, region)]
        annotations.append(
            {
                "id": number - 1,
                "image_id": image_number - 1,
                "category_id": names.index(class_name(region)),
                "segmentation": [],
                "bbox": bbox,
                "ignore": 0,
                "iscrowd": 0,
                "area": bbox[2] * bbox[3],
            }
        )
    table = {
        "images": [
            {
                "width": record.width,
                "height": record.height,
                "id": number,
                "file_name": f"images/{UPLOAD_PREFIX}{file_name(record)}",
            }
            for number, record in enumerate(records)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "annotations": annotations,
        "info": {"year": 2024, "version": "1.0", "contributor": "Label Studio"},
    }
    dump(folder / "result.json", table)


def write_roboflow_coco(records: list[Record], folder: Path) -> None:
    """Roboflow, "COCO JSON": a folder per split with its JSON beside the images; category 0 is
    the project itself."""
    split = folder / "train"
    put_images(records, split)
    names = class_names(records)
    categories = [{"id": 0, "name": "things", "supercategory": "none"}]
    categories += [
        {"id": i, "name": name, "supercategory": "things"} for i, name in enumerate(names, 1)
    ]
    annotations = []
    for number, image_number, record, region in numbered(records):
        bbox = [round(value, 3) for value in xywh_px(record, region)]
        annotations.append(
            {
                "id": number - 1,
                "image_id": image_number - 1,
                "category_id": names.index(class_name(region)) + 1,
                "bbox": bbox,
                "area": round(bbox[2] * bbox[3], 3),
                "segmentation": [],
                "iscrowd": 0,
            }
        )
    table = {
        "info": {"year": "2024", "version": "1", "contributor": "", "url": ""},
        "licenses": [{"id": 1, "url": "", "name": "CC BY 4.0"}],
        "categories": categories,
        "images": [
            {
                "id": number,
                "license": 1,
                "file_name": file_name(record),
                "height": record.height,
                "width": record.width,
                "date_captured": "2024-01-01T00:00:00+00:00",
                "extra": {"name": file_name(record)},
            }
            for number, record in enumerate(records)
        ],
        "annotations": annotations,
    }
    dump(split / "_annotations.coco.json", table)
    (folder / "README.dataset.txt").write_text("things\n")


def write_fiftyone_coco(records: list[Record], folder: Path) -> None:
    """FiftyOne, `COCODetectionDataset`: `data/` and `labels.json`."""
    put_images(records, folder / "data")
    names = class_names(records)
    annotations = []
    for number, image_id, record, region in numbered(records):
        bbox = xywh_px(record, region)
        annotations.append(
            {
                "id": number,
                "image_id": image_id,
                "category_id": names.index(class_name(region)),
                "bbox": bbox,
                "area": bbox[2] * bbox[3],
                "iscrowd": 0,
                "score": region.score,
            }
        )
    table = {
        "info": {"year": "", "version": "", "description": "Exported from FiftyOne"},
        "licenses": [],
        "categories": [
            {"id": i, "name": name, "supercategory": None} for i, name in enumerate(names)
        ],
        "images": [
            {
                "id": number,
                "file_name": file_name(record),
                "height": record.height,
                "width": record.width,
                "license": None,
                "coco_url": None,
            }
            for number, record in enumerate(records, 1)
        ],
        "annotations": annotations,
    }
    dump(folder / "labels.json", table)


# the tools' own formats: annotations beside `images/`


def write_cvat_xml(records: list[Record], folder: Path) -> None:
    """CVAT, "CVAT for images 1.1": boxes and polygons in turn; the first expression is an
    attribute."""
    root = ET.Element("annotations")
    ET.SubElement(root, "version").text = "1.1"
    job = ET.SubElement(ET.SubElement(root, "meta"), "job")
    ET.SubElement(job, "mode").text = "annotation"
    labels = ET.SubElement(job, "labels")
    for name in class_names(records):
        ET.SubElement(ET.SubElement(labels, "label"), "name").text = name
    for number, record in enumerate(records):
        image = ET.SubElement(
            root,
            "image",
            id=str(number),
            name=file_name(record),
            width=str(record.width),
            height=str(record.height),
        )
        for index, region in enumerate(record.regions):
            _add_cvat_shape(image, record, region, index)
    folder.mkdir(parents=True, exist_ok=True)
    ET.ElementTree(root).write(folder / "annotations.xml", encoding="utf-8", xml_declaration=True)


def _add_cvat_shape(image: ET.Element, record: Record, region: Region, index: int) -> None:
    corners = corners_px(record, region)
    shared = {"label": class_name(region), "source": "manual", "occluded": "0"}
    if index % 2:
        points = ";".join(f"{x:.2f},{y:.2f}" for x, y in octagon(corners))
        shape = ET.SubElement(image, "polygon", shared, points=points, z_order="0")
    else:
        sides = zip(("xtl", "ytl", "xbr", "ybr"), corners, strict=True)
        texts = {name: f"{value:.2f}" for name, value in sides}
        shape = ET.SubElement(image, "box", shared, **texts, z_order="0")
    ET.SubElement(shape, "attribute", name="expression").text = "".join(region.expressions[:1])


def write_label_studio(
    records: list[Record], folder: Path, address: str = f"/data/upload/1/{UPLOAD_PREFIX}"
) -> None:
    """Label Studio, "JSON": percent; rectangles, turned rectangles and polygons in turn; the
    referring expressions are a text area per region, the captions one per image."""
    tasks = []
    for number, record in enumerate(records, 1):
        results = []
        for index, region in enumerate(record.regions):
            results += _label_studio_results(record, region, index)
        for caption in record.captions:
            value = {"text": [caption]}
            results.append(
                {"from_name": "caption", "to_name": "image", "type": "textarea", "value": value}
            )
        annotation = {"id": number, "was_cancelled": False, "ground_truth": False}
        tasks.append(
            {
                "id": number,
                "annotations": [{**annotation, "result": results}],
                "drafts": [],
                "predictions": [],
                "data": {"image": f"{address}{file_name(record)}"},
                "meta": {},
            }
        )
    dump(folder / "export.json", tasks)


def _label_studio_results(record: Record, region: Region, index: int) -> list[dict[str, Any]]:
    x1, y1, x2, y2 = corners_px(record, region)
    width, height = record.width, record.height
    shared = {
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "to_name": "image",
        "id": f"r{index}",
        "origin": "manual",
    }
    kind = ("rectanglelabels", "rectanglelabels", "polygonlabels")[index % 3]
    if kind == "polygonlabels":
        points = octagon((x1, y1, x2, y2))
        value: dict[str, Any] = {
            "points": [[x / width * 100, y / height * 100] for x, y in points],
            "closed": True,
        }
    elif index % 3 == 1:  # turned a quarter about its first corner, which is the upper right one
        value = {
            "x": x2 / width * 100,
            "y": y1 / height * 100,
            "width": (y2 - y1) / width * 100,
            "height": (x2 - x1) / height * 100,
            "rotation": 90,
        }
    else:
        value = {
            "x": x1 / width * 100,
            "y": y1 / height * 100,
            "width": (x2 - x1) / width * 100,
            "height": (y2 - y1) / height * 100,
            "rotation": 0,
        }
    label = {**value, kind: [class_name(region)]}
    results = [{**shared, "from_name": "label", "type": kind, "value": label}]
    if region.expressions:
        text = {**value, "text": region.expressions}
        results.append({**shared, "from_name": "words", "type": "textarea", "value": text})
    return results


def write_label_studio_min(
    records: list[Record], folder: Path, address: str = f"/data/upload/1/{UPLOAD_PREFIX}"
) -> None:
    """Label Studio, "JSON-MIN": one list of labels per control, no types."""
    tasks = []
    for number, record in enumerate(records, 1):
        shapes = []
        for region in record.regions:
            (label, *_) = _label_studio_results(record, region, 0)
            size = {key: label[key] for key in ("original_width", "original_height")}
            shapes.append({**label["value"], **size})
        name = f"{address}{file_name(record)}"
        tasks.append({"image": name, "id": number, "label": shapes, "annotator": 1})
    dump(folder / "export.json", tasks)


def write_labelme(records: list[Record], folder: Path, above: str = "..\\images\\") -> None:
    """LabelMe: `NAME.json` in `labels/`, with a Windows path to the image beside that folder;
    rectangles, polygons and circles (of square boxes) in turn."""
    for record in records:
        shapes = []
        for index, region in enumerate(record.regions):
            x1, y1, x2, y2 = corners_px(record, region)
            kind, points = "rectangle", [(x2, y1), (x1, y2)]
            if index % 3 == 1:
                kind, points = "polygon", octagon((x1, y1, x2, y2))
            elif index % 3 == 2 and abs((x2 - x1) - (y2 - y1)) < 1e-6:
                kind, points = "circle", [((x1 + x2) / 2, (y1 + y2) / 2), (x2, (y1 + y2) / 2)]
            shared = {"group_id": None, "flags": {}, "mask": None}
            said = "".join(region.expressions[:1])
            shape = {"label": class_name(region), "points": points, "shape_type": kind}
            shapes.append({**shape, **shared, "description": said})
        table = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imageData": None}
        table["imagePath"] = f"{above}{file_name(record)}"
        size = {"imageHeight": record.height, "imageWidth": record.width}
        dump(folder / "labels" / f"{record.id}.json", {**table, **size})


def _via_region(record: Record, region: Region, index: int) -> dict[str, Any]:
    """Rectangles, polygons, ellipses and circles (of square boxes) in turn."""
    x1, y1, x2, y2 = corners_px(record, region)
    centre = {"cx": (x1 + x2) / 2, "cy": (y1 + y2) / 2}
    shape: dict[str, Any] = {"name": "rect", "x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1}
    if index % 3 == 1:
        xs, ys = zip(*octagon((x1, y1, x2, y2)), strict=True)
        shape = {"name": "polygon", "all_points_x": list(xs), "all_points_y": list(ys)}
    elif index % 3 == 2 and abs((x2 - x1) - (y2 - y1)) < 1e-6:
        shape = {"name": "circle", **centre, "r": (x2 - x1) / 2}
    elif index % 3 == 2:
        radii = {"rx": (x2 - x1) / 2, "ry": (y2 - y1) / 2, "theta": 0}
        shape = {"name": "ellipse", **centre, **radii}
    return {"shape_attributes": shape, "region_attributes": {"label": class_name(region)}}


def via_images(records: list[Record]) -> dict[str, Any]:
    found = {}
    for record in records:
        name, size = file_name(record), len(record.image)
        regions = [_via_region(record, region, i) for i, region in enumerate(record.regions)]
        caption = {"caption": record.captions[0]} if record.captions else {}
        row = {"filename": name, "size": size, "regions": regions, "file_attributes": caption}
        found[f"{name}{size}"] = row
    return found


def write_via_project(records: list[Record], folder: Path) -> None:
    """VIA 2, "Save" (the project)."""
    images = via_images(records)
    options = dict.fromkeys(class_names(records), "")
    attribute = {"type": "dropdown", "description": "", "options": options, "default_options": {}}
    table = {
        "_via_settings": {"project": {"name": "things"}},
        "_via_img_metadata": images,
        "_via_attributes": {"region": {"label": attribute}, "file": {}},
        "_via_data_format_version": "2.0.10",
        "_via_image_id_list": list(images),
    }
    dump(folder / "via_project.json", table)


def write_via_json(records: list[Record], folder: Path) -> None:
    """VIA, "Export Annotations (as json)"."""
    dump(folder / "via.json", via_images(records))


def write_via_csv(records: list[Record], folder: Path) -> None:
    """VIA, "Export Annotations (as csv)": a row per region, and one for an image without any."""
    header = ["filename", "file_size", "file_attributes", "region_count", "region_id"]
    header += ["region_shape_attributes", "region_attributes"]
    rows = []
    for row in via_images(records).values():
        start = [row["filename"], row["size"], json.dumps(row["file_attributes"])]
        regions = row["regions"]
        empty = {"shape_attributes": {}, "region_attributes": {}}
        for index, region in enumerate(regions or [empty]):
            cells = (json.dumps(region[f"{kind}_attributes"]) for kind in ("shape", "region"))
            rows.append([*start, len(regions), index, *cells])
    write_csv(folder / "via.csv", header, rows)


def write_open_images(records: list[Record], folder: Path) -> None:
    """Open Images V7: boxes in 0..1 by MIDs, and the classes' names."""
    names = class_names(records)
    mids = {name: f"/m/0{number:04x}" for number, name in enumerate(names)}
    header = ["ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax"]
    header += ["IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside"]
    rows = []
    for _, _, record, region in numbered(records):
        x1, y1, x2, y2 = (round(value, 7) for value in region.box)
        mid = mids[class_name(region)]
        rows.append([record.id, "xclick", mid, 1, x1, x2, y1, y2, 0, 0, 0, 0, 0])
    write_csv(folder / "boxes.csv", header, rows)
    pairs = [(mid, name) for name, mid in mids.items()]
    write_csv(folder / "classes.csv", ["LabelName", "DisplayName"], pairs)


def write_plain_csv(records: list[Record], folder: Path) -> None:
    rows = [
        [file_name(record), *(round(v, 3) for v in corners_px(record, region)), region.phrase]
        for _, _, record, region in numbered(records)
    ]
    write_csv(folder / "boxes.csv", ["image", "x1", "y1", "x2", "y2", "phrase"], rows)


def write_voc_tree(records: list[Record], folder: Path) -> None:
    """Pascal VOC: whole pixels, counted from 1, corners included."""
    put_images(records, folder / "JPEGImages")
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    for record in records:
        root = ET.Element("annotation")
        ET.SubElement(root, "filename").text = file_name(record)
        size = ET.SubElement(root, "size")
        for name, value in (("width", record.width), ("height", record.height), ("depth", 3)):
            ET.SubElement(size, name).text = str(value)
        for region in record.regions:
            thing = ET.SubElement(root, "object")
            ET.SubElement(thing, "name").text = class_name(region)
            box = ET.SubElement(thing, "bndbox")
            x1, y1, x2, y2 = (whole(value) for value in corners_px(record, region))
            for name, value in (("xmin", x1 + 1), ("ymin", y1 + 1), ("xmax", x2), ("ymax", y2)):
                ET.SubElement(box, name).text = str(value)
        ET.ElementTree(root).write(folder / "Annotations" / f"{record.id}.xml")


# YOLO


def yolo_row(region: Region, form: str) -> list[float]:
    """The numbers behind the class: `detect`, `segment`, `obb` or `pose`."""
    x1, y1, x2, y2 = region.box
    middle_x, middle_y = (x1 + x2) / 2, (y1 + y2) / 2
    box = [middle_x, middle_y, x2 - x1, y2 - y1]
    if form == "segment":
        return [value for point in octagon(region.box) for value in point]
    if form == "obb":
        return [x2, y1, x2, y2, x1, y2, x1, y1]
    if form == "pose":  # the last keypoint is not labelled
        return [*box, middle_x, middle_y, 2, (x1 + middle_x) / 2, middle_y, 1, 0, 0, 0]
    return box


def put_yolo_labels(
    records: list[Record], folder: Path, names: list[str], form: str = "detect"
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        lines = []
        for region in record.regions:
            numbers = " ".join(f"{value:.6g}" for value in yolo_row(region, form))
            lines.append(f"{names.index(class_name(region))} {numbers}\n")
        (folder / f"{record.id}.txt").write_text("".join(lines))


def yolo_yaml(records: list[Record], places: dict[str, Any], *, as_list: bool, pose: bool) -> str:
    names = class_names(records)
    table: dict[str, Any] = {**places, "nc": len(names)}
    table["names"] = names if as_list else {str(i): name for i, name in enumerate(names)}
    if pose:
        table["kpt_shape"] = [3, 3]
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in table.items())


def write_ultralytics(records: list[Record], folder: Path, form: str = "detect") -> None:
    """Ultralytics' own tree: `images/train` and `labels/train`."""
    put_images(records, folder / "images" / "train")
    put_yolo_labels(records, folder / "labels" / "train", class_names(records), form)
    places = {"path": ".", "train": "images/train"}
    text = yolo_yaml(records, places, as_list=False, pose=form == "pose")
    (folder / "data.yaml").write_text(text)


def write_roboflow_yolo(records: list[Record], folder: Path) -> None:
    """Roboflow: a folder per split, named from a folder above the YAML."""
    half = len(records) // 2
    for split, part in (("train", records[half:]), ("valid", records[:half])):
        put_images(part, folder / split / "images")
        put_yolo_labels(part, folder / split / "labels", class_names(records))
    places = {"train": "../train/images", "val": "../valid/images"}
    (folder / "data.yaml").write_text(yolo_yaml(records, places, as_list=True, pose=False))


def write_yolo_lists(records: list[Record], folder: Path) -> None:
    """CVAT's "Ultralytics YOLO" and darknet's: the splits are text files of image paths."""
    put_images(records, folder / "images" / "train")
    put_yolo_labels(records, folder / "labels" / "train", class_names(records))
    paths = "".join(f"data/images/train/{file_name(record)}\n" for record in records)
    (folder / "train.txt").write_text(paths)
    places = {"path": ".", "train": "train.txt"}
    (folder / "data.yaml").write_text(yolo_yaml(records, places, as_list=False, pose=False))


def write_cvat_yolo(records: list[Record], folder: Path) -> None:
    """CVAT's "YOLO 1.1", darknet's tree: labels beside the images, names in `obj.names`."""
    put_images(records, folder / "obj_train_data")
    put_yolo_labels(records, folder / "obj_train_data", class_names(records))
    names = class_names(records)
    (folder / "obj.names").write_text("".join(f"{name}\n" for name in names))
    (folder / "obj.data").write_text(f"classes = {len(names)}\ntrain = data/train.txt\n")
    paths = (f"data/obj_train_data/{file_name(record)}\n" for record in records)
    (folder / "train.txt").write_text("".join(paths))


def write_label_studio_yolo(records: list[Record], folder: Path) -> None:
    """Label Studio, "YOLO with images"."""
    put_images(records, folder / "images")
    put_yolo_labels(records, folder / "labels", class_names(records))
    names = class_names(records)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    dump(folder / "notes.json", {"categories": categories, "info": {"version": "1.0"}})


# Hugging Face


def hf_rows(records: list[Record], *, as_list: bool, as_text: bool = False) -> list[dict[str, Any]]:
    """Rows with an `objects` column: lists of one struct each, or one struct of lists."""
    names = class_names(records)
    rows = []
    for record in records:
        boxes = [xywh_px(record, region) for region in record.regions]
        classes: list[Any] = [class_name(region) for region in record.regions]
        if not as_text:
            classes = [names.index(name) for name in classes]
        objects: Any = {"bbox": boxes, "category": classes}
        if as_list:
            pairs = zip(boxes, classes, strict=True)
            objects = [{"bbox": box, "category": name} for box, name in pairs]
        size = {"width": record.width, "height": record.height}
        rows.append({"image_id": int(record.id), **size, "objects": objects})
    return rows


def write_hf_rows(records: list[Record], folder: Path) -> None:
    """JSON lines that name image files."""
    rows = hf_rows(records, as_list=True, as_text=True)
    texts = (
        json.dumps({"image": file_name(record), **row})
        for row, record in zip(rows, records, strict=True)
    )
    (folder / "rows.jsonl").write_text("".join(f"{text}\n" for text in texts))


def hf_dataset(records: list[Record], *, as_list: bool) -> Any:
    from datasets import ClassLabel, Dataset, Features, Image, List, Value

    box, name = List(Value("float64"), length=4), ClassLabel(names=class_names(records))
    objects: Any = {"bbox": List(box), "category": List(name)}
    if as_list:
        objects = List({"bbox": box, "category": name})
    numbers = {key: Value("int64") for key in ("image_id", "width", "height")}
    features = Features({**numbers, "objects": objects, "image": Image()})
    rows = hf_rows(records, as_list=as_list)
    for row, record in zip(rows, records, strict=True):
        row["image"] = {"bytes": record.image, "path": None}
    return Dataset.from_list(rows, features=features)


def write_hf_parquet(records: list[Record], folder: Path) -> None:
    """As `push_to_hub` writes it: Parquet whose schema holds the class names."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    path = folder / "data" / "train-00000-of-00001.parquet"
    hf_dataset(records, as_list=False).to_parquet(path)


def write_hf_disk(records: list[Record], folder: Path) -> None:
    """`Dataset.save_to_disk`."""
    hf_dataset(records, as_list=True).save_to_disk(folder / "set")


def write_hf_image_folder(records: list[Record], folder: Path) -> None:
    """ImageFolder with `metadata.jsonl`, as the docs of `datasets` and AutoTrain describe it."""
    put_images(records, folder / "train")
    rows = hf_rows(records, as_list=False, as_text=True)
    lines = []
    for row, record in zip(rows, records, strict=True):
        lines.append(json.dumps({"file_name": file_name(record), "objects": row["objects"]}))
    (folder / "train" / "metadata.jsonl").write_text("\n".join(lines) + "\n")


class Layout(NamedTuple):
    """A data set as a tool exports it.

    Attributes:
        write: makes annotations and images in a folder.
        command: what follows `cloc-mllm data build`, with paths below the folder.
        entry: what people take for "the annotations", below the folder.
        tolerance_px: how far the format's rounding may move a side of a box.
    """

    name: str
    write: Write
    command: str
    entry: str
    tolerance_px: float

    def argv(self, folder: Path) -> list[str]:
        """The command's arguments; those that name a file or folder of the layout are paths."""
        return [
            str(folder / part) if (folder / part).exists() else part
            for part in self.command.split()
        ]


def _beside_images(write: Write) -> Write:
    def written(records: list[Record], folder: Path) -> None:
        put_images(records, folder / "images")
        write(records, folder)

    return written


def _yolo(form: str) -> Write:
    return lambda records, folder: write_ultralytics(records, folder, form)


_HF = "--frame pixels --box_order xywh"
LAYOUTS = [
    Layout(
        "cvat_coco",
        write_cvat_coco,
        "coco --instances annotations/instances_default.json --images images",
        "annotations/instances_default.json",
        0.011,  # two decimals of each corner's origin and of its size
    ),
    Layout(
        "label_studio_coco",
        write_label_studio_coco,
        "coco --instances result.json --images images",
        "result.json",
        2.0,  # the corner and the size are cut off each
    ),
    Layout(
        "roboflow_coco",
        write_roboflow_coco,
        "coco --instances train/_annotations.coco.json --images train",
        "train/_annotations.coco.json",
        0.0011,
    ),
    Layout(
        "fiftyone_coco",
        write_fiftyone_coco,
        "coco --instances labels.json --images data",
        "labels.json",
        1e-9,
    ),
    Layout(
        "cvat_xml",
        _beside_images(write_cvat_xml),
        "cvat --annotations annotations.xml --images images --expression_attribute expression",
        "annotations.xml",
        0.0051,
    ),
    Layout(
        "label_studio",
        _beside_images(write_label_studio),
        "label-studio --annotations export.json --images images",
        "export.json",
        1e-9,
    ),
    Layout(
        "label_studio_min",
        _beside_images(write_label_studio_min),
        "label-studio --annotations export.json --images images",
        "export.json",
        1e-9,
    ),
    Layout(
        "labelme",
        _beside_images(write_labelme),
        "labelme --annotations labels --images images",
        "labels",
        1e-9,
    ),
    Layout(
        "via_project",
        _beside_images(write_via_project),
        "via --annotations via_project.json --images images",
        "via_project.json",
        1e-9,
    ),
    Layout(
        "via_json",
        _beside_images(write_via_json),
        "via --annotations via.json --images images",
        "via.json",
        1e-9,
    ),
    Layout(
        "via_csv",
        _beside_images(write_via_csv),
        "via --annotations via.csv --images images",
        "via.csv",
        1e-9,
    ),
    Layout("yolo_detect", _yolo("detect"), "yolo --names data.yaml", "data.yaml", 0.001),
    Layout("yolo_segment", _yolo("segment"), "yolo --names data.yaml", "data.yaml", 0.001),
    Layout("yolo_obb", _yolo("obb"), "yolo --names data.yaml", "data.yaml", 0.001),
    Layout("yolo_pose", _yolo("pose"), "yolo --names data.yaml", "data.yaml", 0.001),
    Layout("yolo_roboflow", write_roboflow_yolo, "yolo --names data.yaml", "data.yaml", 0.001),
    Layout("yolo_lists", write_yolo_lists, "yolo --names data.yaml", "data.yaml", 0.001),
    Layout(
        "cvat_yolo",
        write_cvat_yolo,
        "yolo --names obj.names --images obj_train_data",
        "obj.names",
        0.001,
    ),
    Layout(
        "label_studio_yolo",
        write_label_studio_yolo,
        "yolo --names classes.txt --images images",
        "classes.txt",
        0.001,
    ),
    Layout(
        "pascal_voc",
        write_voc_tree,
        "pascal-voc --annotations Annotations --images JPEGImages",
        "Annotations",
        0.5 + 1e-9,
    ),
    Layout(
        "open_images",
        _beside_images(write_open_images),
        "open-images --boxes boxes.csv --classes classes.csv --images images",
        "boxes.csv",
        1e-4,
    ),
    Layout("hf_parquet", write_hf_parquet, f"hf-objects --dataset data {_HF}", "data", 1e-9),
    Layout("hf_disk", write_hf_disk, f"hf-objects --dataset set {_HF}", "set", 1e-9),
    Layout(
        "hf_image_folder",
        write_hf_image_folder,
        f"hf-objects --dataset train {_HF}",
        "train",
        1e-9,
    ),
    Layout(
        "hf_rows",
        _beside_images(write_hf_rows),
        f"hf-objects --dataset rows.jsonl --images images {_HF}",
        "rows.jsonl",
        1e-9,
    ),
    Layout(
        "plain_csv",
        _beside_images(write_plain_csv),
        "csv --rows boxes.csv --images images --frame pixels",
        "boxes.csv",
        0.0006,
    ),
]
BY_NAME = {layout.name: layout for layout in LAYOUTS}
