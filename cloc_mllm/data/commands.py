"""`cloc-mllm data`: its commands, of which build, stats and inspect stand here."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cloc_mllm.data.arrange import add_merge, add_split
from cloc_mllm.data.checks.doctor import add_doctor
from cloc_mllm.data.checks.fetch_report import add_fetch_report
from cloc_mllm.data.checks.leaks import add_leak_check
from cloc_mllm.data.checks.validate import add_validate
from cloc_mllm.data.drawing import contact_sheet, draw_record
from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.data.export import add_export
from cloc_mllm.data.parquet import (
    DROPS_NAME,
    RefusedBuildError,
    load_records,
    read_manifest,
    write_records,
)
from cloc_mllm.data.readers.coco import read_coco
from cloc_mllm.data.readers.flickr30k_entities import read_flickr30k_entities
from cloc_mllm.data.readers.image_folder import read_image_folder
from cloc_mllm.data.readers.refcoco import read_refcoco
from cloc_mllm.data.records import Record, validate_record
from cloc_mllm.data.scenes import SPLITS, generate_scenes
from cloc_mllm.data.sources import add_format_sources
from cloc_mllm.data.statistics import describe_records

_SCENES_A_TASK = 8
_BUILD_EPILOG = """\
Every image, box and text that cannot be used is dropped and counted by reason; the closing
summary and drops.jsonl (in the directory) list them. The directory appears only when it is whole.

exit status: 0 done, 2 wrong input or more than --max-drop-share of the records dropped
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `data` command and return its exit status.

    Wrong input raises ValueError or OSError for the caller to print.
    """
    args = build_parser().parse_args(argv)
    return args.run(args) or 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cloc-mllm data",
        description="Make records (images with texts and boxes), look at them.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    build = commands.add_parser("build", help="turn a source into a directory of Parquet records")
    sources = build.add_subparsers(metavar="SOURCE", required=True, dest="source")
    _add_scenes(sources)
    _add_flickr30k_entities(sources)
    _add_coco(sources)
    _add_refcoco(sources)
    _add_image_folder(sources)
    add_format_sources(sources, _add_source)

    stats = commands.add_parser("stats", help="print counts and distributions")
    stats.add_argument("data", help="a directory that `build` made, or its URL")
    stats.set_defaults(run=_run_stats)

    inspect = commands.add_parser("inspect", help="draw a sheet of images with boxes and phrases")
    inspect.add_argument("data", help="a directory that `build` made, or its URL")
    inspect.add_argument(
        "--out", metavar="PNG", type=Path, default=Path("sheet.png"), help="default: %(default)s"
    )
    inspect.add_argument(
        "--num", metavar="N", type=_positive, default=16, help="images (default: %(default)s)"
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
    add_leak_check(commands)
    add_doctor(commands)
    add_fetch_report(commands)
    return parser


def _add_source(sources: Any, name: str, summary: str, read: Any) -> argparse.ArgumentParser:
    """A source's parser with what all share; `read(args, drop_log)` yields its records."""
    parser: argparse.ArgumentParser = sources.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=_BUILD_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="directory to make; must be new"
    )
    parser.add_argument(
        "--shard-size",
        metavar="N",
        type=_positive,
        default=1000,
        help="records a file (default: %(default)s)",
    )
    parser.add_argument(
        "--max-drop-share",
        metavar="SHARE",
        type=_share,
        default=0.05,
        help="largest share of records that may be dropped; beyond it nothing is written "
        "(default: %(default)s; raise it where only part of the photos is at hand)",
    )
    parser.set_defaults(run=_run_build, read=read)
    return parser


def _add_scenes(sources: Any) -> None:
    scenes = _add_source(sources, "scenes", "built-in scenes of OpenMoji pictures", _read_scenes)
    scenes.add_argument(
        "--num", metavar="N", type=_positive, default=1000, help="scenes (default: %(default)s)"
    )
    scenes.add_argument("--split", choices=SPLITS, default="train", help="default: %(default)s")
    scenes.add_argument("--seed", metavar="N", type=int, default=0, help="default: %(default)s")
    scenes.add_argument(
        "--long-side",
        metavar="PX",
        type=_positive,
        default=128,
        help="pixels (default: %(default)s)",
    )
    scenes.add_argument(
        "--workers",
        metavar="N",
        type=_positive,
        default=1,
        help="processes; the records are the same for any number (default: %(default)s)",
    )


def _add_flickr30k_entities(sources: Any) -> None:
    flickr = _add_source(
        sources,
        "flickr30k-entities",
        "Flickr30k Entities: Annotations/ and Sentences/",
        lambda args, drop_log: read_flickr30k_entities(
            args.annotations,
            args.images,
            ids=args.ids.read_text(encoding="utf-8").split() if args.ids else None,
            drop_log=drop_log,
        ),
    )
    flickr.add_argument(
        "--annotations", metavar="PATH", type=Path, required=True, help="folder or zip"
    )
    flickr.add_argument(
        "--images", metavar="PATH", type=Path, required=True, help="folder, tar or zip of ID.jpg"
    )
    flickr.add_argument(
        "--ids", metavar="FILE", type=Path, help="text file of photo ids (default: all annotated)"
    )


