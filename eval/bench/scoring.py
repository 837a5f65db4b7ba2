"""Scoring against lmms-eval's: `python eval/bench/scoring.py --out runs/bench/scoring.json`.

Needs `pip install --no-deps lmms-eval`.
"""

import argparse

from cloc_mllm.bench.ratio import interleaved_ratio, machine_state, report, save_samples
from cloc_mllm.bench.scoring import lmms_eval_module, lmms_eval_side, our_side, random_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10834])
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--out", default="runs/bench/scoring.json")
    args = parser.parse_args()
    peer = lmms_eval_module()
    if peer is None:
        raise SystemExit("lmms-eval is not installed; run: pip install --no-deps lmms-eval")
    machine = machine_state()
    print("noisy machine:" if machine["noisy"] else "machine:", machine)
    samples = {}
    for num_rows in args.rows:
        results = random_results(num_rows)
        ours, theirs = our_side(results), lmms_eval_side(results, peer)
        assert ours() == theirs(), f"different numbers: {ours()} and {theirs()}"
        title = f"{num_rows} rows, seven numbers"
        samples[title] = interleaved_ratio(ours, theirs, pairs=args.pairs)
        print(report(title, samples[title]), f"-> {1 / samples[title].cpu.median:.1f}x faster")
        print("  the same on both sides:", ours())
        save_samples(args.out, machine, samples)


if __name__ == "__main__":
    main()
