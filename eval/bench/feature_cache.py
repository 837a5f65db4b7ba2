"""A step of stage 2 (batch, loss, gradient) with `data.feature_cache` against one without.

python eval/bench/feature_cache.py --cloc runs/stage1_flickr8k/model \
    --language_model runs/smollm2 --data runs/data/flickr8k-train
"""

import argparse
import tempfile

from cloc_mllm.bench.feature_cache import matched_steps
from cloc_mllm.bench.ratio import interleaved_ratio, machine_state, report, save_samples
from cloc_mllm.config import MllmConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cloc", required=True, help="a stage-1 model")
    parser.add_argument("--language_model", required=True)
    parser.add_argument("--data", required=True, help="records")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", default="runs/bench/feature_cache.json")
    args = parser.parse_args()
    machine = machine_state()
    print(machine)
    model = MllmConfig(cloc=args.cloc, language_model=args.language_model)
    with tempfile.TemporaryDirectory() as cache:
        sides = matched_steps(model, args.data, args.images, args.questions, cache)
        ratio = interleaved_ratio(*sides, pairs=args.pairs, warmups=0)
    title = f"{args.cloc} + {args.language_model}, {args.images} images, cached / plain"
    print(report(title, ratio))
    print(f"  {1 / ratio.wall.median:.2f} x in wall, {1 / ratio.cpu.median:.2f} x in CPU time")
    save_samples(args.out, machine, {title: ratio})


if __name__ == "__main__":
    main()
