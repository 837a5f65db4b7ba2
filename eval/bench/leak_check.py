"""How many altered copies of real photos `cloc-mllm data leak-check` finds.

cloc-mllm data build flickr30k-entities ... --output_dir runs/data/flickr8k-val
python eval/bench/leak_check.py --data runs/data/flickr8k-val
"""

from __future__ import annotations

import io
import sys
from dataclasses import replace

from PIL import Image, ImageEnhance, ImageOps

from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.data.checks.leaks import find_leaks, fingerprint
from cloc_mllm.data.parquet import load_records


def cropped(photo: Image.Image, share: float) -> Image.Image:
    left, top = round(photo.width * share), round(photo.height * share)
    return photo.crop((left, top, photo.width - left, photo.height - top))


CHANGES = {
    "JPEG quality 30": lambda photo: photo,
    "half the size": lambda photo: photo.resize((photo.width // 2, photo.height // 2)),
    "squashed to 3:2": lambda photo: photo.resize((300, 200)),
    "mirrored": ImageOps.mirror,
    "brightness +30 %": lambda photo: ImageEnhance.Brightness(photo).enhance(1.3),
    "2 % cropped off each side": lambda photo: cropped(photo, 0.02),
    "5 % cropped off each side": lambda photo: cropped(photo, 0.05),
}


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="leak_check", description=__doc__)
    parser.add_argument("--data", required=True, help="records of real photos")
    records = list(load_records(parser.parse_args(argv).data))
    upright, mirrored = fingerprint(records), fingerprint(records, mirror=True)
    for name, change in CHANGES.items():
        copies = []
        for number, record in enumerate(records):
            file = io.BytesIO()
            change(record.load_image()).save(file, "JPEG", quality=30)
            copies.append(replace(record, id=f"copy-{number}", image=file.getvalue()))
        right, wrong = set(), 0
        for leak in find_leaks(fingerprint(copies), upright, mirrored, "originals"):
            is_right = leak.eval_id == records[int(leak.train_id.removeprefix("copy-"))].id
            right |= {leak.train_id} if is_right else set()
            wrong += not is_right
        print(f"{name:26} {len(right):>5} of {len(records)} found, {wrong} wrong pairs")


if __name__ == "__main__":
    sys.exit(run(main))
