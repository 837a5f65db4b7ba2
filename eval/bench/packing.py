"""Tokens a second (padding not counted) of our packed step against a plain `transformers.Trainer`
that pads, on the same language model and rows: forward, backward, clipping and optimizer.

    python eval/bench/packing.py --questions 1 2 4 8 16 --out runs/bench/packing.json
    python eval/bench/packing.py --model runs/smollm2 --images 4 --batches 1 --pairs 3
"""

import argparse
import statistics
import tempfile

from cloc_mllm.bench.packing import draw_batches, language_model, matched_sides, padding_share
from cloc_mllm.bench.ratio import interleaved_ratio, machine_state, report, save_samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="", help="a language model's directory; a random small one"
    )
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--images", type=int, default=16, help="of a batch")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--out", default="runs/bench/packing.json")
    args = parser.parse_args()
    machine = machine_state()
    print(machine)
    model, processor = language_model(args.model)
    batches = draw_batches(processor, args.questions, args.batches, args.images)
    share = padding_share(batches)
    limit = 1 / (1 - share)
    num_tokens = sum(len(row.input_ids) for rows in batches for row in rows)
    with tempfile.TemporaryDirectory() as out:
        pad_id = processor.tokenizer.pad_token_id
        sides = matched_sides(model, batches, pad_id, args.max_length, out)
        ratio = interleaved_ratio(*sides, pairs=args.pairs, warmups=1)
    title = f"{args.model or 'random Llama'}, questions {args.questions}, packed / Trainer"
    print(report(title, ratio))
    for clock, samples in (("wall", ratio.wall), ("CPU", ratio.cpu)):
        ours, theirs = (num_tokens / statistics.median(s) for s in (samples.ours, samples.theirs))
        faster = 1 / samples.median
        print(
            f"  {clock}: {ours:,.0f} against {theirs:,.0f} tokens a second, {faster:.2f} x; "
            f"padding {share:.1%}, limit {limit:.2f} x, {faster / limit:.2f} of it"
        )
    save_samples(args.out, machine, {title: ratio, "padding share": share})


if __name__ == "__main__":
    main()
