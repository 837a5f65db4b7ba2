"""Estimates what a step of stage 1 needs: memory per GPU by part, and FLOPs.

Both towers run forward and backward on fake tensors, the region encoder on zeros of one image
(`train/memory.py` explains how). The contrastive losses follow formulas, because no step holds
their matrices as a whole.

Letters: B images of the whole batch, n images that a GPU forwards at a time, M regions per image,
E embedding width.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from cloc_mllm.config import Stage1Config
from cloc_mllm.losses.contrastive import rows_at_a_time
from cloc_mllm.models.clip_config import ResolvedModel, full_clip_config, reads_padding
from cloc_mllm.models.cloc import Cloc
from cloc_mllm.models.region_encoders import RegionPrompts
from cloc_mllm.models.vision_encoder import ImageFeatures
from cloc_mllm.train.entry import RESERVED_GIB, Plan
from cloc_mllm.train.memory import GIB, LiveBytes, held_state, make_fake

# Lengths of texts that are assumed, in tokens with their end token: COCO's captions have 12 to 15,
# detailed ones more; the paper's region texts have 2.1 words.
CAPTION_TOKENS, PHRASE_TOKENS = 40, 8
_USUAL_REGIONS = 8  # where all regions of an image are taken
# Matrix products of B x E by E x B: logits, logits again for the gradient, and two gradients; the
# same-text filter adds one (losses/contrastive.py).
_LOSS_PRODUCTS, _FILTER_PRODUCTS = 4, 1
_TILE_COPIES = 3  # logits, texts against texts, errors
_FLOAT32 = 4
PHOTOS_PER_WORKER = 270  # decoded, letterboxed and batched per second (eval/bench/feed.py)


@dataclass(frozen=True)
class PretrainingCost:
    """Bytes of one GPU at the peak of a step, by part, and the FLOPs of its share of the step.

    Attributes:
        weights, gradients, optimizer: as ZeRO leaves them on a GPU.
        activations: of n images with their texts and regions, and the bf16 copies of weights.
        loss: gathered texts with their gradients, tiles of logits, and bits of the filter.
        batch: pixels of the GPU's share.
        tower_flops: of towers and region encoder, in `run.precision`.
        loss_flops: of the contrastive losses, in float32.
        num_images: n.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    batch: int
    tower_flops: int
    loss_flops: int
    num_images: int

    @property
    def total(self) -> int:
        return sum(getattr(self, part) for part in _PARTS)


_PARTS = ("weights", "gradients", "optimizer", "activations", "loss", "batch")


