"""Splits, merges and filters data sets: `cloc-mllm data split`, `merge` and `filter`."""

from __future__ import annotations

import argparse
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cloc_mllm.data.chats import Chat, validate_chat
from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.data.parquet import (
    RecordDataset,
    load_records,
    load_set,
    write_chats,
    write_records,
)
from cloc_mllm.data.records import Record, validate_record
from cloc_mllm.data.texts import lines_of, read_text


def add_split(commands: Any) -> None:
    split = commands.add_parser(
        "split",
        help="part a data set by a hash of the ids (chats: of their first image)",
        description="A record's part depends on its id and the seed alone: it stays where it is "
        "when the set grows, and two sets that share an image never part it. A chat's part depends "
        "on its first image, or on its id if it has none.",
    )
    split.add_argument("data", help="a directory that `build` made, or its URL")
    split.add_argument(
        "--output_dir", metavar="DIR", type=Path, required=True, help="one folder per part"
    )
    split.add_argument(
        "--parts",
        metavar="NAME=SHARE",
        nargs="+",
        default=["train=0.9", "validation=0.05", "test=0.05"],
        help="default: %(default)s",
    )
    split.add_argument("--seed", metavar="N", type=int, default=0, help="default: %(default)s")
    split.set_defaults(run=_run_split)


def add_merge(commands: Any) -> None:
    merge = commands.add_parser(
        "merge",
        help="join data sets into one",
        description="Records, or chats, come in the order of the sets. A later one of an id and "
        "image that was there is dropped and counted (`duplicate_id`); records may be joined with "
        "--join. One id on two images is refused: see --prefix_ids.",
    )
    merge.add_argument("data", nargs="+", help="directories that `build` made, or their URLs")
    merge.add_argument("--output_dir", metavar="DIR", type=Path, required=True, help="must be new")
    merge.add_argument(
        "--join",
        action="store_true",
        help="records of one id and one image file become one with the captions and regions of all",
    )
    merge.add_argument(
        "--prefix_ids",
        action="store_true",
        help="put the name of each set's directory before its ids (`train/17`): for sets that were "
        "numbered apart, such as the splits of an annotation tool",
    )
    merge.set_defaults(run=_run_merge)


def add_filter(commands: Any) -> None:
    choose = commands.add_parser(
        "filter",
        help="leave records out of a data set",
        description="Writes a new data set of the records that have all that is asked for. The "
        "others are counted, and so are their regions and captions.",
    )
    choose.add_argument("data", help="a directory that `build` made, or its URL")
    choose.add_argument("--output_dir", metavar="DIR", type=Path, required=True, help="must be new")
    for what in ("regions", "captions"):
        choose.add_argument(
            f"--min_{what}", metavar="N", type=int, default=0, help=f"{what} of a record, at least"
        )
    for option, text in (("ids", "keep only these"), ("without_ids", "leave these out")):
        choose.add_argument(
            f"--{option}", metavar="FILE", type=Path, help=f"{text}: a text file of one id per line"
        )
    choose.set_defaults(run=_run_filter)


def parse_parts(texts: Sequence[str]) -> dict[str, float]:
    """Reads `["train=0.9", "test=0.1"]` as shares by name; ValueError unless they add up to 1."""
    parts: dict[str, float] = {}
    for text in texts:
        name, _, share = text.partition("=")
        try:
            parts[name] = float(share)
        except ValueError as error:
            raise ValueError(f"expected NAME=SHARE, got {text!r}") from error
        if not name.replace("-", "").replace("_", "").isalnum() or not 0 < parts[name] <= 1:
            raise ValueError(f"expected a plain name and a share up to 1, got {text!r}")
    if len(parts) != len(texts) or abs(sum(parts.values()) - 1) > 1e-9:
        raise ValueError(f"expected different names and shares that add up to 1, got {texts}")
    return parts


