"""Put trained models into the package, in half precision: the default of demo, ground, refer, eval.

python training/ship.py --cloc runs/STAGE1/model --mllm runs/STAGE2/model
"""

import argparse
import shutil
from pathlib import Path

import torch

from cloc_mllm.mllm import ClocMllmForConditionalGeneration, ClocMllmProcessor, merge_and_save
from cloc_mllm.models.build import load_cloc, save_cloc
from cloc_mllm.shipped import ASSETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cloc", required=True, help="what stage 1 wrote")
    parser.add_argument("--mllm", required=True, help="what stage 2 wrote")
    parser.add_argument("--out", type=Path, default=ASSETS, help="default: the package's assets")
    arguments = parser.parse_args()
    for kind in ("cloc", "mllm"):
        shutil.rmtree(arguments.out / kind, ignore_errors=True)
    model, tokenizer, config = load_cloc(arguments.cloc)
    save_cloc(model, arguments.out / "cloc", config, tokenizer, dtype=torch.float16)
    mllm = ClocMllmForConditionalGeneration.from_pretrained(arguments.mllm)
    processor = ClocMllmProcessor.from_pretrained(arguments.mllm)
    merge_and_save(mllm, processor, arguments.out / "mllm", dtype=torch.float16)
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(f"wrote {size / 1e6:.1f} MB to {arguments.out}")


if __name__ == "__main__":
    main()