def estimate_pretraining(config: Stage1Config, model: Cloc, num_ranks: int) -> PretrainingCost:
    """Estimates a step of stage 1.

    Args:
        config: its model and `run.precision` must be resolved.
        model: on the meta device (`build_cloc_shapes`), with what is frozen frozen.
        num_ranks: GPUs that share the batch.
    """
    run, regions = config.run, config.data.regions_per_image or _USUAL_REGIONS
    if not model.vision.region_encoder.has_region_loss:
        regions = 0
    share = max(1, run.global_batch_size // num_ranks)
    images = min(share, run.micro_batch_size or share)
    weights, gradients, optimizer = held_state(model, config.optim, run, num_ranks)
    forward, both, activations = _towers(model, config, images, regions)
    more_forward, more_both, more_kept = _regions(model, config, regions)
    flops = both / images + more_both
    if images < share:  # GradCache forwards each micro-batch once more
        flops += forward / images + more_forward
    embed_dim, batch = model.vision.embed_dim, run.global_batch_size
    pairs = _LOSS_PRODUCTS + regions**2 * (_LOSS_PRODUCTS + _FILTER_PRODUCTS)
    texts = (1 + regions) * batch * embed_dim * _FLOAT32
    num_texts = max(1, regions) * batch
    tiles = _TILE_COPIES * rows_at_a_time(num_texts, "cuda") * num_texts * _FLOAT32
    pixels = 3 * config.model.image_size**2
    return PretrainingCost(
        weights,
        gradients,
        optimizer,
        activations=activations + images * more_kept,
        loss=2 * texts + tiles + (regions * batch) ** 2 // num_ranks // 8,
        batch=share * pixels * (1 + _FLOAT32),  # bytes, then normalised
        tower_flops=int(share * flops),
        loss_flops=share * 2 * batch * embed_dim * pairs,
        num_images=images,
    )


def _towers(model: Cloc, config: Stage1Config, images: int, regions: int) -> tuple[int, int, int]:
    """Forward FLOPs, all FLOPs and peak bytes of both towers for n images with their texts."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = copy.deepcopy(model)
    if config.run.gradient_checkpointing:
        model.set_gradient_checkpointing(True)
    side = config.model.image_size
    with FakeTensorMode():
        make_fake(model)
        model.train()
        pixels = torch.zeros(images, 3, side, side)
        texts = [
            torch.zeros(images * number, min(length, config.model.context_length)).long()
            for number, length in ((1, CAPTION_TOKENS), (regions, PHRASE_TOKENS))
            if number
        ]
        if reads_padding(full_clip_config(ResolvedModel(config.model))["text_cfg"]):
            texts = [text.new_zeros(len(text), config.model.context_length) for text in texts]
        live = LiveBytes([*model.parameters(), *model.buffers(), pixels, *texts])
        with live:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.run.precision == "bf16"):
                image = model.encode_image(pixels)
                outputs = [image.image_features, image.tokens, *map(model.text, texts)]
            forward = live.flops
            learnt = [output.float().mean() for output in outputs if output.requires_grad]
            del image, outputs
            if learnt:
                torch.stack(learnt).sum().backward()
    kept = sum(p.numel() * _FLOAT32 for p in model.parameters() if p.requires_grad)
    return forward, live.flops, max(0, live.peak - kept)  # gradients are counted with the weights


def _regions(model: Cloc, config: Stage1Config, regions: int) -> tuple[int, int, int]:
    """The same of the region encoder for one image, in real memory."""
    if not regions:
        return 0, 0, 0
    encoder: Any = copy.deepcopy(model.vision.region_encoder)
    encoder = encoder.to_empty(device="cpu").train()
    for tensor in (*encoder.parameters(), *encoder.buffers()):
        tensor.data.zero_()
    height, width = model.vision.grid_hw
    embed_dim = model.vision.embed_dim
    tokens = torch.zeros(1, height * width, model.vision.token_dim, requires_grad=True)
    image = ImageFeatures(torch.zeros(1, embed_dim), tokens, (height, width))
    boxes = torch.tensor([[0.25, 0.25, 0.75, 0.75]]).expand(regions, 4).contiguous()
    texts = torch.zeros(regions, embed_dim, requires_grad=True)
    no_masks, none = torch.zeros(0, 1, 1), torch.zeros(0, dtype=torch.long)
    prompts = RegionPrompts(boxes, torch.zeros(regions, dtype=torch.long), no_masks, none)
    live = LiveBytes([*encoder.parameters(), *encoder.buffers(), tokens, boxes, texts])
    with live:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.run.precision == "bf16"):
            outputs = [of for of in encoder(image, prompts, texts) if of is not None]
        forward, kept = live.flops, live.now
        torch.stack([output.float().mean() for output in outputs]).sum().backward()
    copies = sum(p.numel() for p in encoder.parameters()) * 2  # in bf16, once for all images
    return forward, live.flops, max(0, kept - copies)


def cost_of_stage1(config: Stage1Config, model: Cloc, plan: Plan) -> str:
    """Writes what a step of this run needs, part by part, whether it fits, how long it takes."""
    found = estimate_pretraining(config, model, plan.num_gpus)
    title = (
        f"estimated memory of a step, per GPU ({plan.num_gpus} GPU(s), ZeRO "
        f"{config.run.zero_stage}, {found.num_images} images at a time)"
    )
    rows = [f"  {part:<11} {getattr(found, part) / GIB:8.2f} GiB" for part in _PARTS]
    images = config.run.global_batch_size // plan.num_gpus
    flops = (found.tower_flops + found.loss_flops) / 1e12
    rows.append(f"  {'all':<11} {found.total / GIB:8.2f} GiB")
    texts = f"captions of {CAPTION_TOKENS} tokens, phrases of {PHRASE_TOKENS}"
    rows.append(f"FLOPs of a step, per GPU: {flops:,.1f} TFLOPs for {images} images ({texts})")
    times = plan.times(found.tower_flops, config.run.steps, float32_flops=found.loss_flops)
    return "\n".join(
        [title, *rows, *_advice(config, model, found, plan), *times, *_feeding(config, found, plan)]
    )


def _feeding(config: Stage1Config, found: PretrainingCost, plan: Plan) -> list[str]:
    """How many workers feed a GPU of the plan, with a warning if `data.num_workers` are fewer;
    nothing if no card was named, or no image is loaded."""
    if not plan.card or config.data.feature_cache:
        return []
    images = config.run.global_batch_size / plan.num_gpus
    rate = images / plan.seconds(found.tower_flops, found.loss_flops)
    wanted, given = math.ceil(rate / PHOTOS_PER_WORKER), config.data.num_workers
    lines = [
        f"loading: {rate:,.0f} images/s per GPU need {wanted} worker(s) with a core each, at "
        f"{PHOTOS_PER_WORKER} photos of 640 px per second for a canvas of 224 "
        "(docs/how-to/scale.md)"
    ]
    if 0 <= given < wanted:
        lines.append(
            f"warning: data.num_workers {given} cannot feed such a GPU; raise it, or store smaller "
            "photos (`data build --max_side`)"
        )
    return lines


def _advice(config: Stage1Config, model: Cloc, found: PretrainingCost, plan: Plan) -> list[str]:
    """Says whether a step fits, and else which `run.micro_batch_size` makes it fit."""
    if not plan.memory_gib:
        return []
    wanted = f"{plan.memory_gib:g} GiB of a GPU, of which {RESERVED_GIB:g} is kept for CUDA"
    room = (plan.memory_gib - RESERVED_GIB) * GIB
    if found.total <= room:
        return [f"fits into {wanted}"]
    lines = [f"does not fit into {wanted}; change in this order until it does:"]
    size = found.num_images
    while size > 1 and found.total > room:
        size //= 2
        run = dataclasses.replace(config.run, micro_batch_size=size)
        config = dataclasses.replace(config, run=run)
        found = estimate_pretraining(config, model, plan.num_gpus)
        lines.append(f"  run.micro_batch_size: {size:<12} {found.total / GIB:8.2f} GiB")
    if found.total > room:
        lines.append("  then set run.gradient_checkpointing, or take more GPUs")
    return lines
