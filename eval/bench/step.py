"""A training step of CLOC (M = 4) and of our plain CLIP against open_clip's own CLIP step, and the
regions' text at its real length against padded.

    python eval/bench/step.py --data runs/data/flickr8k-val --out runs/bench/step.json
"""

import argparse

import torch

from cloc_mllm.bench.ratio import interleaved_ratio, machine_state, report, save_samples
from cloc_mllm.bench.step import matched_steps, read_batch, region_text
from cloc_mllm.data.tokenizer import load_text_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="", help="records; built-in scenes if left out")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--architecture", default="ViT-B-16")
    parser.add_argument("--precisions", nargs="+", choices=["bf16", "fp32"], default=["bf16"])
    parser.add_argument("--models", nargs="*", default=["clip", "cloc"])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--out", default="runs/bench/step.json")
    args = parser.parse_args()
    machine, results = machine_state(), {}
    print(machine)
    tokenizer = load_text_tokenizer(f"open_clip:{args.architecture}")
    batch = read_batch(args.data, args.images, tokenizer, image_size=224)
    print(
        f"{len(batch.pixel_values)} images, {len(batch.boxes)} regions, "
        f"{len(batch.phrase_input_ids)} distinct phrases"
    )
    for precision in args.precisions:
        bf16 = precision == "bf16"
        for name in args.models:
            sides = matched_steps(args.architecture, batch, tokenizer, name, bf16=bf16)
            title = f"{name} / open_clip, {precision}"
            results[title] = interleaved_ratio(*sides, pairs=args.pairs, warmups=1)
            print(report(title, results[title]), flush=True)
        model = matched_steps(args.architecture, batch, tokenizer, "clip", bf16=bf16)[0].model
        ours, theirs = region_text(model, batch, bf16=bf16)
        torch.testing.assert_close(ours(), theirs(), **({"atol": 0.1, "rtol": 0} if bf16 else {}))
        title = f"region text: real length / padded, {precision}"
        results[title] = interleaved_ratio(ours, theirs, pairs=args.pairs, warmups=1)
        print(report(title, results[title]), flush=True)
    save_samples(args.out, machine, results)


if __name__ == "__main__":
    main()
