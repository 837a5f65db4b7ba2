"""Images per second of stage 1's loader, with boxes, against open_clip's webdataset pipeline on the
same photos and captions.

    cloc-mllm data build flickr30k-entities ... --output_dir runs/data/flickr8k-train
    PYTHONPATH=DIR python eval/bench/loader.py --data runs/data/flickr8k-train

DIR holds the two packages that the peer needs, unless they are installed; without them the script
says how to get them. Both sides read every photo once, give float32 batches in main memory and end
their workers in the time measured. Take a set of a multiple of batch size times workers, so that
both read as many.
"""

from __future__ import annotations

import functools
import gc
import io
import statistics
import sys
import tarfile
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image

from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.data.collate import ClocCollator
from cloc_mllm.data.parquet import load_records
from cloc_mllm.data.records import Record
from cloc_mllm.data.tokenizer import load_text_tokenizer
from cloc_mllm.data.transforms import Preprocessing
from cloc_mllm.geometry import CanvasTransform
from cloc_mllm.train.data_order import DataOrder, RankBatches, load_batches
from ratio import Ratio, interleaved_ratio, machine_state, report, save_samples

_TOKENIZER = "ViT-B-16"
_PEER = """\
open_clip's training pipeline cannot be imported ({error}). Install it beside this environment
    pip install --target DIR --no-deps 'webdataset<=0.2.86' braceexpand && pip install pandas
(the extra `open_clip_torch[training]` asks for them) and put DIR on the path of this command
alone: PYTHONPATH=DIR python ..."""


class MissingPeerError(ValueError):
    """A package for the comparison is missing; the message says how to install it."""


def summary(ratio: Ratio, num_images: int, bare_rate: float) -> str:
    """Speed-up and images a CPU second, beside those of bare decoding."""
    rate = num_images / statistics.median(ratio.cpu.ours)
    return (
        f"  {1 / ratio.wall.median:.2f}x in wall, {1 / ratio.cpu.median:.2f}x in CPU time; "
        f"{rate:,.0f} images a CPU second, {rate / bare_rate:.2f} of bare decode"
    )


class OurLoader:
    """Epochs of records with captions and boxes, as stage 1 reads them."""

    def __init__(self, data: str, batch_size: int, image_size: int, num_workers: int) -> None:
        self.data, self.batch_size, self.num_workers = data, batch_size, num_workers
        tokenizer = load_text_tokenizer(f"open_clip:{_TOKENIZER}", 77)
        self.collator = ClocCollator(tokenizer, Preprocessing(image_size), regions_per_image=4)

    def epoch(self) -> tuple[list[str], int]:
        """Reads each record once, up to normalised pixels: (ids in order, number of boxes).

        Records are opened anew, so that nothing is left from the epoch before.
        """
        records = load_records(self.data)
        order = DataOrder(len(records), self.batch_size, seed=0)
        num_steps = -(-len(records) // self.batch_size)
        keys = RankBatches(order, 0, num_steps, rank=0, world_size=1)
        ids: list[str] = []
        num_boxes = 0
        for batch in load_batches(records, keys, self.collator, self.num_workers):
            ids += batch.to("cpu").ids
            num_boxes += len(batch.boxes)
        return ids[: len(records)], num_boxes

    def check_delivery(self) -> str:
        """
        Raises:
            ValueError: an epoch does not hold each record of the manifest exactly once.
        """
        expected = Counter(record.id for record in load_records(self.data))
        ids, num_boxes = self.epoch()
        delivered = Counter(ids)
        if delivered != expected:
            missing, extra = expected - delivered, delivered - expected
            raise ValueError(f"missing {list(missing)[:3]}, too often {list(extra)[:3]}")
        return (
            f"delivered {len(ids):,} + quarantined 0 == manifest {expected.total():,}, "
            f"every id once, {num_boxes:,} boxes (an image that does not decode stops the run)"
        )


class OpenClipLoader:
    """`open_clip_train.data.get_wds_dataset` with open_clip's own training transform."""

    def __init__(
        self, shards: Sequence[Path], num_samples: int, batch_size: int, image_size: int
    ) -> None:
        try:
            from open_clip_train import data as peer
        except ImportError as error:
            raise MissingPeerError(_PEER.format(error=error)) from error
        self.peer, self.image_size = peer, image_size
        self.tokenizer = open_clip.get_tokenizer(_TOKENIZER)
        self.arguments = {
            "train_data": "::".join(map(str, shards)),
            "train_num_samples": num_samples,
            "train_data_upsampling_factors": None,
            "dataset_resampled": False,
            "batch_size": batch_size,
            "world_size": 1,
            "seed": 0,
        }

    def epoch(self, num_workers: int) -> int:
        """Reads as many images as the set has, in whole batches: how many came."""
        transform = open_clip.image_transform(self.image_size, is_train=True)
        info = self.peer.get_wds_dataset(
            Namespace(**self.arguments, workers=num_workers),
            transform,
            is_train=True,
            tokenizer=self.tokenizer,
        )
        num_images = sum(len(images) for images, _ in info.dataloader)
        del info  # and its workers, which it keeps for the next epoch: their time counts too
        gc.collect()
        return num_images


def write_tars(records: Sequence[Record], directory: Path, num_shards: int) -> list[Path]:
    """The same image files with their first captions, as webdataset shards."""
    paths = [directory / f"shard-{index:05d}.tar" for index in range(num_shards)]
    for index, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for number in range(index, len(records), num_shards):
                _add_sample(tar, f"{number:08d}", records[number])
    return paths


def _add_sample(tar: tarfile.TarFile, key: str, record: Record) -> None:
    caption = record.captions[0] if record.captions else "a photo"
    for suffix, data in (("jpg", record.image), ("txt", caption.encode())):
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def bare_decode_rate(images: Sequence[bytes], image_size: int) -> float:
    """Images a CPU second of opening, reducing while decoding and resizing the long side, which no
    loader can do without; one thread, the better of two rounds."""
    return len(images) / min(_bare_decode(images, image_size) for _ in range(2))


def _bare_decode(images: Sequence[bytes], image_size: int) -> float:
    start = time.process_time()
    for data in images:
        image: Any = Image.open(io.BytesIO(data))
        size = CanvasTransform(image.width, image.height, image_size).resized_wh
        image.draft("RGB", size)
        image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    return time.process_time() - start


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="loader", description=__doc__)
    parser.add_argument("--data", required=True, help="records with JPEG images")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--output", default="runs/bench/loader.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    machine, results = machine_state(), {}
    records = load_records(args.data)
    bare = bare_decode_rate([record.image for record in records[:512]], args.image_size)
    print(f"{machine}\nbare decode and resize in one process: {bare:,.0f} images a CPU second")
    with tempfile.TemporaryDirectory() as directory:
        tars = write_tars(records, Path(directory), num_shards=8)
        theirs = OpenClipLoader(tars, len(records), args.batch_size, args.image_size)
        for workers in args.workers:
            ours = OurLoader(args.data, args.batch_size, args.image_size, workers)
            print(f"{workers} worker(s): {ours.check_delivery()}", flush=True)
            print(f"open_clip: {theirs.epoch(workers):,} images", flush=True)
            title = f"loader, {workers} worker(s)"
            ratio = results[title] = interleaved_ratio(
                ours.epoch, functools.partial(theirs.epoch, workers), pairs=args.pairs, warmups=1
            )
            print(report(title, ratio))
            print(summary(ratio, len(records), bare), flush=True)
    save_samples(args.output, machine, results)


if __name__ == "__main__":
    sys.exit(run(main))
