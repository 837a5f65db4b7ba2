"""Puts trained models into the package, in half precision.

python training/ship.py --name photos --cloc runs/stage1_photos/model --phrases DATA
python training/ship.py --name scenes --cloc runs/STAGE1/model --mllm runs/STAGE2/model
"""

import shutil
import sys
from pathlib import Path

import torch

from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.data.parquet import load_records
from cloc_mllm.inference.cloc_predictor import ClocPredictor
from cloc_mllm.inference.phrases import Phrases, frequent_phrases
from cloc_mllm.mllm import ClocMllmForConditionalGeneration, ClocMllmProcessor, merge_and_save
from cloc_mllm.models.build import load_cloc, save_cloc
from cloc_mllm.shipped import ASSETS, SHIPPED_MODELS

NUM_PHRASES = 3000


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="ship", description=__doc__)
    parser.add_argument("--name", choices=SHIPPED_MODELS, required=True)
    parser.add_argument("--cloc", required=True, help="what stage 1 wrote")
    parser.add_argument("--mllm", help="what stage 2 wrote")
    parser.add_argument(
        "--phrases", help="records, whose frequent phrases `refer` is to choose from"
    )
    parser.add_argument(
        "--output_dir", type=Path, default=ASSETS, help="default: the package's assets"
    )
    arguments = parser.parse_args(argv)
    model, tokenizer, config = load_cloc(arguments.cloc)
    mllm = processor = phrases = None
    if arguments.mllm:
        mllm = ClocMllmForConditionalGeneration.from_pretrained(arguments.mllm)
        processor = ClocMllmProcessor.from_pretrained(arguments.mllm)
    if arguments.phrases:
        texts = frequent_phrases(load_records(arguments.phrases), NUM_PHRASES)
        phrases = Phrases(texts, ClocPredictor(model, tokenizer).embed_text(texts))
    directory = arguments.output_dir / arguments.name
    for kind in ("cloc", "mllm"):  # not before what comes in their place is there
        shutil.rmtree(directory / kind, ignore_errors=True)
    save_cloc(model, directory / "cloc", config, tokenizer, dtype=torch.float16, pack_tables=True)
    if phrases is not None:
        phrases.save(directory / "cloc")
    if mllm is not None:
        merge_and_save(mllm, processor, directory / "mllm", dtype=torch.float16)
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    print(f"wrote {size / 1e6:.1f} MB to {directory}")


if __name__ == "__main__":
    sys.exit(run(main))
