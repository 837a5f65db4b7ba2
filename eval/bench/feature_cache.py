"""A step of stage 2 (batch, loss, gradient) with the frozen encoder's tokens out of
`data.feature_cache` against one that decodes and encodes the pictures.

    python eval/bench/feature_cache.py --cloc runs/stage1_flickr8k/model \\
        --language_model runs/smollm2 --data runs/data/flickr8k-train
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable

import torch

from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.config import (
    ConversationConfig,
    MllmConfig,
    Stage2Config,
    Stage2DataConfig,
    Stage2RunConfig,
)
from cloc_mllm.data.feature_cache import FeatureCache
from cloc_mllm.data.parquet import load_records
from cloc_mllm.mllm import build_mllm
from cloc_mllm.mllm.collate import ConversationCollator
from cloc_mllm.train.features import fill_features
from cloc_mllm.train.stage2 import answer_step
from ratio import interleaved_ratio, machine_state, report, save_samples

_LOSS_TOLERANCE = 1e-4

Step = Callable[[], float]


def matched_steps(
    model: MllmConfig, data: str, num_images: int, num_questions: int, cache_dir: str
) -> tuple[Step, Step]:
    """(cached, plain): the batch is made, the loss and its gradient computed.

    Raises:
        ValueError: the losses differ; nothing to compare.
    """
    config = Stage2Config(
        model=model,
        data=Stage2DataConfig(train=data, feature_cache=cache_dir, num_workers=0),
        conversations=ConversationConfig(questions_per_image=num_questions),
        run=Stage2RunConfig(steps=1, global_batch_size=num_images, precision="fp32"),
    )
    torch.manual_seed(0)
    mllm, processor = build_mllm(config.model)
    records = load_records(data)[:num_images]
    cache = fill_features(mllm, processor, records, config)
    mllm.train()

    def step(features: FeatureCache | None) -> float:
        collator = ConversationCollator(processor, config.conversations, features=features)
        loss = answer_step(mllm, collator(list(enumerate(records))))["loss"]
        loss.backward()
        mllm.zero_grad()
        return float(loss.detach())

    losses = step(cache), step(None)
    if abs(losses[0] - losses[1]) > _LOSS_TOLERANCE:
        raise ValueError(f"the losses of the two sides are {losses}; nothing to compare")
    return lambda: step(cache), lambda: step(None)


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="feature_cache", description=__doc__)
    parser.add_argument("--cloc", required=True, help="a stage-1 model")
    parser.add_argument("--language_model", required=True)
    parser.add_argument("--data", required=True, help="records")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--output", default="runs/bench/feature_cache.json")
    args = parser.parse_args(argv)
    machine = machine_state()
    print(machine)
    model = MllmConfig(cloc=args.cloc, language_model=args.language_model)
    with tempfile.TemporaryDirectory() as cache:
        sides = matched_steps(model, args.data, args.images, args.questions, cache)
        ratio = interleaved_ratio(*sides, pairs=args.pairs, warmups=0)
    title = f"{args.cloc} + {args.language_model}, {args.images} images, cached / plain"
    print(report(title, ratio))
    print(f"  {1 / ratio.wall.median:.2f} x in wall, {1 / ratio.cpu.median:.2f} x in CPU time")
    save_samples(args.output, machine, {title: ratio})


if __name__ == "__main__":
    sys.exit(run(main))
