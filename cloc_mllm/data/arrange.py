"""Splits data sets into parts and merges them: `cloc-mllm data split` and `merge`."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.data.parquet import RecordDataset, load_records, write_records
from cloc_mllm.data.records import Record, validate_record


def add_split(commands: Any) -> None:
    split = commands.add_parser(
        "split",
        help="part a data set by a hash of the ids",
        description="A record's part depends on its id and the seed alone: it stays where it is "
        "when the set grows, and two sets that share an image never part it.",
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
        description="Records come in the order of the sets. A later record of an id that was there "
        "is dropped and counted (`duplicate_id`), or joined with --join.",
    )
    merge.add_argument("data", nargs="+", help="directories that `build` made, or their URLs")
    merge.add_argument("--output_dir", metavar="DIR", type=Path, required=True, help="must be new")
    merge.add_argument(
        "--join",
        action="store_true",
        help="records of one id and one image file become one with the captions and regions of all",
    )
    merge.set_defaults(run=_run_merge)


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
    records = load_records(args.data, verify=True)
    for name in parts:
        chosen = (r for r in records if part_of(r.id, parts, args.seed) == name)
        arguments = {"source": str(args.data), "part": name, "share": parts[name]}
        count = write_records(
            tqdm(chosen, desc=name, unit=" records"),
            args.output_dir / name,
            arguments={**arguments, "seed": args.seed},
        )
        print(f"{name}: {count:,} records in {args.output_dir / name}")


def _run_merge(args: argparse.Namespace) -> None:
    datasets = [load_records(place, verify=True) for place in args.data]
    drop_log = DropLog()
    merged = merge_records(datasets, join=args.join, drop_log=drop_log)
    write_records(
        tqdm(merged, desc="merging", unit=" records"),
        args.output_dir,
        arguments={"source": "merge", "data": list(map(str, args.data)), "join": args.join},
        drop_log=drop_log,
    )
    print(drop_log.summary())
    print(f"written to {args.output_dir}")


def merge_records(
    datasets: Sequence[RecordDataset], *, join: bool, drop_log: DropLog
) -> Iterator[Record]:
    """Yields the records of all sets, validated; see `add_merge`.

    With `join` a record also takes the captions and regions of later records with its id and
    exactly its image file; what both have is kept once. A later one with another file is dropped.
    """
    all_places = [
        (number, index) for number, dataset in enumerate(datasets) for index in range(len(dataset))
    ]
    places_of: dict[str, list[tuple[int, int]]] = {}
    for number, index in all_places if join else ():
        places_of.setdefault(datasets[number][index].id, []).append((number, index))
    for place in all_places:
        record = datasets[place[0]][place[1]]
        first, *later = places_of.get(record.id, [place])
        if place == first:
            for number, index in later:
                record = _joined(record, datasets[number][index])
        elif datasets[first[0]][first[1]].image == record.image:
            drop_log.note("records joined to an earlier one")
            continue
        valid = validate_record(record, drop_log)
        if valid is not None:
            yield valid


def _joined(record: Record, other: Record) -> Record:
    if other.image != record.image:
        return record
    captions = [text for text in other.captions if text not in record.captions]
    regions = [region for region in other.regions if region not in record.regions]
    return replace(record, captions=record.captions + captions, regions=record.regions + regions)
