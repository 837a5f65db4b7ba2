"""Images a second of stage 1's loader, with boxes, against open_clip's webdataset pipeline.

    cloc-mllm data build flickr30k-entities ... --output_dir runs/data/flickr8k-train
    PYTHONPATH=DIR python eval/bench/loader.py --data runs/data/flickr8k-train

DIR holds the two packages the peer needs; without them the script says how to get them. Both sides
read every photo once, give float32 batches in main memory and end their workers in the time
measured. Take a set of a multiple of batch size times workers, so that both read as many.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from cloc_mllm.bench import loader
from cloc_mllm.bench.ratio import interleaved_ratio, machine_state, report, save_samples
from cloc_mllm.data.parquet import load_records


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--data", required=True, help="records with JPEG images")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--out", default="runs/bench/loader.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine, results = machine_state(), {}
    records = load_records(args.data)
    bare = loader.bare_decode_rate([record.image for record in records[:512]], args.image_size)
    print(f"{machine}\nbare decode and resize in one process: {bare:,.0f} images a CPU second")
    with tempfile.TemporaryDirectory() as directory:
        tars = loader.write_tars(records, Path(directory), num_shards=8)
        theirs = loader.OpenClipLoader(tars, len(records), args.batch_size, args.image_size)
        for workers in args.workers:
            ours = loader.OurLoader(args.data, args.batch_size, args.image_size, workers)
            print(f"{workers} worker(s): {ours.check_delivery()}", flush=True)
            print(f"open_clip: {theirs.epoch(workers):,} images", flush=True)
            title = f"loader, {workers} worker(s)"
            ratio = results[title] = interleaved_ratio(
                ours.epoch, lambda n=workers: theirs.epoch(n), pairs=args.pairs, warmups=1
            )
            print(report(title, ratio))
            print(loader.summary(ratio, len(records), bare), flush=True)
    save_samples(args.out, machine, results)


if __name__ == "__main__":
    try:
        main()
    except loader.MissingPeerError as error:
        sys.exit(str(error))
