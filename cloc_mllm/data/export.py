"""Exports records and chats into other tools' formats: `cloc-mllm data export`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cloc_mllm.data.parquet import load_set
from cloc_mllm.data.writers.chats import write_llava_chats, write_ms_swift_chats, write_openai_chats
from cloc_mllm.data.writers.coco import write_coco
from cloc_mllm.data.writers.llava import write_llava
from cloc_mllm.data.writers.ms_swift import write_ms_swift
from cloc_mllm.data.writers.webdataset import write_webdataset

Write = Callable[[Any, argparse.Namespace], Any]


def add_export(commands: Any) -> None:
    export = commands.add_parser("export", help="write records or chats in another tool's format")
    formats = export.add_subparsers(metavar="FORMAT", required=True)
    _add(formats, "coco", "instances.json, captions.json, images/", records=_coco)
    llava = _add(
        formats, "llava", "LLaVA's conversation JSON, images/", records=_llava, chats=_llava_chats
    )
    llava.add_argument(
        "--frame",
        choices=("padded", "original"),
        required=True,
        help="0..1 of the image padded to a square (LLaVA-1.5's own), or of the image itself",
    )
    _add_decimals(llava)
    summary = "rows.jsonl with <bbox> and objects, images/"
    _add(formats, "ms-swift", summary, records=_ms_swift, chats=_ms_swift_chats)
    openai = _add(
        formats, "openai", "OpenAI's messages as JSON lines, images/", chats=_openai_chats
    )
    _add_decimals(openai)
    tars = _add(
        formats, "webdataset", "tars of jpg, txt and json in GRIT's layout", records=_webdataset
    )
    tars.add_argument(
        "--shard_size", metavar="N", type=int, default=1000, help="default: %(default)s"
    )


def _add_decimals(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--decimals", metavar="N", type=int, default=3, help="of a number (default: %(default)s)"
    )


def _add(formats: Any, name: str, summary: str, **writes: Write) -> argparse.ArgumentParser:
    """Adds a format.

    Args:
        writes: how it writes `records` and `chats`; one of them, or both.
    """
    summary = f"{' or '.join(writes)}: {summary}"
    parser: argparse.ArgumentParser = formats.add_parser(name, help=summary, description=summary)
    parser.add_argument("data", help="a directory that `build` made, or its URL")
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        type=Path,
        required=True,
        help="directory to make; must be new",
    )
    parser.set_defaults(run=_run, writes=writes, name=name)
    return parser


def _run(args: argparse.Namespace) -> None:
    items = load_set(args.data, verify=True)
    write = args.writes.get(items.kind)
    if write is None:
        raise ValueError(
            f"{args.data} holds {items.kind}, and {args.name} is a format of "
            f"{' and '.join(args.writes)}; see `cloc-mllm data export --help`"
        )
    counts = write(tqdm(items, unit=f" {items.kind}"), args)
    for what, count in counts.items():
        if count:
            print(f"{what + ':':20} {count:>9,}")
    print(f"written to {args.output_dir}")


def _coco(records: Any, args: argparse.Namespace) -> Any:
    return write_coco(records, args.output_dir)


def _llava(records: Any, args: argparse.Namespace) -> Any:
    return write_llava(records, args.output_dir, frame=args.frame, decimals=args.decimals)


def _llava_chats(chats: Any, args: argparse.Namespace) -> Any:
    return write_llava_chats(chats, args.output_dir, frame=args.frame, decimals=args.decimals)


def _ms_swift(records: Any, args: argparse.Namespace) -> Any:
    return write_ms_swift(records, args.output_dir)


def _ms_swift_chats(chats: Any, args: argparse.Namespace) -> Any:
    return write_ms_swift_chats(chats, args.output_dir)


def _openai_chats(chats: Any, args: argparse.Namespace) -> Any:
    return write_openai_chats(chats, args.output_dir, decimals=args.decimals)


def _webdataset(records: Any, args: argparse.Namespace) -> Any:
    return write_webdataset(records, args.output_dir, shard_size=args.shard_size)
