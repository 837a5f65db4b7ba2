"""The sources of `cloc-mllm data build` beside those that `commands.py` adds."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.data.readers.ferret import read_ferret
from cloc_mllm.data.readers.grit import read_grit, read_grit_parquet, read_grit_tars
from cloc_mllm.data.readers.llava import read_llava
from cloc_mllm.data.readers.mdetr import read_mdetr
from cloc_mllm.data.readers.ms_swift import read_ms_swift
from cloc_mllm.data.readers.odgt import read_odgt
from cloc_mllm.data.readers.pascal_voc import read_pascal_voc
from cloc_mllm.data.readers.qwen_vl import read_qwen_vl
from cloc_mllm.data.readers.refer import read_refer
from cloc_mllm.data.readers.shikra import read_shikra
from cloc_mllm.data.readers.visual_genome import read_visual_genome
from cloc_mllm.data.readers.yolo import read_yolo
from cloc_mllm.data.records import Record

# (sources, name, one line, read(args, drop_log)) -> the source's parser
AddSource = Callable[..., argparse.ArgumentParser]
_ROW_FORMATS = (
    ("shikra", "Shikra's JSON lines, referring or with marked phrases", read_shikra),
    ("qwen-vl", "Qwen-VL's referring lines or conversations with <box>", read_qwen_vl),
    ("odgt", "Objects365, ODVG and others as JSON lines, one an image", read_odgt),
    ("ferret", "Ferret's conversations with <bbox_location0>", read_ferret),
    ("ms-swift", "ms-swift's rows with <bbox> and objects", read_ms_swift),
)


def add_format_sources(sources: Any, add_source: AddSource) -> None:
    for name, summary, read in _ROW_FORMATS:
        rows = add_source(sources, name, summary, _reads_rows(read))
        _add_paths(rows, rows="JSON lines or JSON list", images="folder, tar or zip")
    _add_refer(sources, add_source)
    _add_mdetr(sources, add_source)
    _add_visual_genome(sources, add_source)
    _add_grit(sources, add_source)
    _add_llava(sources, add_source)
    _add_yolo(sources, add_source)
    _add_pascal_voc(sources, add_source)


def _reads_rows(read: Any) -> Any:
    return lambda args, drop_log: read(args.rows, args.images, drop_log=drop_log)


def _add_paths(parser: argparse.ArgumentParser, **helps: str) -> None:
    """A required option a path."""
    for name, text in helps.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, metavar="PATH", type=Path, required=True, help=text)


def _add_refer(sources: Any, add_source: AddSource) -> None:
    parser = add_source(
        sources,
        "refer",
        "RefCOCO, RefCOCO+ or RefCOCOg as published: refs(*).p and instances.json",
        lambda args, drop_log: read_refer(
            args.refs, args.instances, args.images, split=args.split, drop_log=drop_log
        ),
    )
    _add_paths(parser, refs="refs(unc).p", instances="instances.json", images="folder, tar or zip")
    parser.add_argument("--split", default="", help="train, val, testA, ... (default: all)")


def _add_mdetr(sources: Any, add_source: AddSource) -> None:
    parser = add_source(
        sources,
        "mdetr",
        "MDETR's JSON: COCO's layout with a caption an image",
        lambda args, drop_log: read_mdetr(args.annotations, args.images, drop_log=drop_log),
    )
    _add_paths(parser, annotations="JSON file", images="folder, tar or zip")


def _add_visual_genome(sources: Any, add_source: AddSource) -> None:
    parser = add_source(
        sources,
        "visual-genome",
        "Visual Genome: region_descriptions.json, region_graphs.json or objects.json",
        lambda args, drop_log: read_visual_genome(
            args.annotations, args.images, image_data=args.image_data, drop_log=drop_log
        ),
    )
    _add_paths(parser, annotations="JSON file", images="folder, tar or zip of ID.jpg")
    parser.add_argument(
        "--image-data", metavar="PATH", type=Path, help="image_data.json, if images were resized"
    )


def _add_grit(sources: Any, add_source: AddSource) -> None:
    parser = add_source(
        sources,
        "grit",
        "GRIT (Kosmos-2): WebDataset tars of img2dataset, Parquet tables or JSON lines",
        _read_grit,
    )
    files = parser.add_mutually_exclusive_group(required=True)
    files.add_argument("--tars", metavar="TAR", type=Path, nargs="+")
    files.add_argument("--tables", metavar="PARQUET", type=Path, nargs="+")
    files.add_argument("--rows", metavar="FILE", type=Path, help="JSON lines; needs --images")
    parser.add_argument(
        "--images",
        metavar="PATH",
        type=Path,
        help="of --rows and --tables: folder, tar or zip (tables: default, a column of theirs)",
    )


def _read_grit(args: argparse.Namespace, drop_log: DropLog) -> Iterator[Record]:
    if args.tars:
        return read_grit_tars(args.tars, drop_log=drop_log)
    if args.tables:
        return read_grit_parquet(args.tables, args.images, drop_log=drop_log)
    if args.images is None:
        raise ValueError("--rows need --images, the folder, tar or zip of KEY.jpg")
    return read_grit(args.rows, args.images, drop_log=drop_log)


def _add_llava(sources: Any, add_source: AddSource) -> None:
    parser = add_source(
        sources,
        "llava",
        "LLaVA's conversation JSON with [x1, y1, x2, y2] in the text",
        lambda args, drop_log: read_llava(
            args.rows, args.images, frame=args.frame, drop_log=drop_log
        ),
    )
    _add_paths(parser, rows="JSON list or JSON lines", images="folder, tar or zip")
    parser.add_argument(
        "--frame",
        choices=("padded", "original"),
        required=True,
        help="0..1 of the image padded to a square (LLaVA-1.5's mix) or of the image itself; "
        "`cloc-mllm data doctor` shows which",
    )


def _add_yolo(sources: Any, add_source: AddSource) -> None:
    parser = add_source(
        sources,
        "yolo",
        "YOLO folders: images/, labels/ and the class names",
        lambda args, drop_log: read_yolo(args.images, args.labels, args.names, drop_log=drop_log),
    )
    _add_paths(
        parser,
        images="folder, tar or zip",
        labels="folder, tar or zip of NAME.txt",
        names="data.yaml, or a text file of one name a line",
    )


def _add_pascal_voc(sources: Any, add_source: AddSource) -> None:
    parser = add_source(
        sources,
        "pascal-voc",
        "Pascal VOC folders: Annotations/ and JPEGImages/",
        lambda args, drop_log: read_pascal_voc(
            args.annotations, args.images, zero_based=args.zero_based, drop_log=drop_log
        ),
    )
    _add_paths(parser, annotations="folder, tar or zip of NAME.xml", images="folder, tar or zip")
    parser.add_argument(
        "--zero-based", action="store_true", help="pixels count from 0 (default: from 1)"
    )
