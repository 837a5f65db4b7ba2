"""Saves an MLLM as a plain model directory: LoRA merged, quantised layers read back.

Weights are made one at a time and written shard by shard, so that saving needs the memory of the
model and one shard.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cloc_mllm.mllm.configuration import ClocMllmConfig
from cloc_mllm.mllm.language_model import dequantized, quantized_layers
from cloc_mllm.mllm.modeling import ClocMllmForConditionalGeneration
from cloc_mllm.mllm.processing import ClocMllmProcessor

_LANGUAGE_MODEL = "language_model."
_LAYER = "layer"  # the one layer of the model in which peft merges


def merge_and_save(
    model: ClocMllmForConditionalGeneration,
    processor: ClocMllmProcessor,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 2**30,
) -> None:
    """Writes a model directory that loads without peft and bitsandbytes.

    `model` itself stays as it is. Of a quantised language model the weights are those that its
    codes stand for, so the saved model answers as it was trained.

    Args:
        dtype: of all weights; None keeps what each is held in.
        max_shard_bytes: a file has no more, unless one weight does; several have an index.
    """
    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    held = _word_embeddings(model).dtype
    _save_shards(_plain_tensors(model, dtype), out, max_shard_bytes)
    config = plain_config(model)
    config.dtype = dtype or held
    config.architectures = [type(model).__name__]
    config.save_pretrained(out)
    assert model.generation_config is not None
    model.generation_config.save_pretrained(out)
    processor.save_pretrained(out)


def plain_config(model: ClocMllmForConditionalGeneration) -> ClocMllmConfig:
    """Copies the config, without a quantisation or a path of this machine."""
    text_config = model.config.text_config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        text_config.pop(name, None)
    return ClocMllmConfig(**{**model.config.to_dict(), "text_config": text_config})


def _word_embeddings(model: ClocMllmForConditionalGeneration) -> Tensor:
    return next(iter(model.get_input_embeddings().parameters()))


def _plain_tensors(
    model: ClocMllmForConditionalGeneration, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Yields name and value, on the CPU, of each weight that a plain model has; tied ones once."""
    with torch.no_grad():
        for name, tensor in _plain_weights(model):
            wanted = dtype if tensor.is_floating_point() else None
            yield name, tensor.detach().to("cpu", wanted or tensor.dtype).contiguous()


def _plain_weights(
    model: ClocMllmForConditionalGeneration,
) -> Iterator[tuple[str, Tensor]]:
    language_model: Any = model.language_model
    peft_config: Any = None
    if hasattr(language_model, "peft_config"):
        peft_config = language_model.peft_config["default"]
        language_model = language_model.base_model.model
    held = _word_embeddings(model).dtype
    written: set[int] = set()  # ids of parameters, which tied layers share
    for prefix, module in _own_modules(model):
        yield from _own_tensors(prefix, module, written)
    done: list[str] = []  # layers whose inner modules are no part of the plain model
    quantized = quantized_layers(language_model)
    for name, module in language_model.named_modules():
        if any(name.startswith(f"{layer}.") for layer in done):
            continue
        prefix = f"{_LANGUAGE_MODEL}{name}."
        if hasattr(module, "token_adapter"):  # rows of new tokens
            done.append(name)
            if id(module.original_module.weight) not in written:
                written.add(id(module.original_module.weight))
                yield f"{prefix}weight", module.weight
            if getattr(module.original_module, "bias", None) is not None:  # of an output layer
                yield f"{prefix}bias", module.original_module.bias
        elif hasattr(module, "lora_A"):
            done.append(name)
            yield f"{prefix}weight", _merged(module, peft_config, held)
            if getattr(module.base_layer, "bias", None) is not None:
                yield f"{prefix}bias", module.base_layer.bias
        elif name in quantized:
            done.append(name)
            yield f"{prefix}weight", dequantized(module).to(held)
            if module.bias is not None:
                yield f"{prefix}bias", module.bias
        else:
            yield from _own_tensors(prefix if name else _LANGUAGE_MODEL, module, written)


def _own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules outside of the language model, by the prefix of their weights."""
    for name, module in model.named_modules():
        if not f"{name}.".startswith(_LANGUAGE_MODEL):
            yield f"{name}." if name else "", module


def _own_tensors(prefix: str, module: nn.Module, written: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers that lie in a module itself."""
    saved = module.state_dict().keys()
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for name, tensor in tensors:
        if name in saved and id(tensor) not in written:
            written.add(id(tensor))
            yield f"{prefix}{name}", tensor


def _merged(layer: Any, peft_config: Any, held: torch.dtype) -> Tensor:
    """The weight of a layer with its LoRA, added in float32 by peft in a model of this layer.

    It is rounded to the dtype of the layer, or to `held` if the layer is quantised.
    """
    from peft import get_peft_model

    base = layer.base_layer
    if quantized_layers(base):
        plain: Any = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(dequantized(base).float().cpu())
    else:
        held = base.weight.dtype
        # `deepcopy` takes the parameters that it is given, so that none is copied where it lies
        held_apart = {id(p): _float32_on_host(p) for p in base.parameters()}
        plain = copy.deepcopy(base, held_apart)
    config = copy.copy(peft_config)
    config.task_type = config.trainable_token_indices = config.base_model_name_or_path = None
    config.target_modules = [_LAYER]
    alone: Any = get_peft_model(nn.ModuleDict({_LAYER: plain}), config)
    wrapper = alone.base_model.model[_LAYER]
    learnt = {n: t for n, t in layer.state_dict().items() if not n.startswith("base_layer.")}
    wrapper.load_state_dict(learnt, strict=False)
    wrapper.merge()
    return wrapper.base_layer.weight.to(held)


def _float32_on_host(parameter: nn.Parameter) -> nn.Parameter:
    copied = parameter.detach().to("cpu", torch.float32, copy=True)
    return nn.Parameter(copied, requires_grad=False)


def _save_shards(tensors: Iterator[tuple[str, Tensor]], out: Path, max_shard_bytes: int) -> None:
    """Writes `model.safetensors`, or numbered shards and their index."""
    for earlier in out.glob("model*.safetensors*"):
        earlier.unlink()
    shard: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    sizes: list[int] = []

    def flush() -> None:
        save_file(shard, out / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        sizes.append(sum(tensor.nbytes for tensor in shard.values()))
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > max_shard_bytes:
            flush()
        shard[name] = tensor
    flush()
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = files if len(shards) > 1 else ["model.safetensors"]
    for index, file in enumerate(files):
        (out / f"shard-{index}").replace(out / file)
    if len(files) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        contents = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
        (out / "model.safetensors.index.json").write_text(json.dumps(contents, indent=2) + "\n")
