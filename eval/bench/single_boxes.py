"""Class names on photos: CLOC places each class that a photo has one box of.

    python eval/bench/single_boxes.py --data runs/data/coco-val --output_dir runs/single-boxes

Prints Acc@0.5 over boxes, macro over classes, and by the size of the box, and draws sheets of all
answers: the true box thin and white, the answer green if its IoU is 0.5 or more, else red.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.data.parquet import load_records
from cloc_mllm.data.records import Record, Region
from cloc_mllm.geometry import Boxes, elementwise_iou
from cloc_mllm.inference.cloc_predictor import ClocPredictor

_SIZES = {"small": 0.05, "middle": 0.2, "large": 1.01}  # up to this share of the photo
_CELL, _COLUMNS, _PER_SHEET = 300, 5, 25


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="single_boxes", description=__doc__)
    parser.add_argument("--data", required=True, help="records whose phrases are class names")
    parser.add_argument("--cloc", help="stage-1 model directory (default: the shipped one)")
    parser.add_argument("--largest", type=int, help="asks for the so many largest things alone")
    parser.add_argument("--output_dir", type=Path, required=True, help="gets the sheets")
    arguments = parser.parse_args(argv)
    predictor = ClocPredictor.from_pretrained(arguments.cloc)
    hits: dict[str, list[bool]] = defaultdict(list)
    by_size: dict[str, list[bool]] = defaultdict(list)
    cells: list[Image.Image] = []
    records = load_records(arguments.data)
    things = [region for record in records for region in _single_regions(record)]
    areas = sorted(map(_area, things), reverse=True)[: arguments.largest]
    for record in records:
        single = [region for region in _single_regions(record) if _area(region) >= areas[-1]]
        if not single:
            continue
        phrases = [region.phrase for region in single]
        photo = record.load_image()
        found = predictor.locate(photo, phrases).boxes.to_normalized().xyxy
        truth = torch.tensor([region.box for region in single])
        for region, answer, iou in zip(single, found, elementwise_iou(found, truth), strict=True):
            hit = bool(iou >= 0.5)
            hits[region.phrase].append(hit)
            by_size[next(name for name, most in _SIZES.items() if _area(region) < most)].append(hit)
            cells.append(_cell(photo, region, answer.tolist(), hit=hit))
    everything = [hit for of_class in hits.values() for hit in of_class]
    macro = sum(map(_share, hits.values())) / len(hits)
    print(f"Acc@0.5 {_share(everything):.1f} of {len(everything)} boxes")
    print(f"Acc@0.5 {macro:.1f} macro over {len(hits)} classes")
    for name in _SIZES:
        print(f"Acc@0.5 {_share(by_size[name]):.1f} of {len(by_size[name])} {name} boxes")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(cells), _PER_SHEET):
        _sheet(cells[start : start + _PER_SHEET]).save(
            arguments.output_dir / f"sheet-{start // _PER_SHEET}.png"
        )


def _single_regions(record: Record) -> list[Region]:
    phrases = [region.phrase for region in record.regions]
    return [region for region in record.regions if phrases.count(region.phrase) == 1]


def _area(region: Region) -> float:
    x1, y1, x2, y2 = region.box
    return (x2 - x1) * (y2 - y1)


def _share(hits: list[bool]) -> float:
    return 100 * sum(hits) / max(1, len(hits))


def _cell(photo: Image.Image, region: Region, answer: list[float], *, hit: bool) -> Image.Image:
    cell = photo.copy()
    cell.thumbnail((_CELL, _CELL))
    draw = ImageDraw.Draw(cell)
    for box, colour, width in (
        (list(region.box), "white", 1),
        (answer, "lime" if hit else "red", 3),
    ):
        draw.rectangle(
            Boxes.normalized([box], cell.size).to_pixels().xyxy[0].tolist(), None, colour, width
        )
    draw.text((4, 4), region.phrase, "yellow", stroke_width=2, stroke_fill="black")
    return cell


def _sheet(cells: list[Image.Image]) -> Image.Image:
    rows = -(-len(cells) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * _CELL, rows * _CELL))
    for place, cell in enumerate(cells):
        sheet.paste(cell, (place % _COLUMNS * _CELL, place // _COLUMNS * _CELL))
    return sheet


if __name__ == "__main__":
    sys.exit(run(main))