def part_of(record_id: str, parts: dict[str, float], seed: int) -> str:
    digest = hashlib.sha256(f"{seed}/{record_id}".encode("utf-8", "surrogatepass")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    names = list(parts)
    for name in names:
        place -= parts[name]
        if place < 0:
            return name
    return names[-1]


def _run_split(args: argparse.Namespace) -> None:
    parts = parse_parts(args.parts)
    items: Any = load_set(args.data, verify=True)
    write: Any = write_chats if items.kind == "chats" else write_records
    for name in parts:
        chosen = (of for of in items if part_of(_split_key(of), parts, args.seed) == name)
        if (first := next(chosen, None)) is None:
            raise ValueError(
                f"part {name} (share {parts[name]:g}) gets none of the {len(items):,} "
                f"{items.kind}; give it a larger share, or take a larger set"
            )
        arguments = {"source": str(args.data), "part": name, "share": parts[name]}
        count = write(
            tqdm(itertools.chain([first], chosen), desc=name, unit=f" {items.kind}"),
            args.output_dir / name,
            arguments={**arguments, "seed": args.seed},
        )
        print(f"{name}: {count:,} {items.kind} in {args.output_dir / name}")


def _split_key(item: Record | Chat) -> str:
    """What decides the part of an item: chats that show the same first image stay together."""
    if isinstance(item, Chat) and item.images:
        return hashlib.sha256(item.images[0].image).hexdigest()
    return item.id


def _run_merge(args: argparse.Namespace) -> None:
    sets: Any = [load_set(place, verify=True) for place in args.data]
    kinds = {of.kind for of in sets}
    if len(kinds) > 1:
        raise ValueError(
            "records and chats do not merge into one set; train on both with data.mixture"
        )
    is_chats = kinds == {"chats"}
    if is_chats and args.join:
        raise ValueError("--join is for records; chats of one id stay apart")
    drop_log = DropLog()
    merged: Any
    if is_chats:
        chats = itertools.chain.from_iterable(sets)
        merged = (valid for chat in chats if (valid := validate_chat(chat, drop_log)))
    else:
        prefixes = _prefixes(args.data) if args.prefix_ids else [""] * len(sets)
        merged = merge_records(sets, join=args.join, prefixes=prefixes, drop_log=drop_log)
    write: Any = write_chats if is_chats else write_records
    write(
        tqdm(merged, desc="merging", unit=" chats" if is_chats else " records"),
        args.output_dir,
        arguments={"source": "merge", "data": list(map(str, args.data)), "join": args.join},
        drop_log=drop_log,
    )
    print(drop_log.summary())
    print(f"written to {args.output_dir}")


def _run_filter(args: argparse.Namespace) -> None:
    wanted, unwanted = (
        None if path is None else {line.strip() for line in lines_of(read_text(path))}
        for path in (args.ids, args.without_ids)
    )

    def is_wanted(record: Record) -> bool:
        return (
            len(record.regions) >= args.min_regions
            and len(record.captions) >= args.min_captions
            and (wanted is None or record.id in wanted)
            and (unwanted is None or record.id not in unwanted)
        )

    if not (args.min_regions or args.min_captions or args.ids or args.without_ids):
        raise ValueError(
            "nothing to filter by; name --min_regions, --min_captions, --ids or --without_ids"
        )
    drop_log = DropLog()
    records = load_records(args.data, verify=True)
    write_records(
        tqdm(chosen_records(records, is_wanted, drop_log), desc="filter", unit=" records"),
        args.output_dir,
        arguments={
            "source": "filter",
            "data": str(args.data),
            "min_regions": args.min_regions,
            "min_captions": args.min_captions,
            **{key: str(path) for key, path in vars(args).items() if "ids" in key and path},
        },
        drop_log=drop_log,
    )
    num_out = drop_log.num_set_aside("record")
    print(f"{drop_log.summary()}\n{num_out:,} of {len(records):,} records were left out")
    print(f"written to {args.output_dir}")


def chosen_records(
    records: Iterable[Record], is_wanted: Callable[[Record], bool], drop_log: DropLog
) -> Iterator[Record]:
    """The wanted records, validated; the others are set aside with their parts."""
    for record in records:
        if is_wanted(record):
            valid = validate_record(record, drop_log)
            if valid is not None:
                yield valid
            continue
        drop_log.put_aside("record", "filtered")
        drop_log.put_aside("region", "filtered", len(record.regions))
        drop_log.put_aside(
            "expression", "filtered", sum(len(region.expressions) for region in record.regions)
        )
        drop_log.put_aside("caption", "filtered", len(record.captions))


def _prefixes(places: Sequence[str]) -> list[str]:
    names = [place.rstrip("/").rpartition("/")[2] for place in places]
    if len(set(names)) < len(names):
        raise ValueError(
            f"--prefix_ids needs directories of different names, got {', '.join(names)}; rename one"
        )
    return [f"{name}/" for name in names]


def merge_records(
    datasets: Sequence[RecordDataset],
    *,
    join: bool,
    prefixes: Sequence[str] = (),
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields the records of all sets, validated; see `add_merge`.

    With `join` a record also takes the captions and regions of later records with its id; what both
    have is kept once.

    Args:
        prefixes: one per set, to stand before its ids.

    Raises:
        ValueError: one id stands for different image files.
    """
    prefixes = prefixes or [""] * len(datasets)
    all_places = [
        (number, index) for number, dataset in enumerate(datasets) for index in range(len(dataset))
    ]
    places_of: dict[str, list[tuple[int, int]]] = {}
    for number, index in all_places if join else ():
        record_id = prefixes[number] + datasets[number][index].id
        places_of.setdefault(record_id, []).append((number, index))
    first_places: dict[str, tuple[int, int]] = {}
    for place in all_places:
        record = datasets[place[0]][place[1]]
        record = replace(record, id=prefixes[place[0]] + record.id)
        first = first_places.setdefault(record.id, place)
        if place != first and datasets[first[0]][first[1]].image != record.image:
            raise ValueError(
                f"id {record.id!r} stands for different images in set {first[0] + 1} and set "
                f"{place[0] + 1}; sets that were numbered apart need --prefix_ids"
            )
        if join and place != first:
            drop_log.note("records joined to an earlier one")
            continue
        for number, index in places_of.get(record.id, [])[1:]:
            record = _joined(record, datasets[number][index])
        valid = validate_record(record, drop_log)
        if valid is not None:
            yield valid


def _joined(record: Record, other: Record) -> Record:
    captions = [text for text in other.captions if text not in record.captions]
    regions = [region for region in other.regions if region not in record.regions]
    return replace(record, captions=record.captions + captions, regions=record.regions + regions)
