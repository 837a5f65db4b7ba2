"""Puts trained models into the package, in half precision, as the defaults of all commands.

python training/ship.py --cloc runs/STAGE1/model --mllm runs/STAGE2/model
"""

import shutil
import sys
from pathlib import Path

import torch

from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.mllm import ClocMllmForConditionalGeneration, ClocMllmProcessor, merge_and_save
from cloc_mllm.models.build import load_cloc, save_cloc
from cloc_mllm.shipped import ASSETS


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="ship", description=__doc__)
    parser.add_argument("--cloc", required=True, help="what stage 1 wrote")
    parser.add_argument("--mllm", required=True, help="what stage 2 wrote")
    parser.add_argument(
        "--output_dir", type=Path, default=ASSETS, help="default: the package's assets"
    )
    arguments = parser.parse_args(argv)
    model, tokenizer, config = load_cloc(arguments.cloc)
    mllm = ClocMllmForConditionalGeneration.from_pretrained(arguments.mllm)
    processor = ClocMllmProcessor.from_pretrained(arguments.mllm)
    directory = arguments.output_dir
    for kind in ("cloc", "mllm"):  # not before what comes in their place is there
        shutil.rmtree(directory / kind, ignore_errors=True)
    save_cloc(model, directory / "cloc", config, tokenizer, dtype=torch.float16)
    merge_and_save(mllm, processor, directory / "mllm", dtype=torch.float16)
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    print(f"wrote {size / 1e6:.1f} MB to {directory}")


if __name__ == "__main__":
    sys.exit(run(main))
