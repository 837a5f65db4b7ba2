"""Saves what stage 2 trained, without the language model that it builds on.

adapter_config.json         peft's own files: LoRA and the new tokens of the language model,
adapter_model.safetensors   whose name or path they hold
parts.safetensors           vision encoder, projectors and box head
config.json, ...            the model's and the processor's, as in a whole model directory
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from cloc_mllm.config import Quantization
from cloc_mllm.earlier import by_current_name
from cloc_mllm.mllm.configuration import ClocMllmConfig
from cloc_mllm.mllm.language_model import add_embeddings, load_language_model
from cloc_mllm.mllm.merging import plain_config
from cloc_mllm.mllm.modeling import ClocMllmForConditionalGeneration, cast_encoder
from cloc_mllm.mllm.processing import ClocMllmProcessor, token_ids
from cloc_mllm.models.build import check_fingerprint, load_cloc
from cloc_mllm.models.phrases import Phrases

ADAPTER_CONFIG = "adapter_config.json"
PARTS = "parts.safetensors"
VISION = "vision."
_LANGUAGE_MODEL = "language_model."


def save_adapter(
    model: ClocMllmForConditionalGeneration,
    processor: ClocMllmProcessor,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Saves an adapter. `dtype` is that of our parts, None what they are held in; peft's file has
    its own.

    Raises:
        ValueError: the language model was trained whole, so there is no adapter; or it came with an
            MLLM (`model.init`), so no directory holds it alone.
    """
    if not hasattr(model.language_model, "peft_config"):
        raise ValueError(
            "the language model has no LoRA (model.lora.rank is 0), so there is no adapter to "
            "save; write the whole model with --merge"
        )
    if not model.language_model.peft_config["default"].base_model_name_or_path:
        raise ValueError(
            "the run trained an MLLM further (model.init), so there is no language model alone for "
            "an adapter to build on; write the whole model with --merge"
        )
    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    language_model: Any = model.language_model
    # loading makes the rows of new tokens again as `build_mllm` did; LoRA holds what was learnt
    language_model.save_pretrained(out, save_embedding_layers=False)
    parts = {
        name: tensor.detach().cpu().to(dtype if dtype and tensor.is_floating_point() else None)
        for name, tensor in model.state_dict().items()
        if not name.startswith(_LANGUAGE_MODEL)
    }
    save_file({name: tensor.contiguous() for name, tensor in parts.items()}, out / PARTS)
    plain_config(model).save_pretrained(out)
    assert model.generation_config is not None
    model.generation_config.save_pretrained(out)
    processor.save_pretrained(out)


def load_adapter(
    directory: str | Path,
    *,
    language_model: str = "",
    cloc: str | Path = "",
    quantization: Quantization = "none",
    dtype: torch.dtype = torch.float32,
    trainable: bool = False,
) -> tuple[ClocMllmForConditionalGeneration, ClocMllmProcessor]:
    """Loads an adapter: the model in eval mode, with LoRA as a frozen `PeftModel`.

    `merge_and_save` merges LoRA into the weights.

    Args:
        language_model: where the language model lies now; "" is where it lay in training.
        cloc: a CLOC whose vision encoder an adapter builds on that was saved without one.
        quantization: quantisation of the language model, whatever it was in training.
        dtype: of the language model and the vision encoder, whatever it was in training; the rest
            is float32.
        trainable: leaves LoRA and all our parts open for training, ours in float32.

    Raises:
        ValueError: model and processor do not belong together, or a part is missing.
    """
    from peft import PeftConfig, PeftModel

    from cloc_mllm.mllm.new_tokens import keep_rows_beside_table

    config = ClocMllmConfig.from_pretrained(directory)
    processor = ClocMllmProcessor.from_pretrained(directory)
    check_fingerprint(config.fingerprint, processor.fingerprint, "the model")
    trained_on = PeftConfig.from_pretrained(str(directory)).base_model_name_or_path
    base_name = language_model or str(trained_on)
    base = load_language_model(base_name, quantization, dtype)
    base_tokenizer = AutoTokenizer.from_pretrained(base_name, trust_remote_code=False)
    new = range(len(base_tokenizer), len(processor.tokenizer))
    add_embeddings(base, new, token_ids(processor.tokenizer, processor.coordinates.tokens()))
    model = ClocMllmForConditionalGeneration(config, base)
    model.generation_config = GenerationConfig.from_pretrained(str(directory))
    model.language_model = PeftModel.from_pretrained(base, str(directory), is_trainable=trainable)
    keep_rows_beside_table(model.language_model)
    parts = by_current_name(load_file(Path(directory) / PARTS))
    if cloc:
        vision = load_cloc(cloc)[0].vision.state_dict()
        processor.phrases = Phrases.load(Path(cloc))
        parts = {f"{VISION}{name}": tensor for name, tensor in vision.items()} | parts
    missing, unknown = model.load_state_dict(parts, strict=False)
    lost = [name for name in missing if not name.startswith(_LANGUAGE_MODEL)]
    if lost or unknown:
        raise ValueError(
            f"{Path(directory) / PARTS} does not fit {directory}/config.json: missing {lost[:3]}, "
            f"unknown {unknown[:3]}"
        )
    if trainable:
        return model, processor
    cast_encoder(model, dtype)
    return model.requires_grad_(False).eval(), processor
