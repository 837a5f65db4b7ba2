"""Finds the format of annotations and the frame of boxes in rows: `cloc-mllm data doctor`.

Files of a format that `data build` reads are judged by `checks.judge`; other rows with boxes, and
raw answers of models, by their numbers alone.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cloc_mllm.box import Box
from cloc_mllm.data.chats import Chat
from cloc_mllm.data.checks.frames import Case, Diagnosis, diagnose, to_pixels
from cloc_mllm.data.checks.judge import (
    Judgement,
    describe_all,
    judge,
    the_one,
    unknown_layout,
    verdict,
)
from cloc_mllm.data.conversation_sources import add_kind
from cloc_mllm.data.drawing import contact_sheet, draw_chat, draw_record, draw_regions, region_color
from cloc_mllm.data.images import FILE_FORMATS, ImageError, open_image, read_header, storable
from cloc_mllm.data.readers import as_dict, as_list
from cloc_mllm.data.readers.boxes import TURNED, box_frame
from cloc_mllm.data.readers.files import Files, open_files, read_image
from cloc_mllm.data.readers.places import ROW_SUFFIXES
from cloc_mllm.data.records import Record
from cloc_mllm.data.sources import add_read_options, read_options
from cloc_mllm.data.texts import read_json, read_rows
from cloc_mllm.geometry import Boxes

# the fields in which sources keep boxes, texts and true boxes; the first that a row has counts
_BOX_KEYS = ("bbox", "box", "bbox_2d", "boxes", "bboxes", "parsed_boxes")
_TEXT_KEYS = ("model_output", "raw_text", "answer", "response", "prediction", "text", "value")
_TRUTH_KEYS = ("ground_truth", "truth", "gt", "solution", "gt_bbox")
_IMAGE_KEYS = ("image", "file_name", "img_path", "image_path", "filename", "img_id", "image_id")
_SIZE_KEYS = (("width", "height"), ("image_w", "image_h"), ("image_width", "image_height"))
_NUMBER = r"-?(?:\d+(?:\.\d+)?|\.\d+)"
_MAX_FRAMES_SHOWN = 4
_BRACKETED = re.compile(r"[\[(<{][^\[\]{}]*[\])>}]")


def add_doctor(commands: Any) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="say what annotations are, which frame their boxes are in, and how to build them",
        description="Says which source of `data build` has the layout of these files and why, "
        "reads their first records, weighs their boxes, and prints the command that builds them. "
        "Of other rows with boxes, and of a model's raw answers, it shows what speaks for each "
        "frame (pixels, resized pixels, 0..1, 0..999, 0..1000, padded or not). Where two readings "
        "fit, it says both.",
        epilog="exit status: 0 one reading or frame fits, 1 none or several do, 2 wrong input",
    )
    doctor.add_argument(
        "path", type=Path, help="a file of annotations or answers, or a folder, zip or tar of them"
    )
    doctor.add_argument(
        "--images",
        metavar="PATH",
        type=Path,
        help="folder, tar or zip (default: looked for in and beside PATH)",
    )
    add_read_options(doctor)
    add_kind(doctor)
    doctor.add_argument("--output", metavar="PNG", type=Path, help="draw the overlays here")
    doctor.add_argument(
        "--num", metavar="N", type=int, default=12, help="overlays (default: %(default)s)"
    )
    for name, keys in (("box", _BOX_KEYS), ("text", _TEXT_KEYS), ("truth", _TRUTH_KEYS)):
        doctor.add_argument(
            f"--{name}_key",
            default="",
            help=f"field in rows of no known source; default: the first of {', '.join(keys)}",
        )
    doctor.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    has_keys = args.box_key or args.text_key or args.truth_key
    judgements = (
        [] if has_keys else judge(args.path, args.images, read_options(args), args.conversations_as)
    )
    if not judgements:
        return _run_on_rows(args)
    print(describe_all(judgements))
    print(f"\nverdict: {verdict(judgements)}")
    if args.output is not None:
        _draw_judgements(judgements, args)
    return 0 if the_one(judgements) else 1


def _draw_judgements(judgements: Sequence[Judgement], args: argparse.Namespace) -> None:
    """Draws pictures as each fitting reading has them; if none fits, as all have them."""
    fitting = [judgement for judgement in judgements if not judgement.faults] or judgements
    pictures, titles = [], []
    for judgement in fitting[:_MAX_FRAMES_SHOWN]:
        for item in list(filter(_has_boxes, judgement.items))[: args.num]:
            pictures.append(draw_chat(item) if isinstance(item, Chat) else draw_record(item))
            titles.append(f"{judgement.source}, {judgement.reading.frame}: {item.id}")
    if not pictures:
        print("no overlay: no reading has a picture with a box")
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(pictures, titles).save(args.output)
    print(f"{len(pictures)} overlays drawn on {args.output}")


def _has_boxes(item: Record | Chat) -> bool:
    return any(item.places) if isinstance(item, Chat) else bool(item.regions)


def _run_on_rows(args: argparse.Namespace) -> int:
    """Judges rows that no source knows by the numbers in them."""
    if not args.path.is_file() or args.path.suffix.lower() not in ROW_SUFFIXES:
        raise ValueError(f"{args.path}: {unknown_layout(args.path, args.encoding)}")
    skipped: Counter[str] = Counter()
    keys = (
        (args.box_key,) if args.box_key else _BOX_KEYS,
        (args.text_key,) if args.text_key else _TEXT_KEYS,
        (args.truth_key,) if args.truth_key else _TRUTH_KEYS,
    )
    if args.images is None:
        cases = list(read_cases(args.path, keys, None, skipped))
        diagnosis = _diagnose(cases, args.path, skipped)
    else:
        with open_files(args.images) as files:
            cases = list(read_cases(args.path, keys, files, skipped))
            diagnosis = _diagnose(cases, args.path, skipped)
            if args.output is not None:
                _draw(cases, diagnosis, files, args)
    print(describe(diagnosis, len(cases), skipped))
    return 0 if len(diagnosis.frames) == 1 else 1


def _diagnose(cases: Sequence[Case], rows: Path, skipped: Counter[str]) -> Diagnosis:
    try:
        return diagnose(cases)
    except ValueError as error:
        listed = ", ".join(f"{count:,} {what}" for what, count in skipped.items())
        raise ValueError(
            f"{rows}: {error} ({listed or 'no rows'}); {unknown_layout(rows)}"
        ) from error


def read_cases(
    path: str | Path,
    keys: tuple[Sequence[str], Sequence[str], Sequence[str]],
    files: Files | None,
    skipped: Counter[str],
) -> Iterator[Case]:
    """Yields every box of every row; rows without a box are counted in `skipped`.

    Args:
        keys: names of the fields of boxes, of texts and of true boxes, tried in this order.
        files: the images, whose upright sizes stand in for sizes that rows do not state.
    """
    box_keys, text_keys, truth_keys = keys
    for _, row in _rows(path):
        row = as_dict(row)
        boxes = _boxes(_first(row, box_keys))
        text = _first(row, text_keys)
        if not boxes and isinstance(text, str):
            boxes = boxes_in(text)
        if not boxes:
            skipped["rows without a box"] += 1
            continue
        truths = _boxes(_first(row, truth_keys))
        name = str(_first(row, _IMAGE_KEYS) or "")
        size = _size(row, name, files)
        truth = truths[0] if len(truths) == 1 and len(boxes) == 1 else None
        yield from (Case(box, size, truth, name) for box in boxes)


def _rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    rows = [item for item in read_rows(path) if isinstance(item[1], dict)]
    if len(rows) > 1:
        yield from rows
        return
    is_csv = Path(path).suffix.lower() in (".csv", ".tsv")
    table = rows[0][1] if rows else {} if is_csv else as_dict(read_json(path))
    lists = [value for value in table.values() if isinstance(value, list)]
    if any(isinstance(value, list) and value and isinstance(value[0], dict) for value in lists):
        longest = max(lists, key=len)
        yield from ((f"row {index}", row) for index, row in enumerate(longest))
    else:
        yield from rows


def _first(row: dict[str, Any], keys: Sequence[str]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _boxes(value: Any) -> list[Box]:
    rows = as_list(value)
    if len(rows) == 4 and not any(isinstance(item, list) for item in rows):
        rows = [rows]
    boxes = []
    for row in rows:
        numbers = [v for v in as_list(row) if isinstance(v, (int, float)) and math.isfinite(v)]
        if len(numbers) == 4 and len(as_list(row)) == 4:
            boxes.append((numbers[0], numbers[1], numbers[2], numbers[3]))
    return boxes


def boxes_in(text: str) -> list[Box]:
    """Finds four numbers in brackets, in any of the ways models write them, unconverted."""
    boxes = []
    joined = re.sub(r"\)\s*,\s*\(", ",", text)  # Qwen-VL's (x1,y1),(x2,y2)
    for group in _BRACKETED.findall(joined):
        numbers = re.findall(_NUMBER, re.sub(r"bbox_2d", "", group))
        if len(numbers) == 4:
            x1, y1, x2, y2 = map(float, numbers)
            boxes.append((x1, y1, x2, y2))
    return boxes


def _size(row: dict[str, Any], name: str, files: Files | None) -> tuple[float, float] | None:
    for across, down in _SIZE_KEYS:
        width, height = row.get(across), row.get(down)
        if isinstance(width, (int, float)) and isinstance(height, (int, float)):
            return (float(width), float(height)) if min(width, height) > 0 else None
    if files is None or not name:
        return None
    header = read_header(_image(files, name), formats=FILE_FORMATS)
    return None if header is None else (float(header.upright_wh[0]), float(header.upright_wh[1]))


def _image(files: Files, name: str) -> bytes:
    """Reads an image; RefCOCO's rows add the number of the referent to the photo's name."""
    return read_image(files, name) or read_image(files, re.sub(r"(_\d{12})_\d+$", r"\1", name))


def describe(diagnosis: Diagnosis, num_boxes: int, skipped: Counter[str]) -> str:
    """Writes the table of evidence and the verdict."""
    lines = [f"{num_boxes:,} boxes, order {diagnosis.order}"]
    lines += [f"{count:,} {what}" for what, count in skipped.items()]
    lines.append(
        f"\n{'frame':28} {'boxes':>7} {'inside':>7} {'reach':>7} {'mean IoU':>9} {'Acc@0.5':>8}"
    )
    for item in diagnosis.evidence:
        numbers = f"{_share(item.inside):>7} {_number(item.reach):>7}"
        overlap = f"{_number(item.mean_iou):>9} {_share(item.accuracy):>8}"
        lines.append(f"{item.frame:28} {item.num_boxes:>7,} {numbers} {overlap}")
    lines += ["", *diagnosis.reasons]
    if len(diagnosis.frames) == 1:
        lines.append(f"verdict: {diagnosis.frames[0]}, {diagnosis.order}")
    elif diagnosis.frames:
        lines.append(f"verdict: cannot tell between {' and '.join(diagnosis.frames)}")
    else:
        lines.append("verdict: no frame fits; look at the overlays (--images, --output)")
    return "\n".join(lines)


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _draw(
    cases: Sequence[Case], diagnosis: Diagnosis, files: Files, args: argparse.Namespace
) -> None:
    """Draws, per image, one box as the likeliest frames read it, and the true box."""
    likely = sorted(diagnosis.evidence, key=lambda item: -item.inside * min(item.reach, 1))
    others = [item.frame for item in likely if item.frame not in diagnosis.frames]
    shown = [*diagnosis.frames, *others][:_MAX_FRAMES_SHOWN]
    pictures: list[Image.Image] = []
    titles: list[str] = []
    drawn: set[str] = set()
    num_turned = 0
    for case in cases:
        if len(pictures) == args.num:
            break
        if case.image in drawn:
            continue
        drawn.add(case.image)
        data = _image(files, case.image)
        try:
            image = open_image(storable(data, name=case.image)[0], name=case.image)
        except ImageError:
            continue
        size = case.size or (float(image.width), float(image.height))
        x, y, a, b = case.numbers
        numbers = (x, y, x + a, y + b) if diagnosis.order == "xywh" else case.numbers
        boxes = [to_pixels(frame, numbers, size) for frame in shown]
        labels = list(shown)
        if case.truth is not None:
            boxes.append(case.truth)
            labels.append("truth")
        colors = [region_color(index) for index in range(len(boxes))]
        frame = box_frame(read_header(data, formats=FILE_FORMATS), *size)
        upright = Boxes.normalized(frame.from_xyxy(boxes))
        num_turned += frame.remark == TURNED
        pictures.append(draw_regions(image, upright, labels, colors=colors))
        titles.append(f"{case.image} {json.dumps(case.numbers)}")
    if not pictures:
        print("no overlay: none of the rows' images is in --images")
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(pictures, titles).save(args.output)
    print(f"{len(pictures)} overlays drawn on {args.output}\n")
    if num_turned:
        print(
            f"{num_turned} of them state the size of the photo before its EXIF turn; their boxes "
            "are turned with it\n"
        )
