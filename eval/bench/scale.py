"""Computes the cost of the paper's recipe on GPUs: FLOPs, memory, communication, time.

    python eval/bench/scale.py [--mfu 0.3] [--micro_batch 64]

Everything here is computed from the shapes of the model; nothing is measured
(docs/how-to/scale.md). FLOPs are two per multiply-add, of matrix products alone (norms,
activations, softmax are left out).

Letters: N image tokens (without the class token), D width of the image tower, T tokens of a text,
W width of the text tower, E embedding width, M regions per image, P parameters.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.losses.contrastive import rows_at_a_time

_BACKWARD = 2.0  # a backward pass has two products for each one of the forward pass
_LOSS_PRODUCTS = 4  # logits, logits again for the gradient, two gradients (losses/contrastive.py)
_FILTER_PRODUCTS = 1  # texts against texts; their verdict is kept, one bit a pair
_TILE_COPIES = 3  # logits, texts against texts, errors
# bf16 bytes a token and unit of width that a block keeps for backward: the inputs of two norms, of
# four products (one of 4 D) and of the GELU (4 D), and q, k, v. Attention keeps no square.
_KEPT_BY_BLOCK = 32
_KEPT_BY_CHECKPOINT = 2

ZeroStage = Literal[0, 1, 2, 3]


@dataclass(frozen=True)
class Shapes:
    """A CLOC over open_clip's native towers, with the `prompt` readout and both priors."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    text_width: int
    text_layers: int
    embed_dim: int
    vocab_size: int = 49408
    context_length: int = 77

    @classmethod
    def of(cls, architecture: str, image_size: int) -> Shapes:
        """Reads the shapes of an open_clip architecture of two plain transformers."""
        import open_clip

        config = open_clip.get_model_config(architecture)
        vision, text = config["vision_cfg"], config["text_cfg"]
        return cls(
            image_size,
            vision["patch_size"],
            vision["width"],
            vision["layers"],
            text["width"],
            text["layers"],
            config["embed_dim"],
        )

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class Recipe:
    """The paper's batch, and assumptions on texts (tokens at their real length, end tokens too)."""

    batch_size: int = 32768
    steps: int = 439_087
    regions_per_image: int = 4
    caption_tokens: int = 40
    phrase_tokens: int = 8


@dataclass(frozen=True)
class Gpu:
    """An H100 SXM and what of it is taken to be reached.

    Attributes:
        bf16, fp32: peak FLOP/s of the towers' products and of the loss's (which is in float32).
        mfu, fp32_mfu: shares of them that are reached.
        node, network: bytes/s a GPU sends within a node of eight, and between nodes.
    """

    bf16: float = 989e12
    fp32: float = 67e12
    mfu: float = 0.3
    fp32_mfu: float = 0.5
    node: float = 450e9
    network: float = 50e9


def block_flops(tokens: float, width: int, layers: int) -> float:
    """Forward, of one sequence: 12 width^2 weights a token, and attention's two products."""
    return layers * tokens * (24 * width**2 + 4 * tokens * width)


def image_tower_flops(s: Shapes) -> float:
    patches = 2 * s.num_tokens * 3 * s.patch_size**2 * s.width
    return patches + block_flops(s.num_tokens + 1, s.width, s.layers) + 2 * s.width * s.embed_dim


def text_tower_flops(s: Shapes, tokens: float) -> float:
    return block_flops(tokens, s.text_width, s.text_layers) + 2 * s.text_width * s.embed_dim


def prompter_flops(s: Shapes, regions: int) -> float:
    """Forward, of one image: keys, values and (for the text prior) what attention to each token
    would add, then for each region two box tokens and one text token, and the BoxHead."""
    n, d, e = s.num_tokens, s.width, s.embed_dim
    shared = n * (4 * d**2 + 2 * d * e)
    token = 24 * d**2 + 4 * n * d  # queries, keys, values, output, MLP; attention to the image
    box = 2 * token + 4 * d**2 + 2 * d * e
    text = token + 2 * e * d + 2 * d * e + 2 * n * e + 2 * (e**2 + 4 * e)
    return shared + regions * (box + text)


def loss_flops(s: Shapes, recipe: Recipe) -> float:
    """Both contrastive losses, forward and backward, of one image."""
    product = 2 * recipe.batch_size * s.embed_dim
    regions = recipe.regions_per_image**2 * (_LOSS_PRODUCTS + _FILTER_PRODUCTS)
    return product * (_LOSS_PRODUCTS + regions)


def forward_flops(s: Shapes, recipe: Recipe) -> dict[str, float]:
    """Counts the FLOPs of one image by part; the loss is left to `loss_flops`."""
    m = recipe.regions_per_image
    return {
        "image tower": image_tower_flops(s),
        "captions": text_tower_flops(s, recipe.caption_tokens),
        "region texts": m * text_tower_flops(s, recipe.phrase_tokens),
        "Prompter": prompter_flops(s, m),
    }


def num_parameters(s: Shapes) -> int:
    d, w, e = s.width, s.text_width, s.embed_dim
    image = s.layers * (12 * d**2 + 13 * d) + d * (3 * s.patch_size**2 + s.num_tokens + 6 + e)
    text = s.text_layers * (12 * w**2 + 13 * w) + w * (s.vocab_size + s.context_length + 2 + e)
    prompter = 15 * d**2 + 2 * d * e + 20 * d + e**2 + 10 * e
    return image + text + prompter


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    gathered: float

    @property
    def total(self) -> float:
        return sum((self.weights, self.gradients, self.optimizer, self.activations, self.gathered))


