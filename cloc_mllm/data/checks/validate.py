"""`cloc-mllm data validate`: read a data set again; say what is dropped, repaired or damaged."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cloc_mllm.data.arguments import share
from cloc_mllm.data.chats import Chat, validate_chat
from cloc_mllm.data.drop_log import KINDS, DropLog, Kind
from cloc_mllm.data.parquet import load_set, read_manifest
from cloc_mllm.data.records import Record, validate_record
from cloc_mllm.data.statistics import describe_build
from cloc_mllm.data.storage import Place, join, sha256_of


def add_validate(commands: Any) -> None:
    validate = commands.add_parser(
        "validate",
        help="read every record or chat again; count what is dropped, repaired or damaged",
        description="Compares every file with its manifest, decodes every image, checks every box "
        "and text. What `build` dropped is shown, but is no fault of the set.",
        epilog="exit status: 0 fine, 1 more than --max_drop_share of the items of any kind dropped "
        "now, 2 wrong input",
    )
    validate.add_argument("data", help="a directory that `build` made, or its URL")
    validate.add_argument(
        "--max_drop_share",
        metavar="SHARE",
        type=share,
        default=0.0,
        help="largest share of any kind that may be dropped (default: %(default)s)",
    )
    validate.add_argument(
        "--report", metavar="JSONL", type=Path, help="write every dropped item with its reason here"
    )
    validate.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    manifest = read_manifest(args.data)
    drop_log = DropLog()
    whole = whole_items(args.data, drop_log)
    for item in tqdm(whole, desc="checking", unit=" records", leave=False):
        if isinstance(item, Chat):
            check_chat(item, drop_log)
        else:
            check_record(item, drop_log)
    print(drop_log.summary())
    if explained := drop_log.explained():
        print(f"\n{explained}")
    print(f"\n{describe_build(manifest)}")
    if args.report is not None:
        drop_log.write(args.report)
    over = [
        f"{kind}s {drop_log.drop_share(kind):.1%}"
        for kind in KINDS
        if drop_log.drop_share(kind) > args.max_drop_share
    ]
    if over:
        print(f"\ndropped more than --max_drop_share {args.max_drop_share:.1%}: {', '.join(over)}")
    return 1 if over else 0


def whole_items(directory: str | Path, drop_log: DropLog) -> Iterator[Record | Chat]:
    """Records or chats of the files that are what the manifest says; others are dropped.

    The reason is `damaged_shard` and the item `FILE/ROW`.
    """
    manifest = read_manifest(directory)
    kind: Kind = "chat" if manifest.get("kind") == "chats" else "record"
    for file in manifest["files"]:
        place = join(directory, file["name"])
        if _is_whole(place, file["sha256"]):
            yield from load_set(place)
            continue
        for row in range(file["rows"]):
            drop_log.add(kind, f"{file['name']}/{row}", "damaged_shard")


def _is_whole(place: Place, sha256: str) -> bool:
    try:
        return sha256_of(place) == sha256
    except FileNotFoundError:
        return False


def check_chat(chat: Chat, drop_log: DropLog) -> Chat | None:
    """`validate_chat`, and a note for each repair."""
    valid = validate_chat(chat, drop_log)
    if valid is None:
        return None
    if [(of.width, of.height) for of in valid.images] != [
        (of.width, of.height) for of in chat.images[: len(valid.images)]
    ]:
        drop_log.note("repaired: size set to the image file's own")
    pairs = zip(valid.places, chat.places, strict=False)
    clipped = sum(now.boxes != before.boxes for now, before in pairs)
    drop_log.note("repaired: box clipped to the image", clipped)
    return valid


def check_record(record: Record, drop_log: DropLog) -> Record | None:
    """`validate_record`, and a note for each repair: what it changed without dropping it."""
    valid = validate_record(record, drop_log)
    if valid is None:
        return None
    if (valid.width, valid.height) != (record.width, record.height):
        drop_log.note("repaired: size set to the image file's own")
    boxes = {region.box for region in record.regions}
    clipped = sum(region.box not in boxes for region in valid.regions)
    texts = {*record.captions}
    for region in record.regions:
        texts.update([region.phrase, region.category, region.group, *region.expressions])
    changed = sum(text not in texts for text in valid.captions)
    for region in valid.regions:
        changed += sum(text not in texts for text in (region.phrase, *region.expressions))
    for what, count in (("box clipped to the image", clipped), ("text collapsed", changed)):
        if count:
            drop_log.note(f"repaired: {what}", count)
    return valid
