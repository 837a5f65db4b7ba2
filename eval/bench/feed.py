"""Images per CPU second of stage 1's loader, by the side that photos are stored at, and the cores
that GPUs then need.

    cloc-mllm data build coco ... --output_dir runs/data/coco
    python eval/bench/feed.py --data runs/data/coco --images_per_second 2275 --gpus 8

One process reads records, decodes, letterboxes and makes batches; CPU time is counted, so that
other work on the machine matters little. `--images_per_second` is what one GPU trains: the images
of a step over its time in `cloc-mllm stage1 --dry_run --gpu h100`.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.data.collate import ClocCollator
from cloc_mllm.data.images import reduced
from cloc_mllm.data.parquet import load_records, write_records
from cloc_mllm.data.records import Record
from cloc_mllm.data.tokenizer import load_text_tokenizer
from cloc_mllm.data.transforms import Preprocessing


def stored_at(records: Sequence[Record], max_side: int) -> list[Record]:
    """The records as `data build --max_side` stores them; 0 leaves them as they are."""
    smaller = []
    for record in records:
        image = record.load_image()
        if 0 < max_side < max(image.size):
            data, picture = reduced(image, max_side)
            width, height = picture.size
            record = dataclasses.replace(record, image=data, width=width, height=height)
        smaller.append(record)
    return smaller


def images_per_cpu_second(
    records: Sequence[Record], collator: ClocCollator, *, batch_size: int, rounds: int
) -> float:
    """The best of some rounds over records on the disk, in batches, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        write_records(records, Path(folder) / "set")
        best = 0.0
        for _ in range(rounds + 1):  # the first fills caches
            stored = load_records(Path(folder) / "set")
            start = time.process_time()
            for first in range(0, len(stored), batch_size):
                collator(list(enumerate(stored[first : first + batch_size])))
            best = max(best, len(stored) / (time.process_time() - start))
    return best


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="feed", description=__doc__)
    parser.add_argument("--data", required=True, help="records with photos as they came")
    parser.add_argument("--max_sides", type=int, nargs="+", default=[0, 448, 320, 224])
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--images_per_second", type=float, default=2275, help="of one GPU")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    records = load_records(args.data)[:512]
    tokenizer = load_text_tokenizer("open_clip:ViT-B-16", 77)
    collator = ClocCollator(tokenizer, Preprocessing(args.image_size), regions_per_image=4)
    print(f"{len(records)} photos for a canvas of {args.image_size} px; {args.gpus} GPUs train "
          f"{args.gpus * args.images_per_second:,.0f} images/s")  # fmt: skip
    print("stored at   KB per photo   images per CPU second   gain   cores needed")
    first = 0.0
    for side in args.max_sides:
        smaller = stored_at(records, side)
        rate = images_per_cpu_second(smaller, collator, batch_size=32, rounds=args.rounds)
        first = first or rate
        kilobytes = sum(len(record.image) for record in smaller) / len(smaller) / 1000
        cores = args.gpus * args.images_per_second / rate
        name = f"{side} px" if side else "as it came"
        print(f"{name:<11} {kilobytes:12.1f} {rate:23,.0f} {rate / first:6.2f} {cores:14,.0f}")


if __name__ == "__main__":
    sys.exit(run(main))
