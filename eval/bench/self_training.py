"""Rounds of self-training on built-in scenes: quality of the labels, and of the models.

python eval/bench/self_training.py --out runs/bench/self_training
"""

import argparse
import json
from pathlib import Path

from cloc_mllm.bench.self_training import Experiment
from cloc_mllm.command_line import parse_job
from cloc_mllm.config import Stage1Config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="training/configs/stage1_openmoji.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/self_training"))
    parser.add_argument("--true", type=int, default=1000, help="scenes with true regions")
    parser.add_argument("--captioned", type=int, default=4000, help="scenes with captions alone")
    parser.add_argument("--validation", type=int, default=300)
    parser.add_argument("--first-steps", type=int, default=200)
    parser.add_argument("--round-steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threshold", type=float, default=0.6)
    args = parser.parse_args()
    config, _ = parse_job(Stage1Config, ["--config", args.config], prog="stage1", description="")
    experiment = Experiment(
        config,
        args.out,
        num_true=args.true,
        num_captioned=args.captioned,
        num_validation=args.validation,
        first_steps=args.first_steps,
        round_steps=args.round_steps,
        num_rounds=args.rounds,
        threshold=args.threshold,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "rounds.jsonl", "w", encoding="utf-8") as file:
        for row in experiment.run():
            print(json.dumps(row), flush=True)
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
