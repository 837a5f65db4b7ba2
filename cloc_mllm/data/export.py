"""Exports records into other tools' formats: `cloc-mllm data export`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cloc_mllm.data.parquet import load_records
from cloc_mllm.data.records import Record
from cloc_mllm.data.writers.coco import write_coco
from cloc_mllm.data.writers.llava import write_llava
from cloc_mllm.data.writers.ms_swift import write_ms_swift
from cloc_mllm.data.writers.webdataset import write_webdataset

Write = Callable[[Iterable[Record], argparse.Namespace], Any]


def add_export(commands: Any) -> None:
    export = commands.add_parser("export", help="write records in another tool's format")
    formats = export.add_subparsers(metavar="FORMAT", required=True)
    _add(formats, "coco", "instances.json, captions.json, images/", _coco)
    llava = _add(formats, "llava", "LLaVA's conversation JSON, images/", _llava)
    llava.add_argument(
        "--frame",
        choices=("padded", "original"),
        required=True,
        help="0..1 of the image padded to a square (LLaVA-1.5's own), or of the image itself",
    )
    llava.add_argument(
        "--decimals",
        metavar="N",
        type=int,
        default=3,
        help="decimals per number (default: %(default)s)",
    )
    _add(formats, "ms-swift", "rows.jsonl with <bbox> and objects, images/", _ms_swift)
    tars = _add(formats, "webdataset", "tars of jpg, txt and json in GRIT's layout", _webdataset)
    tars.add_argument(
        "--shard_size", metavar="N", type=int, default=1000, help="default: %(default)s"
    )


def _add(formats: Any, name: str, summary: str, write: Write) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = formats.add_parser(name, help=summary, description=summary)
    parser.add_argument("data", help="a directory that `build` made, or its URL")
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        type=Path,
        required=True,
        help="directory to make; must be new",
    )
    parser.set_defaults(run=_run, write=write)
    return parser


def _run(args: argparse.Namespace) -> None:
    counts = args.write(tqdm(load_records(args.data, verify=True), unit=" records"), args)
    for what, count in counts.items():
        if count:
            print(f"{what + ':':20} {count:>9,}")
    print(f"written to {args.output_dir}")


def _coco(records: Iterable[Record], args: argparse.Namespace) -> Any:
    return write_coco(records, args.output_dir)


def _llava(records: Iterable[Record], args: argparse.Namespace) -> Any:
    return write_llava(records, args.output_dir, frame=args.frame, decimals=args.decimals)


def _ms_swift(records: Iterable[Record], args: argparse.Namespace) -> Any:
    return write_ms_swift(records, args.output_dir)


def _webdataset(records: Iterable[Record], args: argparse.Namespace) -> Any:
    return write_webdataset(records, args.output_dir, shard_size=args.shard_size)
