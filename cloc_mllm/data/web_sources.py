"""The large sets of photos from the web that `cloc-mllm data build` reads."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.data.readers import ReadOptions
from cloc_mllm.data.readers.finehard import read_finehard
from cloc_mllm.data.readers.gbc import read_gbc, read_gbc_tars
from cloc_mllm.data.readers.grit import read_grit, read_grit_parquet, read_grit_tars
from cloc_mllm.data.readers.localized_narratives import read_localized_narratives
from cloc_mllm.data.records import Record

_IMAGES = "folder, tar or zip"


def add_web_sets(sources: Any, add: Any) -> None:
    """Adds a parser for each set, with `sources._add`, which adds a source that reads files."""
    _add_grit(sources, add)
    _add_finehard(sources, add)
    _add_gbc(sources, add)
    _add_localized_narratives(sources, add)


def _add_grit(sources: Any, add: Any) -> None:
    parser = add(
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


def _add_finehard(sources: Any, add: Any) -> None:
    add(
        sources,
        "finehard",
        "FineHARD (FG-CLIP): 12 M photos of COYO with described boxes",
        lambda args, options, drop_log: read_finehard(
            args.rows, args.images, options=options, drop_log=drop_log
        ),
        "--rows FineHARD/jsonfiles --images data/grit-12m --max_drop_share 0.6",
        rows="jsonfiles/, or one of its files",
        images="folder, tar or zip of coyo_image_*",
    )


def _add_gbc(sources: Any, add: Any) -> None:
    parser = add(
        sources,
        "gbc",
        "GBC1M, GBC10M (graph-based captions): img2dataset's tars, or JSON lines",
        _read_gbc,
        "--tars gbc/00000.tar gbc/00001.tar",
    )
    files = parser.add_mutually_exclusive_group(required=True)
    files.add_argument("--tars", metavar="TAR", type=Path, nargs="+")
    files.add_argument("--rows", metavar="FILE", type=Path, help="JSON lines; needs --images")
    parser.add_argument("--images", metavar="PATH", type=Path, help=f"of --rows: {_IMAGES}")


def _read_gbc(
    args: argparse.Namespace, options: ReadOptions, drop_log: DropLog
) -> Iterator[Record]:
    if args.tars:
        return read_gbc_tars(args.tars, options=options, drop_log=drop_log)
    if args.images is None:
        raise ValueError("--rows need --images, the folder, tar or zip that img_path names")
    return read_gbc(args.rows, args.images, options=options, drop_log=drop_log)


def _add_localized_narratives(sources: Any, add: Any) -> None:
    add(
        sources,
        "localized-narratives",
        "Localized Narratives: boxes around the mouse's trace while a thing is named",
        lambda args, options, drop_log: read_localized_narratives(
            args.rows, args.images, options=options, drop_log=drop_log
        ),
        "--rows coco_train_localized_narratives-00000-of-00004.jsonl --images train2017",
        rows="*_localized_narratives*.jsonl",
        images=_IMAGES,
    )
