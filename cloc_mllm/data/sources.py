"""The file formats that `cloc-mllm data build` reads: the options of each, and its reader."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from cloc_mllm.data.chats import Chat
from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.data.readers import ReadOptions
from cloc_mllm.data.readers.boxes import BoxesOf
from cloc_mllm.data.readers.chat_texts import Frame
from cloc_mllm.data.readers.chats import has_turns, read_chats, style_of
from cloc_mllm.data.readers.coco import read_coco
from cloc_mllm.data.readers.ferret import read_ferret
from cloc_mllm.data.readers.flickr30k_entities import read_flickr30k_entities
from cloc_mllm.data.readers.grit import read_grit, read_grit_parquet, read_grit_tars
from cloc_mllm.data.readers.image_folder import read_image_folder
from cloc_mllm.data.readers.llava import read_llava
from cloc_mllm.data.readers.mdetr import read_mdetr
from cloc_mllm.data.readers.ms_swift import read_ms_swift
from cloc_mllm.data.readers.odgt import read_odgt
from cloc_mllm.data.readers.pascal_voc import read_pascal_voc
from cloc_mllm.data.readers.qwen_vl import read_qwen_vl
from cloc_mllm.data.readers.refcoco import read_refcoco
from cloc_mllm.data.readers.refer import read_refer
from cloc_mllm.data.readers.shikra import read_shikra
from cloc_mllm.data.readers.visual_genome import read_visual_genome
from cloc_mllm.data.readers.yolo import read_yolo
from cloc_mllm.data.records import Record
from cloc_mllm.data.texts import read_rows, read_text
from cloc_mllm.data.values import as_dict

_IMAGES = "folder, tar or zip"
_ROWS = "JSON list, JSON lines or CSV"


def add_formats(sources: Any) -> None:
    """Adds a parser for each format; its `read(args, drop_log)` yields the records."""
    _add_flickr30k_entities(sources)
    _add_coco(sources)
    _add_refcoco(sources)
    _add_image_folder(sources)
    _add_conversations(sources)
    _add_odgt(sources)
    _add_refer(sources)
    _add_mdetr(sources)
    _add_visual_genome(sources)
    _add_grit(sources)
    _add_yolo(sources)
    _add_pascal_voc(sources)


def _add(sources: Any, name: str, summary: str, read: Any, **paths: str) -> argparse.ArgumentParser:
    """Adds a source that reads files.

    Args:
        read: `read(args, options, drop_log)`.
        paths: required options that name a path, with their help.
    """
    parser: argparse.ArgumentParser = sources.add_parser(name, help=summary, description=summary)
    for option, text in paths.items():
        parser.add_argument(f"--{option}", metavar="PATH", type=Path, required=True, help=text)
    parser.add_argument(
        "--encoding",
        metavar="NAME",
        default="",
        help="of text files without a byte order mark (default: utf-8)",
    )
    parser.add_argument(
        "--boxes_of",
        choices=get_args(BoxesOf),
        default="stated",
        help="which picture boxes of photos with an EXIF orientation are of: `stated` (default) "
        "goes by the stated image size, which cannot tell for squares, half turns and where none "
        "is stated, and takes the upright picture then; `upright` or `stored` say it",
    )
    parser.set_defaults(read=lambda args, drop_log: read(args, _options(args), drop_log))
    return parser


def _options(args: argparse.Namespace) -> ReadOptions:
    return ReadOptions(args.encoding, args.boxes_of)


def _ids(args: argparse.Namespace) -> list[str] | None:
    return read_text(args.ids, args.encoding).split() if args.ids else None


def _add_flickr30k_entities(sources: Any) -> None:
    flickr = _add(
        sources,
        "flickr30k-entities",
        "Flickr30k Entities: Annotations/ and Sentences/",
        lambda args, options, drop_log: read_flickr30k_entities(
            args.annotations, args.images, ids=_ids(args), options=options, drop_log=drop_log
        ),
        annotations="folder, tar or zip",
        images="folder, tar or zip of ID.jpg",
    )
    flickr.add_argument(
        "--ids", metavar="FILE", type=Path, help="text file of photo ids (default: all annotated)"
    )


def _add_coco(sources: Any) -> None:
    coco = _add(
        sources,
        "coco",
        "COCO or LVIS: instances and captions",
        lambda args, options, drop_log: read_coco(
            args.instances,
            args.images,
            captions=args.captions,
            keep_crowd=args.keep_crowd,
            ids=_ids(args),
            options=options,
            drop_log=drop_log,
        ),
        instances="instances_*.json, lvis_v1_*.json",
        images=_IMAGES,
    )
    coco.add_argument("--captions", metavar="FILE", type=Path, help="captions_*.json")
    coco.add_argument("--keep_crowd", action="store_true", help="keep boxes around crowds")
    coco.add_argument("--ids", metavar="FILE", type=Path, help="text file of image ids")


def _add_refcoco(sources: Any) -> None:
    _add(
        sources,
        "refcoco",
        "RefCOCO, RefCOCO+ or RefCOCOg as JSON rows, one per expression",
        lambda args, options, drop_log: read_refcoco(
            args.rows, args.images, options=options, drop_log=drop_log
        ),
        rows="JSON file",
        images=_IMAGES,
    )


def _add_image_folder(sources: Any) -> None:
    folder = _add(
        sources,
        "image-folder",
        "images in one folder per class (ImageNet's layout), for zero-shot classification",
        lambda args, options, drop_log: read_image_folder(
            args.images, class_names=args.class_names, options=options, drop_log=drop_log
        ),
        images="folder, tar or zip of folders",
    )
    folder.add_argument(
        "--class_names",
        metavar="FILE",
        type=Path,
        help="JSON folder -> name, or lines `folder name` (default: the folders' names; "
        "ImageNet's for its 1,000 folders)",
    )


def _add_conversations(sources: Any) -> None:
    """Adds the formats of conversations, read as chats or, where they can be, as regions."""
    for name, summary, read, frames in (
        ("llava", "LLaVA's conversations with [x1, y1, x2, y2] in the text", read_llava, True),
        ("ferret", "Ferret's conversations with <bbox_location0>", read_ferret, False),
        ("qwen-vl", "Qwen-VL's conversations, or referring lines", read_qwen_vl, True),
        ("ms-swift", "ms-swift's messages with <bbox> and objects", read_ms_swift, True),
        ("shikra", "Shikra's questions and answers, or referring lines", read_shikra, False),
        ("internvl", "InternVL's conversations with <box>[[...]]</box>", None, True),
        ("llama-factory", "LLaMA-Factory's ShareGPT or OpenAI messages", None, True),
        ("openai", "OpenAI's chat JSON lines, with image parts or texts alone", None, True),
    ):
        parser = _add(sources, name, summary, _read_conversations(name, read), rows=_ROWS)
        parser.add_argument(
            "--images", metavar="PATH", type=Path, help=f"{_IMAGES}; none for texts alone"
        )
        if frames:
            _add_frame(parser, name)
        kinds = ("chats", "regions") if read is not None else ("chats",)
        parser.add_argument(
            "--as",
            dest="kind",
            choices=kinds,
            default="",
            help="`chats` keeps every turn (default); `regions` makes records of the boxes and "
            "what is said of them, and counts what is not kept"
            if read is not None
            else "every turn is kept",
        )


def _add_frame(parser: argparse.ArgumentParser, name: str) -> None:
    is_llava = name == "llava"
    parser.add_argument(
        "--frame",
        choices=get_args(Frame),
        required=is_llava,
        help="what numbers in brackets and in JSON answers (bbox_2d) are of: 0..1 of the image "
        "padded to a square (LLaVA-1.5's mix), 0..1 of the original image, pixels, or thousandths "
        "of width and height; `cloc-mllm data doctor` shows which"
        + ("" if is_llava else ". Without it brackets are words. Marks need none"),
    )


def _read_conversations(name: str, read_regions: Any) -> Any:
    def read(
        args: argparse.Namespace, options: ReadOptions, drop_log: DropLog
    ) -> Iterator[Record] | Iterator[Chat]:
        args.kind = args.kind or _kind_of(args.rows, args.encoding)
        frame = vars(args).get("frame")
        if args.kind == "chats":
            style = style_of(name, frame)
            return read_chats(args.rows, args.images, style, options=options, drop_log=drop_log)
        if args.images is None:
            raise ValueError("regions need --images, the folder, tar or zip of the photos")
        if name == "llava" and frame not in ("padded", "original"):
            raise ValueError(f"--as regions reads --frame padded or original, got {frame}")
        more = {"frame": frame} if name == "llava" else {}
        return read_regions(args.rows, args.images, **more, options=options, drop_log=drop_log)

    return read


def _kind_of(rows: Path, encoding: str) -> str:
    """Files whose first row holds no turns (referring lines) have nothing but regions."""
    _, first = next(read_rows(rows, encoding), ("", None))
    first = as_dict(first)
    is_line = bool({"bbox", "sentence"} & first.keys()) and not has_turns(first)
    return "regions" if is_line else "chats"


def _add_odgt(sources: Any) -> None:
    odgt = _add(
        sources,
        "odgt",
        "Objects365, ODVG and others as JSON lines, one per image",
        lambda args, options, drop_log: read_odgt(
            args.rows,
            args.images,
            keep_ignored=args.keep_ignored,
            options=options,
            drop_log=drop_log,
        ),
        rows=_ROWS,
        images=_IMAGES,
    )
    odgt.add_argument(
        "--keep_ignored",
        action="store_true",
        help="keep places that were not annotated (CrowdHuman's tag `mask`)",
    )


def _add_refer(sources: Any) -> None:
    parser = _add(
        sources,
        "refer",
        "RefCOCO, RefCOCO+ or RefCOCOg as published: refs(*).p and instances.json",
        lambda args, options, drop_log: read_refer(
            args.refs,
            args.instances,
            args.images,
            split=args.split,
            options=options,
            drop_log=drop_log,
        ),
        refs="refs(unc).p",
        instances="instances.json",
        images=_IMAGES,
    )
    parser.add_argument("--split", default="", help="train, val, testA, ... (default: all)")


def _add_mdetr(sources: Any) -> None:
    _add(
        sources,
        "mdetr",
        "MDETR's JSON: COCO's layout with a caption per image",
        lambda args, options, drop_log: read_mdetr(
            args.annotations, args.images, options=options, drop_log=drop_log
        ),
        annotations="JSON file",
        images=_IMAGES,
    )


def _add_visual_genome(sources: Any) -> None:
    parser = _add(
        sources,
        "visual-genome",
        "Visual Genome: region_descriptions.json, region_graphs.json or objects.json",
        lambda args, options, drop_log: read_visual_genome(
            args.annotations,
            args.images,
            image_data=args.image_data,
            options=options,
            drop_log=drop_log,
        ),
        annotations="JSON file",
        images="folder, tar or zip of ID.jpg",
    )
    parser.add_argument(
        "--image_data", metavar="PATH", type=Path, help="image_data.json, if images were resized"
    )


def _add_grit(sources: Any) -> None:
    parser = _add(
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


def _read_grit(
    args: argparse.Namespace, options: ReadOptions, drop_log: DropLog
) -> Iterator[Record]:
    if args.tars:
        return read_grit_tars(args.tars, options=options, drop_log=drop_log)
    if args.tables:
        return read_grit_parquet(args.tables, args.images, options=options, drop_log=drop_log)
    if args.images is None:
        raise ValueError("--rows need --images, the folder, tar or zip of KEY.jpg")
    return read_grit(args.rows, args.images, options=options, drop_log=drop_log)


def _add_yolo(sources: Any) -> None:
    parser = _add(
        sources,
        "yolo",
        "YOLO folders: images/, labels/ and the class names",
        lambda args, options, drop_log: read_yolo(
            args.images,
            args.labels,
            args.names,
            task=args.task,
            split=args.split,
            options=options,
            drop_log=drop_log,
        ),
        names="data.yaml, or a text file of one name per line",
    )
    parser.add_argument(
        "--images",
        metavar="PATH",
        type=Path,
        help="folder, tar or zip (default: the folders that data.yaml names)",
    )
    parser.add_argument(
        "--labels",
        metavar="PATH",
        type=Path,
        help="folder, tar or zip of NAME.txt (default: --images with `labels` for `images`)",
    )
    parser.add_argument(
        "--split", choices=("train", "val", "test"), default="", help="of data.yaml (default: all)"
    )
    parser.add_argument(
        "--task",
        choices=("detect", "segment", "pose"),
        help="what follows the class: a box, the points of a polygon (or of an oriented box), or a "
        "box with keypoints (default: told by kpt_shape of data.yaml and by the rows)",
    )


def _add_pascal_voc(sources: Any) -> None:
    parser = _add(
        sources,
        "pascal-voc",
        "Pascal VOC folders: Annotations/ and JPEGImages/",
        lambda args, options, drop_log: read_pascal_voc(
            args.annotations,
            args.images,
            zero_based=args.zero_based,
            options=options,
            drop_log=drop_log,
        ),
        annotations="folder, tar or zip of NAME.xml",
        images=_IMAGES,
    )
    parser.add_argument(
        "--zero_based", action="store_true", help="pixels count from 0 (default: from 1)"
    )