def _add_coco(sources: Any) -> None:
    coco = _add_source(
        sources,
        "coco",
        "COCO or LVIS: instances and captions",
        lambda args, drop_log: read_coco(
            args.instances,
            args.images,
            captions=args.captions,
            keep_crowd=args.keep_crowd,
            ids=set(args.ids.read_text(encoding="utf-8").split()) if args.ids else None,
            drop_log=drop_log,
        ),
    )
    coco.add_argument(
        "--instances",
        metavar="FILE",
        type=Path,
        required=True,
        help="instances_*.json, lvis_v1_*.json",
    )
    coco.add_argument(
        "--images", metavar="PATH", type=Path, required=True, help="folder, tar or zip"
    )
    coco.add_argument("--captions", metavar="FILE", type=Path, help="captions_*.json")
    coco.add_argument("--keep-crowd", action="store_true", help="keep boxes around crowds")
    coco.add_argument("--ids", metavar="FILE", type=Path, help="text file of image ids")


def _add_refcoco(sources: Any) -> None:
    refcoco = _add_source(
        sources,
        "refcoco",
        "RefCOCO, RefCOCO+ or RefCOCOg as JSON rows, one an expression",
        lambda args, drop_log: read_refcoco(args.rows, args.images, drop_log=drop_log),
    )
    refcoco.add_argument("--rows", metavar="FILE", type=Path, required=True, help="JSON file")
    refcoco.add_argument(
        "--images", metavar="PATH", type=Path, required=True, help="folder, tar or zip"
    )


def _add_image_folder(sources: Any) -> None:
    folder = _add_source(
        sources,
        "image-folder",
        "images in one folder a class (ImageNet's layout), for zero-shot classification",
        lambda args, drop_log: read_image_folder(
            args.images, class_names=args.class_names, drop_log=drop_log
        ),
    )
    folder.add_argument(
        "--images", metavar="DIR", type=Path, required=True, help="folder of folders"
    )
    folder.add_argument(
        "--class-names",
        metavar="FILE",
        type=Path,
        help="JSON folder -> name, or lines `folder name` (default: the folders' names; "
        "ImageNet's for its 1,000 folders)",
    )


def _run_build(args: argparse.Namespace) -> None:
    drop_log = DropLog()
    num = vars(args).get("num")
    arguments = {
        key: value if isinstance(value, (bool, float, int, type(None))) else str(value)
        for key, value in vars(args).items()
        if key not in ("run", "read")
    }
    try:
        write_records(
            tqdm(args.read(args, drop_log), desc=args.source, unit=" records", total=num),
            args.out,
            shard_size=args.shard_size,
            arguments=arguments,
            drop_log=drop_log,
            max_drop_share=args.max_drop_share,
        )
    except RefusedBuildError:
        print(drop_log.summary())
        report = args.out.with_name(f"{args.out.name}.{DROPS_NAME}")
        drop_log.write(report)
        print(f"every dropped item with its reason: {report}")
        raise
    print(drop_log.summary())
    print(f"written to {args.out}")


def _read_scenes(args: argparse.Namespace, drop_log: DropLog) -> Iterator[Record]:
    draw = partial(_draw_scenes, args.split, args.seed, args.long_side)
    spans = [
        (start, min(_SCENES_A_TASK, args.num - start))
        for start in range(0, args.num, _SCENES_A_TASK)
    ]
    if args.workers == 1:
        yield from _validated(map(draw, spans), drop_log)
        return
    with multiprocessing.Pool(args.workers) as pool:
        yield from _validated(pool.imap(draw, spans), drop_log)


def _draw_scenes(split: Any, seed: int, long_side: int, span: tuple[int, int]) -> list[Record]:
    start, num_scenes = span
    return list(
        generate_scenes(num_scenes, split=split, seed=seed, long_side=long_side, start=start)
    )


def _validated(batches: Iterator[list[Record]], drop_log: DropLog) -> Iterator[Record]:
    for batch in batches:
        for record in batch:
            valid = validate_record(record, drop_log)
            if valid is not None:
                yield valid


def _run_stats(args: argparse.Namespace) -> None:
    records = load_records(args.data, verify=True)
    print(describe_records(tqdm(records, desc="reading", unit=" records", leave=False)))
    if not args.data.endswith(".parquet"):
        manifest = read_manifest(args.data)
        for kind, reasons in manifest["dropped"].items():
            listed = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
            print(f"\ndropped {kind}s: {listed}")
        for what, count in manifest["notes"].items():
            print(f"\nnot used: {count:,} {what}")


def _run_inspect(args: argparse.Namespace) -> None:
    records = load_records(args.data)
    num = min(args.num, len(records))
    chosen = np.random.default_rng(args.seed).permutation(len(records))[:num]
    pictures, titles = [], []
    for index in sorted(int(i) for i in chosen):
        record = records[index]
        pictures.append(draw_record(record))
        titles.append(f"{record.id}: {record.captions[0] if record.captions else 'no caption'}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(pictures, titles).save(args.out)
    print(f"{num} of {len(records):,} records drawn on {args.out}")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {value}")
    return value
