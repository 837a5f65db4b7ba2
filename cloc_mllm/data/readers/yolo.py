"""YOLO folders (Ultralytics): `labels/NAME.txt` beside `images/NAME.jpg`, and the class names.

A line is `CLASS X_CENTRE Y_CENTRE WIDTH HEIGHT`; of a polygon (`CLASS X1 Y1 X2 Y2 ...`, more than
five numbers) the box around it is taken. A photo without a label file has no object.

Frame: 0..1 of the original image, as centre and size.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from cloc_mllm.data.readers import as_dict, as_list, boxes_from_scaled, deliver
from cloc_mllm.data.readers.files import IMAGE_SUFFIXES, open_files
from cloc_mllm.data.records import DropLog, Record, Region

SOURCE = "yolo"


def read_yolo(
    images: str | Path, labels: str | Path, names: str | Path, *, drop_log: DropLog
) -> Iterator[Record]:
    """One record an image; a region a line, phrase and category its class's name.

    Args:
        images, labels: folder, tar or zip each; a label file has its image's name.
        names: `data.yaml` with `names` (list, or number -> name), or a text file of one a line.
        drop_log: beside the reasons of `validate_record`: regions get `bad_row` (a line that is
            no class and box), `unknown_category`, and `unknown_image` (a label file alone).
    """
    class_names = _read_names(names)
    with open_files(images) as image_files, open_files(labels) as label_files:
        photos = [n for n in image_files.names() if n.lower().endswith(IMAGE_SUFFIXES)]
        for photo in photos:
            stem = PurePosixPath(photo).stem
            text = label_files.read(f"{stem}.txt") or b""
            regions = _to_regions(text, stem, class_names, drop_log)
            image = image_files.read(photo) or b""
            yield from deliver(stem, image, SOURCE, [], regions, drop_log)
        stems = {PurePosixPath(photo).stem for photo in photos}
        for name in label_files.names():
            if name.endswith(".txt") and PurePosixPath(name).stem not in stems:
                for _ in _lines(label_files.read(name) or b""):
                    drop_log.add("region", name, "unknown_image")


def _read_names(path: str | Path) -> dict[str, Any]:
    """Class number as text -> name."""
    text = Path(path).read_text(encoding="utf-8")
    if Path(path).suffix not in (".yaml", ".yml"):
        return {str(i): name for i, name in enumerate(text.splitlines())}
    try:
        names = as_dict(yaml.safe_load(text)).get("names")
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    named = names if isinstance(names, dict) else dict(enumerate(as_list(names)))
    if not named:
        raise ValueError(f"{path}: expected `names`, a list or an object number -> name")
    return {str(number): name for number, name in named.items()}


def _lines(text: bytes) -> list[str]:
    lines = text.decode("utf-8", errors="replace").splitlines()
    return [line for line in lines if line.strip()]


def _to_regions(
    text: bytes, stem: str, class_names: dict[str, Any], drop_log: DropLog
) -> list[Region]:
    regions = []
    for index, line in enumerate(_lines(text)):
        number, *rest = line.split()
        corners = _corners(rest)
        if corners is None:
            drop_log.add("region", f"{stem}/{index}", "bad_row")
        elif number not in class_names:
            drop_log.add("region", f"{stem}/{index}", "unknown_category")
        else:
            (box,) = boxes_from_scaled([corners])
            name = class_names[number]
            regions.append(Region(box=box, phrase=name, category=name))
    return regions


def _corners(texts: list[str]) -> list[float] | None:
    """Centre and size, or a polygon's points -> xyxy; None for anything else."""
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        return None
    if len(numbers) == 4:
        x, y, width, height = numbers
        return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    if len(numbers) < 6 or len(numbers) % 2:
        return None
    xs, ys = numbers[0::2], numbers[1::2]
    if any(value != value for value in numbers):  # NaN would get lost in min and max
        return [float("nan")] * 4
    return [min(xs), min(ys), max(xs), max(ys)]
