"""The file formats that `cloc-mllm data build` reads, each with its options and its reader."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

from cloc_mllm.data.arguments import positive
from cloc_mllm.data.conversation_sources import add_conversations
from cloc_mllm.data.readers import ReadOptions
from cloc_mllm.data.readers.boxes import BoxesOf, BoxOrder, Units
from cloc_mllm.data.readers.chat_layouts import chat_readings
from cloc_mllm.data.readers.coco import looks_like_coco, read_coco
from cloc_mllm.data.readers.cvat import looks_like_cvat
from cloc_mllm.data.readers.finehard import looks_like_finehard
from cloc_mllm.data.readers.flickr30k_entities import (
    looks_like_flickr30k_entities,
    read_flickr30k_entities,
)
from cloc_mllm.data.readers.gbc import looks_like_gbc
from cloc_mllm.data.readers.grit import looks_like_grit
from cloc_mllm.data.readers.hf_objects import (
    ObjectColumns,
    looks_like_hf_objects,
    read_hf_objects,
)
from cloc_mllm.data.readers.image_folder import looks_like_image_folder, read_image_folder
from cloc_mllm.data.readers.label_studio import looks_like_label_studio
from cloc_mllm.data.readers.labelme import looks_like_labelme
from cloc_mllm.data.readers.llava import looks_like_llava
from cloc_mllm.data.readers.localized_narratives import looks_like_localized_narratives
from cloc_mllm.data.readers.mdetr import looks_like_mdetr, read_mdetr
from cloc_mllm.data.readers.odgt import looks_like_odgt, read_odgt
from cloc_mllm.data.readers.open_images import looks_like_open_images, read_open_images
from cloc_mllm.data.readers.pascal_voc import looks_like_pascal_voc, read_pascal_voc
from cloc_mllm.data.readers.places import Place, Reading
from cloc_mllm.data.readers.plain_csv import looks_like_csv, read_csv
from cloc_mllm.data.readers.qwen_vl import looks_like_qwen_vl
from cloc_mllm.data.readers.refcoco import looks_like_refcoco, read_refcoco
from cloc_mllm.data.readers.refer import looks_like_refer, read_refer
from cloc_mllm.data.readers.shikra import looks_like_shikra
from cloc_mllm.data.readers.via import looks_like_via
from cloc_mllm.data.readers.visual_genome import looks_like_visual_genome, read_visual_genome
from cloc_mllm.data.readers.yolo import looks_like_yolo, read_yolo
from cloc_mllm.data.texts import read_text
from cloc_mllm.data.tool_sources import add_tools
from cloc_mllm.data.web_sources import add_web_sets

_IMAGES = "folder, tar or zip"
_ROWS = "JSON list, JSON lines or CSV"

# how each source looks: `data doctor` and `data build auto` ask all of them
LOOKS: dict[str, Callable[[Place], Iterator[Reading]]] = {
    "coco": looks_like_coco,
    "mdetr": looks_like_mdetr,
    "refer": looks_like_refer,
    "refcoco": looks_like_refcoco,
    "shikra": looks_like_shikra,
    "qwen-vl": looks_like_qwen_vl,
    "flickr30k-entities": looks_like_flickr30k_entities,
    "visual-genome": looks_like_visual_genome,
    "grit": looks_like_grit,
    "finehard": looks_like_finehard,
    "gbc": looks_like_gbc,
    "localized-narratives": looks_like_localized_narratives,
    "odgt": looks_like_odgt,
    "llava": looks_like_llava,
    "ferret": partial(chat_readings, source="ferret"),
    "ms-swift": partial(chat_readings, source="ms-swift"),
    "internvl": partial(chat_readings, source="internvl"),
    "llama-factory": partial(chat_readings, source="llama-factory"),
    "openai": partial(chat_readings, source="openai"),
    "yolo": looks_like_yolo,
    "pascal-voc": looks_like_pascal_voc,
    "cvat": looks_like_cvat,
    "label-studio": looks_like_label_studio,
    "labelme": looks_like_labelme,
    "via": looks_like_via,
    "open-images": looks_like_open_images,
    "hf-objects": looks_like_hf_objects,
    "csv": looks_like_csv,
    "image-folder": looks_like_image_folder,
}


def add_formats(sources: Any) -> None:
    """Adds a parser for each format; its `read(args, drop_log)` yields the records."""
    _add_flickr30k_entities(sources)
    _add_coco(sources)
    _add_refcoco(sources)
    _add_image_folder(sources)
    add_conversations(sources, _add)
    _add_odgt(sources)
    _add_refer(sources)
    _add_mdetr(sources)
    _add_visual_genome(sources)
    add_web_sets(sources, _add)
    _add_yolo(sources)
    _add_pascal_voc(sources)
    add_tools(sources, _add)
    _add_open_images(sources)
    _add_hf_objects(sources)
    _add_csv(sources)


def _add(
    sources: Any, name: str, summary: str, read: Any, example: str = "", **paths: str
) -> argparse.ArgumentParser:
    """Adds a source that reads files.

    Args:
        read: `read(args, options, drop_log)`.
        example: options of a command, for the help.
        paths: required options that name a path, with their help.
    """
    description = f"{summary}\n\nexample:\n  cloc-mllm data build {name} {example} --output_dir OUT"
    parser: argparse.ArgumentParser = sources.add_parser(
        name, help=summary, description=description if example else summary
    )
    for option, text in paths.items():
        parser.add_argument(f"--{option}", metavar="PATH", type=Path, required=True, help=text)
    add_read_options(parser)
    parser.set_defaults(read=lambda args, drop_log: read(args, read_options(args), drop_log))
    return parser


def add_read_options(parser: argparse.ArgumentParser) -> None:
    """Adds what every source that reads files can be told."""
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
    parser.add_argument(
        "--restore_shape",
        action="store_true",
        help="stretch photos that were squashed after annotation (to squares, say) back to the "
        "shape that their annotation states",
    )
    parser.add_argument(
        "--max_side",
        metavar="PX",
        type=positive,
        default=0,
        help="reduce larger photos of records to this long side (JPEG, quality 90), so that the "
        "loader decodes less; take 1.4 times the tower's canvas (default: keep them as they are)",
    )


def read_options(args: argparse.Namespace) -> ReadOptions:
    return ReadOptions(args.encoding, args.boxes_of, args.restore_shape, args.max_side)


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
        "COCO or LVIS, and what CVAT, Label Studio, Roboflow and FiftyOne export as COCO",
        lambda args, options, drop_log: read_coco(
            args.instances,
            args.images,
            captions=args.captions,
            keep_crowd=args.keep_crowd,
            ids=_ids(args),
            options=options,
            drop_log=drop_log,
        ),
        "--instances annotations/instances_default.json --images images",
        instances="instances_*.json, lvis_v1_*.json, _annotations.coco.json, labels.json",
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
        "RefCOCO, RefCOCO+, RefCOCOg or gRefCOCO as published: refs(*).p and instances.json",
        lambda args, options, drop_log: read_refer(
            args.refs,
            args.instances,
            args.images,
            split=args.split,
            options=options,
            drop_log=drop_log,
        ),
        refs="refs(unc).p or grefs(unc).json",
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
        "--names data.yaml",
        names="data.yaml, or a text file of one name per line",
    )
    parser.add_argument(
        "--images",
        metavar="PATH",
        type=Path,
        help="folder, tar or zip (default: what data.yaml names, folders or text files of image "
        "paths)",
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


def _add_open_images(sources: Any) -> None:
    parser = _add(
        sources,
        "open-images",
        "Open Images: CSV of boxes and of class names",
        lambda args, options, drop_log: read_open_images(
            args.boxes,
            args.classes,
            args.images,
            keep_crowd=args.keep_crowd,
            ids=_ids(args),
            options=options,
            drop_log=drop_log,
        ),
        "--boxes validation-annotations-bbox.csv --classes class-descriptions-boxable.csv "
        "--images validation",
        boxes="oidv6-train-annotations-bbox.csv and the like",
        classes="class-descriptions-boxable.csv",
        images="folder, tar or zip of ImageID.jpg",
    )
    parser.add_argument("--keep_crowd", action="store_true", help="keep boxes around groups")
    parser.add_argument("--ids", metavar="FILE", type=Path, help="text file of image ids")


def _add_frame(parser: argparse.ArgumentParser, box_order: BoxOrder | None) -> None:
    parser.add_argument(
        "--frame",
        choices=get_args(Units),
        required=True,
        help="what boxes are measured in: pixels, or 0..1, 0..100 or 0..1000 of the image's sides",
    )
    parser.add_argument(
        "--box_order",
        choices=get_args(BoxOrder),
        required=box_order is None,
        default=box_order,
        help="what the four numbers are; cx and cy are the centre"
        + (f" (default: {box_order})" if box_order else ""),
    )


def _add_hf_objects(sources: Any) -> None:
    parser = _add(
        sources,
        "hf-objects",
        "Hugging Face `datasets` with an image and an objects column",
        lambda args, options, drop_log: read_hf_objects(
            args.dataset,
            args.images,
            frame=args.frame,
            box_order=args.box_order,
            split=args.split,
            subset=args.subset,
            columns=ObjectColumns(
                args.image_column, args.objects_column, args.box_key, args.category_key
            ),
            names=args.names,
            options=options,
            drop_log=drop_log,
        ),
        "--dataset cppe-5 --split train --frame pixels --box_order xywh",
    )
    parser.add_argument(
        "--dataset",
        metavar="PATH_OR_NAME",
        required=True,
        help="folder (save_to_disk, Parquet, ImageFolder), Parquet or JSON file, or a name on the "
        "hub",
    )
    _add_frame(parser, None)
    parser.add_argument(
        "--images", metavar="PATH", type=Path, help=f"{_IMAGES}, if the rows but name their images"
    )
    parser.add_argument("--split", default="", help="train, test, ... (default: all)")
    parser.add_argument("--subset", default="", help="configuration, if there are several")
    parser.add_argument("--image_column", default="image", help="(default: %(default)s)")
    parser.add_argument("--objects_column", default="objects", help="(default: %(default)s)")
    parser.add_argument("--box_key", default="", help="of objects (default: bbox, boxes, ...)")
    parser.add_argument(
        "--category_key", default="", help="of objects (default: category, label, ...)"
    )
    parser.add_argument(
        "--names",
        metavar="FILE",
        type=Path,
        help="names of classes that are numbers: YAML or JSON, or a text file of one per line",
    )


def _add_csv(sources: Any) -> None:
    parser = _add(
        sources,
        "csv",
        "a table of any tool, a row per box: image, x1, y1, x2, y2, phrase",
        lambda args, options, drop_log: read_csv(
            args.rows,
            args.images,
            frame=args.frame,
            box_order=args.box_order,
            columns=args.columns,
            header=not args.no_header,
            delimiter=args.delimiter,
            options=options,
            drop_log=drop_log,
        ),
        "--rows boxes.csv --images photos --frame pixels --columns image=file,phrase=label",
        rows="CSV, TSV, JSON lines or JSON list",
        images=_IMAGES,
    )
    _add_frame(parser, "xyxy")
    parser.add_argument(
        "--columns",
        metavar="ROLE=COLUMN,...",
        type=_columns,
        default={},
        help="such as image=file,x1=xmin,phrase=label; roles: image, those of the box order (x1 y1 "
        "x2 y2, x y w h, cx cy w h) or box, phrase, category, expression, caption, score, "
        "image_width, image_height (default: columns have the names of their roles)",
    )
    parser.add_argument(
        "--no_header",
        action="store_true",
        help="the first line is a row; columns are numbered from 1",
    )
    parser.add_argument(
        "--delimiter",
        default="",
        type=lambda text: text.replace("\\t", "\t"),
        help="between cells (default: a comma, or semicolons if the header has no comma; in .tsv a "
        "tab)",
    )


def _columns(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(role.strip() and column.strip() for role, _, column in pairs):
        raise argparse.ArgumentTypeError(f"expected ROLE=COLUMN,ROLE=COLUMN, got {text!r}")
    return {role.strip(): column.strip() for role, _, column in pairs}
