"""Estimates what a step of stage 2 needs: memory per GPU by part, and FLOPs.

The model's own module tree is built without memory (the meta device, then PyTorch's fake tensors,
`torch._subclasses.fake_tensor`), and one forward and backward pass runs on it: every operation
gives shapes and dtypes but no numbers. So activations come from no formula of ours. They are the
storages that autograd keeps alive, counted as they appear and go, with LoRA, autocast, attention
kernel, gradient checkpointing and chunks of logits as they are in training. FLOPs are those of
`torch.utils.flop_counter`. Weights, gradients and optimizer state are counted by dtype and
`requires_grad`, and shared among the ranks as ZeRO does (arXiv 1910.02054, section 5).

Letters: B sequences, T tokens of the longest, I images, N tokens of an image, D encoder width, R
regions, K labelled positions, S canvas side.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from cloc_mllm.config import Quantization, Stage2Config, TowerOptimConfig, TowerRunConfig
from cloc_mllm.devices import DTYPES
from cloc_mllm.mllm import ClocMllmForConditionalGeneration
from cloc_mllm.mllm.build import add_lora, hold_frozen
from cloc_mllm.mllm.collate import MllmBatch
from cloc_mllm.mllm.configuration import ClocMllmConfig
from cloc_mllm.mllm.language_model import attention_for_training
from cloc_mllm.mllm.losses import IGNORE_INDEX, chunk_of, loss_of_states
from cloc_mllm.mllm.packing import mask_for
from cloc_mllm.train.alignment import taught_parts
from cloc_mllm.train.deepspeed_config import REDUCE_BUCKET
from cloc_mllm.train.entry import RESERVED_GIB, Plan
from cloc_mllm.train.optim import freeze_by_lr, param_groups

GIB = 2**30
_FLOAT32 = 4
_LIVE_PARAMETERS = 10**9  # ZeRO-3 keeps so many gathered (stage3_max_live_parameters)
_4BIT_BYTES, _8BIT_BYTES = 0.5 + 4 / 64, 1.0  # nf4 has a float32 scale per 64 weights


@dataclasses.dataclass(frozen=True)
class StepShape:
    """The size of one rank's batch.

    Attributes:
        num_sequences, num_tokens, num_labels: B, T and K.
        num_images, num_regions: I and R.
        num_bytes: of the batch itself.
        has_features: images come as tokens of the feature cache.
    """

    num_sequences: int
    num_tokens: int
    num_labels: int
    num_images: int
    num_regions: int
    num_bytes: int
    has_features: bool = False

    @classmethod
    def assumed(
        cls, config: Stage2Config, model: ClocMllmForConditionalGeneration, num_ranks: int
    ) -> StepShape:
        """The largest batch of one rank that `config` allows: each sequence is full and shows one
        image in all its tiles; half of the tokens are learnt."""
        asks = config.conversations
        num_images = 1 + config.model.max_tiles
        side = model.config.cloc_model_config().image_size
        num_bytes = _FLOAT32 * (num_images * 3 * side**2 + asks.max_length**2)
        return cls(
            1,
            asks.max_length,
            num_labels=asks.max_length // 2,
            num_images=num_images,
            num_regions=asks.questions_per_image,
            num_bytes=num_bytes,
        ).times(config.run.global_batch_size // num_ranks)

    def times(self, number: int) -> StepShape:
        """A batch of so many times as many sequences."""
        counts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        longer = {
            name: value * number
            for name, value in counts.items()
            if name not in ("num_tokens", "has_features")
        }
        return dataclasses.replace(self, **longer)

    @classmethod
    def of_batch(cls, batch: MllmBatch) -> StepShape:
        inputs = batch.inputs
        num_sequences, num_tokens = inputs["input_ids"].shape
        return cls(
            num_sequences,
            num_tokens,
            num_labels=int((inputs["labels"] != IGNORE_INDEX).sum()),
            num_images=len(inputs["pixel_values"]),
            num_regions=len(inputs["region_boxes"]),
            num_bytes=sum(leaf.nbytes for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)),
            has_features=inputs["pixel_values"].ndim == 3,
        )

    def with_features(self, model: ClocMllmForConditionalGeneration) -> StepShape:
        """The same batch with the tokens of the feature cache in the place of pixels."""
        side = model.config.cloc_model_config().image_size
        height, width = model.vision.grid_hw
        less = self.num_images * (3 * side**2 - height * width * model.vision.token_dim)
        return dataclasses.replace(
            self, num_bytes=self.num_bytes - less * _FLOAT32, has_features=True
        )


@dataclasses.dataclass(frozen=True)
class StepEstimate:
    """Bytes of one rank at the peak of a step, by part, and the FLOPs of its step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    batch: int
    flops: int

    @property
    def total(self) -> int:
        return sum(getattr(self, part) for part in _PARTS)


_PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "batch")


def estimate_step(
    config: Stage2Config,
    model_config: ClocMllmConfig,
    new_tokens: Sequence[int],
    shape: StepShape,
    *,
    num_ranks: int = 1,
    attention: str = "sdpa",
) -> StepEstimate:
    """Estimates a step of a model of any size on a machine of any size.

    Args:
        config: `run.precision` and `model.dtype` must be resolved.
        model_config: of the model that `build_mllm` makes of `config.model`.
        new_tokens: ids whose embeddings LoRA trains along.
        attention: of the language model, as in Transformers.
    """
    model = build_on_meta(config, model_config, new_tokens, attention)
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights, gradients, optimizer = held_state(
        model, config.optim, config.run, num_ranks, config.model.quantization
    )
    live = _trace(model, config, shape)
    kept = min(live.peak, num_trainable * _FLOAT32)  # gradients are counted above
    logits = min(live.peak - kept, max(0, live.peak - live.before_loss - kept))
    return StepEstimate(
        weights,
        gradients,
        optimizer,
        activations=live.peak - kept - logits,
        logits=logits,
        batch=shape.num_bytes,
        flops=live.flops,
    )


def held_state(
    model: nn.Module,
    optim: TowerOptimConfig,
    run: TowerRunConfig,
    num_ranks: int,
    quantization: Quantization = "none",
) -> tuple[int, int, int]:
    """Counts bytes of weights, gradients and optimizer state that ZeRO leaves on a rank."""
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    num_moments = sum(
        (1 if group["muon"] else 2) * p.numel()
        for group in param_groups(model, optim)
        for p in group["params"]
    )
    weights = int(sum(_held_bytes(model, quantization)))
    gradients = num_trainable * _FLOAT32
    optimizer = num_moments * _FLOAT32
    stage = run.zero_stage
    if stage >= 1:  # ZeRO steps on a flat float32 copy of its share of the weights
        optimizer = (optimizer + num_trainable * _FLOAT32) // num_ranks
    if stage == 2:
        gradients = gradients // num_ranks
    if stage in (1, 2):
        gradients += REDUCE_BUCKET * _FLOAT32
    if stage == 3:
        gradients //= num_ranks
        num_weights = sum(p.numel() for p in model.parameters())
        gathered = min(weights, weights * _LIVE_PARAMETERS // num_weights)
        weights = min(weights, weights // num_ranks + gathered)
    return weights, gradients, optimizer


def build_on_meta(
    config: Stage2Config, model_config: ClocMllmConfig, new_tokens: Sequence[int], attention: str
) -> ClocMllmForConditionalGeneration:
    """What `run_stage2` trains, with weights that have a shape and a dtype but no memory."""
    model_config = copy.deepcopy(model_config)
    model_config.text_config._attn_implementation = attention
    with torch.device("meta"):
        model = ClocMllmForConditionalGeneration(model_config)
        nn.Module.float(model)
        model.vision.requires_grad_(not config.model.freeze_vision_encoder)
        if config.model.lora.rank:
            lora = add_lora(model.language_model, config.model.lora, list(new_tokens))
            model.language_model = lora
    freeze_by_lr(model, config.optim)
    hold_frozen(model, DTYPES[config.model.dtype], taught_parts(config.alignment))
    if config.run.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model


def _held_bytes(model: nn.Module, quantization: Quantization) -> Iterator[float]:
    quantized: set[int] = set()
    if quantization != "none":
        modules: Iterator[Any] = model.get_submodule("language_model").modules()
        quantized = {
            id(module.base_layer.weight) for module in modules if hasattr(module, "lora_A")
        }
    for parameter in model.parameters():
        if id(parameter) in quantized:
            yield parameter.numel() * (_4BIT_BYTES if quantization == "4bit" else _8BIT_BYTES)
        else:
            yield parameter.numel() * parameter.element_size()
    yield from (buffer.nbytes for buffer in model.buffers())


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations made and nobody has let go.

    Attributes:
        peak: the most so far.
        before_loss: at the end of the model's forward pass.
        flops: of all operations so far.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        """`given`: weights and inputs, which are not counted, nor are views of them."""
        super().__init__()
        self.now = self.peak = self.before_loss = self.flops = 0
        self._sizes = {_storage_key(tensor): 0 for tensor in given}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        # not by `FlopCounterMode`, whose hooks keep activations alive
        if count := flop_registry.get(function._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _storage_key(tensor) not in self._sizes:
                storage = tensor.untyped_storage()
                key = _storage_key(tensor)
                self._sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._let_go, key)
        return result

    def _let_go(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _trace(
    model: ClocMllmForConditionalGeneration, config: Stage2Config, shape: StepShape
) -> LiveBytes:
    """Runs a step's forward and backward pass without numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        make_fake(model)
        model.train()
        inputs = _inputs(model, shape)
        given = [leaf for leaf in tree_leaves(inputs) if leaf is not None]
        live = LiveBytes([*model.parameters(), *model.buffers(), *given])
        with live:
            bf16 = config.run.precision == "bf16"
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                hidden = _hidden_states(model, **inputs)
                live.before_loss = live.now
                states = hidden[:, :-1].flatten(0, 1)[: shape.num_labels]
                targets = torch.zeros(shape.num_labels, dtype=torch.long)
                chunk = chunk_of(model.config.text_config.vocab_size)
                loss = loss_of_states(states, targets, model.get_output_embeddings(), chunk=chunk)
            del hidden, states
            loss.backward()
    return live


def make_fake(model: nn.Module) -> None:
    """Puts fake tensors on the CPU in the place of all parameters (tied ones stay tied)."""
    made = {
        id(old): nn.Parameter(_empty_like(old), requires_grad=old.requires_grad)
        for old in model.parameters()
    }
    kept = list(model.parameters())  # as long as they live no other has their ids
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False, remove_duplicate=False):
            module._parameters[name] = made[id(old)]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = _empty_like(buffer)
    del kept


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _inputs(model: ClocMllmForConditionalGeneration, shape: StepShape) -> dict[str, Any]:
    num_images, num_regions = shape.num_images, shape.num_regions
    size = model.config.cloc_model_config().image_size
    num_seen, width = model.vision.grid_hw[0] * model.vision.grid_hw[1], model.vision.token_dim
    pixel_values = (
        torch.zeros(num_images, num_seen, width)
        if shape.has_features
        else torch.zeros(num_images, 3, size, size)
    )
    norms: Any = model.region_projector.norms
    tokens = (shape.num_sequences, shape.num_tokens)
    return {
        "input_ids": torch.zeros(tokens, dtype=torch.long),
        "pixel_values": pixel_values,
        "frames": torch.zeros(num_images, 4),
        "regions": [torch.zeros(num_regions, norm.normalized_shape[0]) for norm in norms],
        "boxes": torch.zeros(num_regions, 4),
        "attention_mask": torch.ones(tokens[0], 1, tokens[1], tokens[1], dtype=torch.bool),
        "position_ids": torch.zeros(tokens, dtype=torch.long),
    }


def _hidden_states(
    model: ClocMllmForConditionalGeneration,
    input_ids: Tensor,
    pixel_values: Tensor,
    frames: Tensor,
    regions: list[Tensor],
    boxes: Tensor,
    **rest: Tensor,
) -> Tensor:
    """The forward pass up to the loss, without what needs numbers: checks, and reading regions of
    an image, which are few."""
    embeds = model.get_input_embeddings()(input_ids)
    _, image_features = model.read_images(pixel_values, frames)
    region_features = model.region_projector(regions, [boxes])
    for is_place, features in (
        (input_ids == model.config.image_token_id, image_features.flatten(0, 1)),
        (input_ids == model.config.region_token_id, region_features),
    ):
        embeds = embeds.masked_scatter(is_place[..., None], features.to(embeds.dtype))
    kernel: Any = model.language_model.config._attn_implementation
    rest["attention_mask"] = mask_for(kernel, rest["attention_mask"])
    outputs = model.language_model(
        inputs_embeds=embeds, logits_to_keep=1, output_hidden_states=True, use_cache=False, **rest
    )
    return outputs.hidden_states[-1]


def cost_of_stage2(
    config: Stage2Config,
    model_config: ClocMllmConfig,
    new_tokens: Sequence[int],
    shape: StepShape,
    plan: Plan,
) -> str:
    """Writes what a step of this run needs, part by part, what to change if it does not fit, and
    how long the run takes.

    Where `plan` asks about a GPU, or there is one, attention is the fused kernel that trains there.

    Args:
        model_config, new_tokens: see `estimate_step`.
        shape: of one rank's share of the batch.
    """
    attention = "sdpa" if plan.memory_gib else attention_for_training()

    def estimate(changed: Stage2Config) -> StepEstimate:
        return estimate_step(
            changed, model_config, new_tokens, shape, num_ranks=plan.num_gpus, attention=attention
        )

    found = estimate(config)
    title = (
        f"estimated memory of a step, per GPU ({plan.num_gpus} rank(s), "
        f"ZeRO {config.run.zero_stage})"
    )
    times = plan.times(found.flops, config.run.steps)
    advice = _advice(estimate, config, found, plan.memory_gib)
    return "\n".join([title, *_table(found), *advice, *times])


def _table(found: StepEstimate) -> list[str]:
    rows = [f"  {part:<11} {getattr(found, part) / GIB:8.2f} GiB" for part in _PARTS]
    return [*rows, f"  {'all':<11} {found.total / GIB:8.2f} GiB, {found.flops / 1e12:.2f} TFLOPs"]


def _advice(
    estimate: Callable[[Stage2Config], StepEstimate],
    config: Stage2Config,
    found: StepEstimate,
    gpu_gib: float,
) -> list[str]:
    """Changes that make it fit, one on top of the other, the ones that cost least first."""
    if not gpu_gib:
        return []
    room = (gpu_gib - RESERVED_GIB) * GIB
    wanted = f"{gpu_gib:g} GiB of a GPU, of which {RESERVED_GIB:g} is kept for CUDA"
    if found.total <= room:
        return [f"fits into {wanted}"]
    lines = [f"does not fit into {wanted}; change in this order until it does:"]
    for setting, changed in cheaper(config):
        config = changed
        found = estimate(config)
        lines.append(f"  {setting:<34} {found.total / GIB:8.2f} GiB")
        if found.total <= room:
            return lines
    return [*lines, "  then take more GPUs with run.zero_stage 3, or a smaller language model"]


def cheaper(config: Stage2Config) -> Iterator[tuple[str, Stage2Config]]:
    """Settings that save memory, each on top of those before, the ones that cost least first."""
    model, run = config.model, config.run
    if not model.lora.rank:
        lora = dataclasses.replace(model.lora, rank=16)
        model = dataclasses.replace(model, lora=lora)
        yield "model.lora.rank: 16", dataclasses.replace(config, model=model)
    if model.dtype == "float32":
        model, run = (
            dataclasses.replace(model, dtype="bfloat16"),
            dataclasses.replace(run, precision="bf16"),
        )
        yield "model.dtype: bfloat16", dataclasses.replace(config, model=model, run=run)
    if not run.gradient_checkpointing:
        run = dataclasses.replace(run, gradient_checkpointing=True)
        yield "run.gradient_checkpointing: true", dataclasses.replace(config, model=model, run=run)
    if model.quantization == "none":
        model = dataclasses.replace(model, quantization="4bit")
        yield "model.quantization: 4bit", dataclasses.replace(config, model=model, run=run)
