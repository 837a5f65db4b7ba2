"""Runs `cloc-mllm export`: the towers of a CLOC (`models/export.py`), or what stage 2 trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cloc_mllm.card import write_export_card
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.config import (
    AlignmentConfig,
    ConversationConfig,
    LoraConfig,
    MllmConfig,
    OptimConfig,
)
from cloc_mllm.data.storage import new_directory
from cloc_mllm.devices import DTYPES
from cloc_mllm.mllm import (
    ClocMllmForConditionalGeneration,
    ClocMllmProcessor,
    build_mllm,
    merge_and_save,
)
from cloc_mllm.mllm.adapter import ADAPTER_CONFIG, load_adapter, save_adapter
from cloc_mllm.mllm.assembled import built_on
from cloc_mllm.mllm.build import hold_frozen
from cloc_mllm.models.build import check_fingerprint
from cloc_mllm.models.export import main as export_cloc
from cloc_mllm.shipped import find_model
from cloc_mllm.train.alignment import forget_phrases, taught_parts
from cloc_mllm.train.checkpoint import load_checkpoint, newest_whole_checkpoint
from cloc_mllm.train.optim import freeze_by_lr
from cloc_mllm.train.resume import load_weights

_ADAPTER_USE = """\
from cloc_mllm.mllm.adapter import load_adapter

model, processor = load_adapter("DIRECTORY")  # language_model="..." where it lies now
"""


def main(argv: Sequence[str]) -> int:
    """Exports the MLLM if there is an `--mllm`, else the CLOC."""
    if any(argument.partition("=")[0] == "--mllm" for argument in argv):
        return export_mllm(argv)
    return export_cloc(argv)


def export_mllm(argv: Sequence[str]) -> int:
    """Runs `cloc-mllm export --mllm RUN [--merge] --output_dir DIR`."""
    parser = ArgumentParser(
        prog="cloc-mllm export",
        description="Write what stage 2 trained so that Transformers or peft load it.",
        epilog="With --merge: one model directory for AutoModelForImageTextToText and "
        "AutoProcessor (after `import cloc_mllm.mllm`). Without: peft's adapter, and our own "
        "parts beside it, which need the language model they were trained on.",
    )
    parser.add_argument(
        "--mllm",
        required=True,
        metavar="DIR",
        help="a stage-2 output directory (its newest checkpoint), an exported adapter, or the "
        "shipped one: photos",
    )
    parser.add_argument("--merge", action="store_true", help="one whole model, without peft")
    parser.add_argument("--dtype", choices=DTYPES, help="default: what training held each part in")
    parser.add_argument("--language_model", default="", help="if it no longer lies where it did")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="directory to make; must be new"
    )
    arguments = parser.parse_args(argv)
    directory = find_model("mllm", arguments.mllm)
    model, processor = load_trained(directory, arguments.language_model)
    save = merge_and_save if arguments.merge else save_adapter
    with new_directory(arguments.output_dir) as partial:
        save(model, processor, partial, dtype=DTYPES.get(arguments.dtype))
        kind = {} if arguments.merge else {"library": "peft", "use": _ADAPTER_USE}
        write_export_card(partial, directory, **kind)
    print(f"wrote {arguments.output_dir}")
    return 0


def load_trained(
    directory: Path, language_model: str = ""
) -> tuple[ClocMllmForConditionalGeneration, ClocMllmProcessor]:
    """Loads the model of a stage-2 run at its newest whole checkpoint, or of an exported adapter.

    Args:
        directory: the output directory of the run, or the adapter's.
        language_model: where the language model lies now; "" if it still lies where it did.

    Raises:
        FileNotFoundError: `directory` is neither.
        ValueError: all checkpoints are damaged, or what the run started from has changed.
    """
    if (directory / ADAPTER_CONFIG).is_file():
        theirs, cloc = built_on(directory)
        return load_adapter(directory, language_model=language_model or theirs, cloc=cloc)
    found, _ = newest_whole_checkpoint(directory / "checkpoints")
    if found is None:
        raise FileNotFoundError(
            f"{directory} is neither a stage-2 output directory (no checkpoints/ in it) nor an "
            "exported adapter. OUTPUT_DIR/model, which a finished run writes, is merged already"
        )
    checkpoint = load_checkpoint(found)
    config = checkpoint.state["config"]
    asks = ConversationConfig(**config["conversations"])
    model, processor = build_mllm(_mllm_config(config["model"], language_model), asks)
    check_fingerprint(checkpoint.state["fingerprint"], processor.fingerprint, str(found))
    freeze_by_lr(model, OptimConfig(layer_lr=config["optim"]["layer_lr"]))
    taught = taught_parts(AlignmentConfig(**config["alignment"]))
    hold_frozen(model, DTYPES[config["model"]["dtype"]], taught)
    forget_phrases(processor, taught)
    load_weights(model, checkpoint.weights)
    return model.eval(), processor


def _mllm_config(values: dict[str, Any], language_model: str) -> MllmConfig:
    config = MllmConfig(**values | {"lora": LoraConfig(**values["lora"])})
    config.language_model = language_model or config.language_model
    return config
