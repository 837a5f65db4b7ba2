"""`cloc-mllm data leak-check`: training images that sit in an evaluation set."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from cloc_mllm.data.parquet import load_records
from cloc_mllm.data.records import Record

MAX_DISTANCE = 6  # of 64 bits
_ROWS_AT_ONCE = 4096
# COCO's and Flickr's numbers, in whatever name: COCO_train2014_000000580957_4, coco/.../x.jpg
_NUMBER = re.compile(r"(?:^|[_/])0*(\d{4,})(?:_\d{1,3})?$")


@dataclass(frozen=True)
class Leak:
    """`distance`: bits by which the pictures' hashes differ; `mirrored`: one is the other's."""

    train_id: str
    eval_set: str
    eval_id: str
    why: str
    distance: int
    mirrored: bool


@dataclass(frozen=True)
class Fingerprints:
    """The `ids` of N records, and the `hashes: uint64[N]` of their pictures."""

    ids: list[str]
    hashes: np.ndarray


def add_leak_check(commands: Any) -> None:
    check = commands.add_parser(
        "leak-check",
        help="find training images that sit in evaluation sets",
        description="Compares ids (COCO's and Flickr's numbers in any spelling) and perceptual "
        "hashes, mirrored ones too, so resized, squashed and recompressed copies are found.",
        epilog="exit status: 0 no leak, 1 at least one, 2 wrong input",
    )
    check.add_argument("train", help="a directory that `build` made, or its URL")
    check.add_argument("evaluation", nargs="+", help="likewise, one or several")
    check.add_argument(
        "--max_distance",
        metavar="BITS",
        type=int,
        default=MAX_DISTANCE,
        help="largest difference of two hashes of 64 bits that counts (default: %(default)s)",
    )
    check.add_argument("--report", metavar="JSONL", type=Path, help="write every pair here")
    check.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    train = fingerprint(tqdm(load_records(args.train), desc="train", unit=" images"))
    leaks: list[Leak] = []
    for place in args.evaluation:
        records = load_records(place)
        upright = fingerprint(tqdm(records, desc=place, unit=" images"))
        mirrored = fingerprint(records, mirror=True)
        found = list(find_leaks(train, upright, mirrored, place, args.max_distance))
        num_images = len({leak.train_id for leak in found})
        print(f"{place}: {num_images:,} of {len(train.ids):,} training images are in it")
        leaks += found
    for leak in leaks[:20]:
        print(f"  {leak.train_id} = {leak.eval_id} ({leak.why}, {leak.distance} bits apart)")
    if len(leaks) > 20:
        print(f"  and {len(leaks) - 20:,} more; all of them with --report")
    if args.report is not None:
        lines = (json.dumps(asdict(leak)) + "\n" for leak in leaks)
        args.report.write_text("".join(lines), encoding="utf-8")
    return 1 if leaks else 0


def fingerprint(records: Iterable[Record], mirror: bool = False) -> Fingerprints:
    """Perceptual hashes (DCT of 32 x 32 grey pixels, imagehash's `phash`) of the pictures."""
    import imagehash

    ids, hashes = [], []
    for record in records:
        image: Image.Image = record.load_image(wanted_side=64)
        if mirror:
            image = ImageOps.mirror(image)
        bits = imagehash.phash(image).hash.ravel()
        hashes.append(int.from_bytes(np.packbits(bits).tobytes(), "big"))
        ids.append(record.id)
    return Fingerprints(ids, np.array(hashes, dtype=np.uint64))


def find_leaks(
    train: Fingerprints,
    upright: Fingerprints,
    mirrored: Fingerprints,
    eval_set: str,
    max_distance: int = MAX_DISTANCE,
) -> Iterator[Leak]:
    """Pairs of one id or one picture; a pair that is both comes once."""
    numbers: dict[str, list[int]] = {}
    for index, eval_id in enumerate(upright.ids):
        numbers.setdefault(id_key(eval_id), []).append(index)
    for start in range(0, len(train.ids), _ROWS_AT_ONCE):
        rows = train.hashes[start : start + _ROWS_AT_ONCE, None]
        plain = np.bitwise_count(rows ^ upright.hashes[None])
        flipped = np.bitwise_count(rows ^ mirrored.hashes[None])
        nearest = np.minimum(plain, flipped)
        pairs = set(map(tuple, np.argwhere(nearest <= max_distance).tolist()))
        for row, train_id in enumerate(train.ids[start : start + _ROWS_AT_ONCE]):
            pairs |= {(row, column) for column in numbers.get(id_key(train_id), [])}
        for row, column in sorted(pairs):
            train_id, eval_id = train.ids[start + row], upright.ids[column]
            why = _why(train_id, eval_id, int(nearest[row, column]) <= max_distance)
            distance, mirror = (
                int(nearest[row, column]),
                bool(flipped[row, column] < plain[row, column]),
            )
            yield Leak(train_id, eval_set, eval_id, why, distance, mirror)


def id_key(record_id: str) -> str:
    """The number of a COCO or Flickr photo, else the id itself."""
    match = _NUMBER.search(record_id)
    return match[1] if match else record_id


def _why(train_id: str, eval_id: str, same_picture: bool) -> str:
    reasons: Sequence[str] = [
        *(["same id"] if id_key(train_id) == id_key(eval_id) else []),
        *(["same picture"] if same_picture else []),
    ]
    return ", ".join(reasons)