def memory(
    s: Shapes, recipe: Recipe, *, gpus: int, stage: ZeroStage, images: int, checkpointing: bool
) -> Memory:
    """With AdamW in float32, and `images` forward at a time on a GPU (its share of the batch, or
    `run.micro_batch_size`).

    Gathered are the texts of all ranks and their gradients, the tiles of the loss and the bits of
    its filter.
    """
    parameters = num_parameters(s)
    m, e, batch = recipe.regions_per_image, s.embed_dim, recipe.batch_size
    image = (s.num_tokens + 1) * s.width
    text = (recipe.caption_tokens + m * recipe.phrase_tokens) * s.text_width
    all_blocks = s.layers * image + s.text_layers * text
    kept = all_blocks * _KEPT_BY_BLOCK
    if checkpointing:
        kept = all_blocks * _KEPT_BY_CHECKPOINT + image * _KEPT_BY_BLOCK
    return Memory(
        weights=4 * parameters / (gpus if stage == 3 else 1) + 2 * parameters,  # and bf16 copies
        gradients=4 * parameters / (gpus if stage >= 2 else 1),
        optimizer=8 * parameters / (gpus if stage >= 1 else 1),
        activations=images * kept,
        gathered=2 * 4 * (m + 1) * batch * e
        + _TILE_COPIES * 4 * rows_at_a_time(m * batch, "cuda") * m * batch
        + (m * batch) ** 2 / gpus / 8,
    )


def communication(s: Shapes, recipe: Recipe, *, stage: ZeroStage) -> float:
    """Bytes that a GPU sends a step, in rings, to many GPUs: gradients (all-reduce: twice their
    size), at stage 3 also the weights, forward and backward; texts, and their gradients (twice)."""
    weights = 4 * num_parameters(s) * (3 if stage == 3 else 2)
    texts = 4 * (recipe.regions_per_image + 1) * recipe.batch_size * s.embed_dim
    return weights + 3 * texts


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step; communication is counted as if it hid behind nothing."""

    towers: float
    loss: float
    communication: float

    @property
    def total(self) -> float:
        return self.towers + self.loss + self.communication


def step_time(
    s: Shapes, recipe: Recipe, gpu: Gpu, *, gpus: int, stage: ZeroStage, extra_forward: bool
) -> StepTime:
    """`extra_forward`: the towers run forward twice (gradient checkpointing, or micro-batches)."""
    passes = 1 + _BACKWARD + extra_forward
    share = recipe.batch_size / gpus
    return StepTime(
        towers=share * passes * sum(forward_flops(s, recipe).values()) / (gpu.bf16 * gpu.mfu),
        loss=share * loss_flops(s, recipe) / (gpu.fp32 * gpu.fp32_mfu),
        communication=communication(s, recipe, stage=stage)
        / (gpu.node if gpus <= 8 else gpu.network),
    )


MODELS = {"ViT-B-16": 224, "ViT-L-14": 336}
GIB = 2**30


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="scale", description=__doc__)
    parser.add_argument("--mfu", type=float, default=Gpu.mfu, help="share of the bf16 peak")
    parser.add_argument("--micro_batch", type=int, default=64, help="images forward at a time")
    parser.add_argument("--batch", type=int, default=Recipe.batch_size)
    args = parser.parse_args(argv)
    recipe, gpu = Recipe(batch_size=args.batch), Gpu(mfu=args.mfu)
    print("GiB and seconds on a GPU; all*: with gradient checkpointing")
    for name, size in MODELS.items():
        shapes = Shapes.of(name, size)
        print(f"\n{name} at {size}, {num_parameters(shapes) / 1e6:.0f} M parameters; COMPUTED")
        parts = forward_flops(shapes, recipe)
        tower = parts["image tower"]
        for part, flops in parts.items():
            print(f"  {part:<14} {flops / 1e9:8.2f} GFLOP forward  {flops / tower:7.1%}")
        loss = loss_flops(shapes, recipe)
        print(f"  {'loss':<14} {loss / 1e9:8.2f} GFLOP in all   {loss / 3 / tower:7.1%}")
        print("  GPUs stage  weights grads  Adam  activ. (checkp.) gathered  all* |"
              "  towers  loss  comm.  s/step  GPU-days")  # fmt: skip
        for gpus in (8, 64, 256):
            for stage in get_args(ZeroStage):
                share = args.batch // gpus  # stage 3 knows no micro-batches
                images = share if stage == 3 else min(args.micro_batch, share)
                needs = partial(memory, shapes, recipe, gpus=gpus, stage=stage, images=images)
                plain, less = needs(checkpointing=False), needs(checkpointing=True)
                time = step_time(shapes, recipe, gpu, gpus=gpus, stage=stage, extra_forward=True)
                held = (plain.weights, plain.gradients, plain.optimizer, plain.activations)
                columns = [f"{part / GIB:6.2f}" for part in (*held, less.activations)]
                columns += [f"{plain.gathered / GIB:8.2f}", f"{less.total / GIB:6.1f} |"]
                seconds = (time.towers, time.loss, time.communication, time.total)
                columns += [f"{second:7.3f}" for second in seconds]
                days = gpus * time.total * recipe.steps / 86400
                print(f"  {gpus:4d} {stage:5d}  {' '.join(columns)} {days:8,.0f}")


if __name__ == "__main__":
    sys.exit(run(main))
