"""Our region loss against the full matrix it stands in for, on random regions: time and memory.

    python eval/bench/loss.py --output runs/bench/loss.json

Letters: R regions, E embedding width.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.losses.contrastive import TILE_ROWS, contrastive_loss
from memory import extra_peak_mib
from ratio import interleaved_ratio, machine_state, report, save_samples

Side = Literal["ours", "full_matrix", "full_matrix_once"]
THRESHOLD = 0.9
_DISTINCT = 0.8  # share of the phrases that are not repeats of another


def full_matrix_loss(
    features: Tensor, texts: Tensor, logit_scale: Tensor, *, both_products: bool = True
) -> Tensor:
    """open_clip's `ClipLoss` on one process, with our mask of same texts: two R x R matrices of
    logits, one a direction; or one and its transpose, as open_clip does on several processes."""
    features, texts = F.normalize(features, dim=-1), F.normalize(texts, dim=-1)
    scale = logit_scale.exp()
    with torch.no_grad():
        same_text = (texts @ texts.T > THRESHOLD).fill_diagonal_(False)
    labels = torch.arange(len(features), device=features.device)
    to_texts = (scale * features @ texts.T).masked_fill_(same_text, float("-inf"))
    if both_products:
        to_features = (scale * texts @ features.T).masked_fill_(same_text, float("-inf"))
    else:
        to_features = to_texts.T
    return (F.cross_entropy(to_texts, labels) + F.cross_entropy(to_features, labels)) / 2


def random_regions(num_regions: int, width: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """`float[R, E], float[R, E], float[1]`: regions near their text; a fifth of texts repeats."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(num_regions, width, generator=generator)
    num_distinct = int(_DISTINCT * num_regions)
    texts[num_distinct:] = texts[: num_regions - num_distinct]
    features = texts + 3 * torch.randn(num_regions, width, generator=generator)
    inputs = (features, texts, torch.tensor([math.log(1 / 0.07)]))
    return tuple(tensor.requires_grad_() for tensor in inputs)  # type: ignore[return-value]


def prepare_step(side: Side, num_regions: int, tile_rows: int) -> Callable[[], list[Tensor]]:
    """Forward and backward of one side; the step returns loss and gradients."""
    inputs = random_regions(num_regions)

    def step() -> list[Tensor]:
        if side == "ours":
            loss = contrastive_loss(*inputs, THRESHOLD, tile_rows=tile_rows)
        else:
            loss = full_matrix_loss(*inputs, both_products=side == "full_matrix")
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    return step


def check_equal(num_regions: int, tile_rows: int, tolerance: float = 1e-5) -> None:
    """Raises an AssertionError unless loss and gradients of both sides agree."""
    ours, theirs = (prepare_step(s, num_regions, tile_rows)() for s in ("ours", "full_matrix"))
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="loss", description=__doc__)
    parser.add_argument("--regions", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--tile_rows", type=int, nargs="+", default=[TILE_ROWS])
    parser.add_argument("--peers", nargs="+", default=["full_matrix", "full_matrix_once"])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--output", default="runs/bench/loss.json")
    args = parser.parse_args(argv)
    machine = {**machine_state(), "dtype": "float32", "width": 512}
    print("noisy machine:" if machine["noisy"] else "machine:", machine)
    results: dict[str, Any] = {}
    for regions in args.regions:
        theirs = {peer: prepare_step(peer, regions, 0) for peer in args.peers}
        peaks = {
            peer: extra_peak_mib(functools.partial(prepare_step, peer, regions, 0))
            for peer in args.peers
        }
        for tile_rows in args.tile_rows:
            check_equal(regions, tile_rows)
            prepare = functools.partial(prepare_step, "ours", regions, tile_rows)
            peak = extra_peak_mib(prepare)
            for peer in args.peers:
                title = f"{regions} regions, tiles of {tile_rows}, against {peer}"
                ratio = interleaved_ratio(prepare(), theirs[peer], pairs=args.pairs)
                results[title] = ratio
                results[f"{title}: MiB"] = {"ours": peak, "theirs": peaks[peer]}
                print(report(title, ratio))
                print(
                    f"  peak memory {peak / peaks[peer]:.3f} ({peak:.0f} / {peaks[peer]:.0f} MiB)"
                )
                save_samples(args.output, machine, results)


if __name__ == "__main__":
    sys.exit(run(main))
