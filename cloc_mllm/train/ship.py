"""Puts trained models into the package, in half precision; see `training/ship.py`."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.inference.cloc_predictor import ClocPredictor
from cloc_mllm.inference.name_list import list_phrases
from cloc_mllm.mllm import ClocMllmForConditionalGeneration, ClocMllmProcessor, merge_and_save
from cloc_mllm.mllm.adapter import PARTS, VISION, save_adapter
from cloc_mllm.mllm.assembled import LANGUAGE_MODEL
from cloc_mllm.models.build import load_cloc, save_cloc
from cloc_mllm.shipped import ASSETS, SHIPPED_MODELS
from cloc_mllm.train.export import load_trained


def main(argv: Sequence[str] | None = None) -> int:
    """`python training/ship.py --name photos --cloc DIR`."""
    parser = ArgumentParser(prog="ship", description=__doc__)
    parser.add_argument("--name", choices=SHIPPED_MODELS, required=True)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--cloc", help="what stage 1 wrote")
    what.add_argument(
        "--adapter", type=Path, help=f"output directory of a stage 2 on {LANGUAGE_MODEL}"
    )
    parser.add_argument("--mllm", help="what stage 2 wrote")
    parser.add_argument(
        "--phrases", help="records, whose frequent phrases `refer` is to choose from"
    )
    parser.add_argument(
        "--output_dir", type=Path, default=ASSETS, help="default: the package's assets"
    )
    arguments = parser.parse_args(argv)
    directory = arguments.output_dir / arguments.name
    if arguments.adapter:
        ship_adapter(arguments.adapter, directory / "mllm")
    else:
        ship_models(arguments, directory)
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    print(f"wrote {directory}, {size / 1e6:.1f} MB now")
    return 0


def ship_adapter(run_dir: Path, directory: Path) -> None:
    """Writes the newest checkpoint of a stage-2 run as an adapter of the hub's language model and
    the CLOC that ships beside it.

    Raises:
        ValueError: the run has another vision encoder.
    """
    model, processor = load_trained(run_dir)
    model.language_model.peft_config["default"].base_model_name_or_path = LANGUAGE_MODEL
    processor.phrases = None  # the CLOC beside it has them
    shutil.rmtree(directory, ignore_errors=True)
    save_adapter(model, processor, directory, dtype=torch.float16)
    (directory / "README.md").unlink(missing_ok=True)  # peft's, of a model that is not ours
    learnt = directory / "adapter_model.safetensors"
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(learnt).items()}
    save_file(halves, learnt)
    parts = load_file(directory / PARTS)
    vision = load_cloc(directory.with_name("cloc"))[0].vision.state_dict()
    for name, tensor in vision.items():
        held = parts.pop(f"{VISION}{name}").to(tensor)  # perhaps in bfloat16, which has 8 bits
        if not torch.allclose(held, tensor, rtol=2**-7, atol=1e-6):
            raise ValueError(f"{run_dir} has another vision encoder than the CLOC shipped: {name}")
    save_file(parts, directory / PARTS)


def ship_models(arguments: Namespace, directory: Path) -> None:
    model, tokenizer, config = load_cloc(arguments.cloc)
    mllm = processor = phrases = None
    if arguments.mllm:
        mllm = ClocMllmForConditionalGeneration.from_pretrained(arguments.mllm)
        processor = ClocMllmProcessor.from_pretrained(arguments.mllm)
    if arguments.phrases:
        phrases = list_phrases(ClocPredictor(model, tokenizer), arguments.phrases)
    for kind in ("cloc", "mllm"):  # not before what comes in their place is there
        shutil.rmtree(directory / kind, ignore_errors=True)
    save_cloc(model, directory / "cloc", config, tokenizer, dtype=torch.float16, pack_tables=True)
    if phrases is not None:
        phrases.save(directory / "cloc")
    if mllm is not None and processor is not None:
        merge_and_save(mllm, processor, directory / "mllm", dtype=torch.float16)
