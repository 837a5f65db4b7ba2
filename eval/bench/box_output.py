"""Milliseconds a box: box head and location tokens against integers as text, under the grammar; the
picture and the start of the questions read anew in each call (`ground`), or read before (`write`).

    python eval/bench/box_output.py --layers 4 30 --out runs/bench/box_output.json
"""

import argparse
import itertools
import statistics

from cloc_mllm.bench.box_output import check_boxes, ground, predictors, write
from cloc_mllm.bench.ratio import interleaved_ratio, machine_state, report, save_samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="*", default=[4, 30])
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", default="runs/bench/box_output.json")
    args = parser.parse_args()
    machine, results = machine_state(), {}
    print(machine)
    for num_layers, timed in itertools.product(args.layers, (ground, write)):
        sides = {name: timed(p, args.questions) for name, p in predictors(num_layers).items()}
        for side in sides.values():
            check_boxes(side())
        text = sides.pop("integers as text")
        for name, side in sides.items():
            title = f"{timed.__name__}, {num_layers} layers, {args.questions} boxes, {name}"
            ratio = results[title] = interleaved_ratio(side, text, pairs=args.pairs, warmups=0)
            ours, theirs = (
                1000 * statistics.median(seconds) / args.questions
                for seconds in (ratio.cpu.ours, ratio.cpu.theirs)
            )
            print(
                f"{report(title, ratio)}: {ours:.1f} ms a box, integers as text {theirs:.1f}, "
                f"{1 / ratio.cpu.median:.2f} x faster (CPU)",
                flush=True,
            )
    save_samples(args.out, machine, results)


if __name__ == "__main__":
    main()
