"""`cloc-mllm data build`: turns a source into a directory of Parquet records or chats."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cloc_mllm.data.acceptance import RefusedBuildError
from cloc_mllm.data.arguments import positive, share
from cloc_mllm.data.checks.judge import describe_all, judge, the_one, unknown_layout, verdict
from cloc_mllm.data.conversation_sources import add_kind
from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.data.parquet import DROPS_NAME, write_chats, write_records
from cloc_mllm.data.records import Record, validate_record
from cloc_mllm.data.scenes import SPLITS, generate_scenes
from cloc_mllm.data.sources import add_formats, add_read_options, read_options

_SCENES_PER_TASK = 8

_EPILOG = """\
Every image, box and text that cannot be used is dropped and counted by reason; the closing
summary and drops.jsonl (in the directory) say what was found and what would have been right. What
a declared rule leaves out (crowds, other splits) is set aside and is no loss. The directory
appears only when it is whole.

Options may be typed with hyphens, too (--max-drop-share), and cut short (--out).

exit status: 0 done; 2 wrong input, more than --max_drop_share of any kind (records, regions,
expressions, captions; chats, turns, places) dropped, or nothing to learn from
(see --allow_no_regions)
"""


def add_build(commands: Any) -> None:
    build = commands.add_parser("build", help="turn a source into Parquet records or chats")
    sources = build.add_subparsers(metavar="SOURCE", required=True, dest="source")
    _add_scenes(sources)
    _add_auto(sources)
    add_formats(sources)
    for parser in sources.choices.values():
        _add_shared_options(parser)


def _add_shared_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        type=Path,
        required=True,
        help="directory to make; must be new",
    )
    parser.add_argument(
        "--shard_size",
        metavar="N",
        type=positive,
        default=1000,
        help="records or chats per file (default: %(default)s)",
    )
    parser.add_argument(
        "--max_drop_share",
        metavar="SHARE",
        type=share,
        default=0.05,
        help="largest share of any kind (records, regions, expressions, captions, chats, turns, "
        "places) that may be dropped; beyond it nothing is written (default: %(default)s; raise it "
        "where only part of the photos is at hand)",
    )
    parser.add_argument(
        "--allow_no_regions",
        action="store_true",
        help="write a set without any region, also where regions were read or captions are none; "
        "chats without any box, also where their words have groups of four numbers",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if args.source == "auto":
        args = _chosen(args)
    drop_log = DropLog()
    items = args.read(args, drop_log)
    arguments = {
        key: value if isinstance(value, (bool, float, int, type(None))) else str(value)
        for key, value in vars(args).items()
        if key not in ("run", "read")
    }
    is_chats = vars(args).get("kind") == "chats"
    unit = " chats" if is_chats else " records"
    items = tqdm(items, desc=args.source, unit=unit, total=vars(args).get("num"))
    shared = {
        "shard_size": args.shard_size,
        "arguments": arguments,
        "drop_log": drop_log,
        "max_drop_share": args.max_drop_share,
        "allow_no_regions": args.allow_no_regions,
    }
    try:
        if is_chats:
            write_chats(items, args.output_dir, **shared)
        else:
            write_records(items, args.output_dir, **shared)
    except RefusedBuildError:
        _print(drop_log)
        if drop_log.drops:
            report = args.output_dir.with_name(f"{args.output_dir.name}.{DROPS_NAME}")
            drop_log.write(report)
            print(f"every dropped item with its reason: {report}")
        raise
    _print(drop_log)
    print(f"written to {args.output_dir}")


def _print(drop_log: DropLog) -> None:
    print(drop_log.summary())
    if explained := drop_log.explained():
        print(f"\ndropped, the most frequent reasons:\n{explained}\n")


def _add_auto(sources: Any) -> None:
    auto = sources.add_parser(
        "auto",
        help="whatever lies at PATH, if exactly one reading fits",
        description="Runs `data doctor`, says what it takes the files for and why, and builds\n"
        "them where exactly one reading fits. Where several or none do, it lists them with\n"
        "the command of each and builds nothing.",
    )
    auto.add_argument("path", metavar="PATH", type=Path, help="file, folder, zip or tar")
    auto.add_argument(
        "--images",
        metavar="PATH",
        type=Path,
        help="folder, tar or zip (default: looked for in and beside PATH)",
    )
    add_read_options(auto)
    add_kind(auto)


def _chosen(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments of the only reading that fits, with what the user said of the build.

    Raises:
        ValueError: none or several fit, or images are missing; all readings were printed before.
    """
    judgements = judge(args.path, args.images, read_options(args), args.conversations_as)
    if not judgements:
        raise ValueError(f"{args.path}: {unknown_layout(args.path, args.encoding)}")
    print(f"{describe_all(judgements)}\n")
    found = the_one(judgements)
    if found is None:
        raise ValueError(f"{args.path}: {verdict(judgements)}; nothing was written")
    if found.is_blind:
        raise ValueError(
            f"{args.path}: none of its images was found; name their folder, tar or zip with "
            "--images"
        )
    if found.share_missing > args.max_drop_share:
        raise ValueError(
            f"{found.share_missing:.0%} of the images are missing in {found.options['images']}; "
            "nothing was written. Name their place with --images, or allow it with a larger "
            "--max_drop_share"
        )
    return argparse.Namespace(**{**vars(args), **vars(found.parsed()), "source": found.source})


def _add_scenes(sources: Any) -> None:
    summary = "built-in scenes of OpenMoji pictures"
    scenes = sources.add_parser("scenes", help=summary, description=summary)
    scenes.set_defaults(read=_read_scenes)
    scenes.add_argument(
        "--num", metavar="N", type=positive, default=1000, help="scenes (default: %(default)s)"
    )
    scenes.add_argument("--split", choices=SPLITS, default="train", help="default: %(default)s")
    scenes.add_argument("--seed", metavar="N", type=int, default=0, help="default: %(default)s")
    scenes.add_argument(
        "--long_side",
        metavar="PX",
        type=positive,
        default=128,
        help="pixels (default: %(default)s)",
    )
    scenes.add_argument(
        "--workers",
        metavar="N",
        type=positive,
        default=1,
        help="processes; the records are the same for any number (default: %(default)s)",
    )


def _read_scenes(args: argparse.Namespace, drop_log: DropLog) -> Iterator[Record]:
    draw = partial(_draw_scenes, args.split, args.seed, args.long_side)
    spans = [
        (start, min(_SCENES_PER_TASK, args.num - start))
        for start in range(0, args.num, _SCENES_PER_TASK)
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
