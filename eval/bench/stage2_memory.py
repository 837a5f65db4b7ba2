"""Peak memory of stage 2's LoRA step on a random model of a shape, beside what `--dry_run` says.

python eval/bench/stage2_memory.py --shape qwen2.5-0.5b --dtype float32 --precision fp32
python eval/bench/stage2_memory.py --shape qwen2.5-0.5b --dtype bfloat16 --precision bf16
"""

import argparse
import tempfile
from pathlib import Path

from cloc_mllm.bench.stage2_memory import SHAPES, estimates, job, measure, write_language_model

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--images", type=int, default=4, help="per step")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--language_model", type=Path, help="directory to keep the model in")
    parser.add_argument("--estimate", action="store_true", help="only, of three settings")
    args = parser.parse_args()
    if args.estimate:
        for setting, found in estimates(args.shape):
            print(f"{setting:<34} {found.total / 2**30:6.2f} GiB {found}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.language_model or Path(temporary) / args.shape
        if not (directory / "config.json").is_file():
            write_language_model(args.shape, directory)
        config = job(directory, dtype=args.dtype, precision=args.precision, num_images=args.images)
        measured = measure(config, args.steps)
    parts = {name: round(value / MIB) for name, value in vars(measured.estimate).items()}
    parts.pop("flops")
    estimated = measured.estimate.total
    print(f"{args.shape}, weights {args.dtype}, precision {args.precision}, {args.images} images")
    print(
        f"  measured {measured.peak / MIB:,.0f} MiB, estimated {estimated / MIB:,.0f} MiB "
        f"({estimated / measured.peak - 1:+.1%}): {parts}"
    )
    print("  losses " + " ".join(f"{loss:.4f}" for loss in measured.losses))


if __name__ == "__main__":
    main()
