"""The Prompter's cost, 4 boxes and 4 texts an image, as a share of open_clip's image tower.

    python eval/bench/prompter.py --out runs/bench/prompter.json

That every form equals a whole transformer layer for each prompt is `tests/models/test_prompter.py`.
"""

import argparse

from cloc_mllm.bench.prompter import FORMS, build_vision, make_inputs, prompter_and_tower
from cloc_mllm.bench.ratio import interleaved_ratio, machine_state, report, save_samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", default="ViT-B-16")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--precisions", nargs="+", choices=["bf16", "fp32"], default=["fp32"])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), help=", ".join(FORMS))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--out", default="runs/bench/prompter.json")
    args = parser.parse_args()
    machine, results = machine_state(), {}
    print(machine)
    for form in args.forms:
        vision = build_vision(args.architecture, form)
        inputs = make_inputs(vision, args.images)
        for precision in args.precisions:
            for backward in (False, True):
                sides = prompter_and_tower(
                    vision, inputs, bf16=precision == "bf16", backward=backward
                )
                passes = "forward + backward" if backward else "forward"
                title = f"{form}, {precision}, {passes}"
                results[title] = interleaved_ratio(*sides, pairs=args.pairs, warmups=1)
                share = f"{results[title].cpu.median:.1%} of the tower's CPU time"
                print(f"{report(title, results[title])}: {share}", flush=True)
    save_samples(args.out, machine, results)


if __name__ == "__main__":
    main()
