"""Runs `cloc-mllm data`; its commands stats and inspect are here, the others are imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.data.arguments import positive
from cloc_mllm.data.arrange import add_filter, add_merge, add_split
from cloc_mllm.data.build import add_build
from cloc_mllm.data.chats import Chat
from cloc_mllm.data.checks.doctor import add_doctor
from cloc_mllm.data.checks.fetch_report import add_fetch_report
from cloc_mllm.data.checks.leaks import add_leak_check
from cloc_mllm.data.checks.validate import add_validate
from cloc_mllm.data.drawing import contact_sheet, draw_chat, draw_record
from cloc_mllm.data.export import add_export
from cloc_mllm.data.parquet import load_set, read_manifest
from cloc_mllm.data.statistics import describe_build, describe_chats, describe_records


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one `data` command and returns its exit status.

    Wrong input raises ValueError or OSError, which the caller prints.
    """
    args = build_parser().parse_args(argv)
    return args.run(args) or 0


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="cloc-mllm data",
        description="Make records (images with texts and boxes) and chats, look at them.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_build(commands)

    stats = commands.add_parser("stats", help="print counts and distributions")
    stats.add_argument("data", help="a directory that `build` made, or its URL")
    stats.set_defaults(run=_run_stats)

    inspect = commands.add_parser(
        "inspect", help="draw a sheet of images with boxes and phrases, or of chats"
    )
    inspect.add_argument("data", help="a directory that `build` made, or its URL")
    inspect.add_argument(
        "--output",
        metavar="PNG",
        type=Path,
        default=Path("sheet.png"),
        help="default: %(default)s",
    )
    inspect.add_argument(
        "--num", metavar="N", type=positive, default=16, help="images (default: %(default)s)"
    )
    inspect.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=0,
        help="which images are drawn (default: %(default)s)",
    )
    inspect.set_defaults(run=_run_inspect)

    add_export(commands)
    add_validate(commands)
    add_split(commands)
    add_merge(commands)
    add_filter(commands)
    add_leak_check(commands)
    add_doctor(commands)
    add_fetch_report(commands)
    return parser


def _run_stats(args: argparse.Namespace) -> None:
    items: Any = load_set(args.data, verify=True)
    read = tqdm(items, desc="reading", unit=f" {items.kind}", leave=False)
    print(describe_chats(read) if items.kind == "chats" else describe_records(read))
    if not args.data.endswith(".parquet"):
        print(f"\n{describe_build(read_manifest(args.data))}")


def _run_inspect(args: argparse.Namespace) -> None:
    items = load_set(args.data)
    num = min(args.num, len(items))
    chosen = np.random.default_rng(args.seed).permutation(len(items))[:num]
    pictures, titles = [], []
    for index in sorted(int(i) for i in chosen):
        item = items[index]
        if isinstance(item, Chat):
            pictures.append(draw_chat(item))
            titles.append(f"{item.id}: {len(item.turns)} turns")
        else:
            pictures.append(draw_record(item))
            titles.append(f"{item.id}: {item.captions[0] if item.captions else 'no caption'}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(pictures, titles).save(args.output)
    print(f"{num} of {len(items):,} {items.kind} drawn on {args.output}")
