"""One prefill an image against one `generate` call a question: the shipped model on built-in test
scenes, then k questions on one image for a model with 196 image tokens, beside k(I+q)/(I+kq).

    python eval/bench/generation.py --out runs/bench/generation.json
"""

import argparse

from cloc_mllm.bench.generation import (
    check_equal,
    ideal_speedup,
    random_predictor,
    scene_questions,
    together_and_apart,
)
from cloc_mllm.bench.ratio import interleaved_ratio, machine_state, report, save_samples
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.inference.grounding_predictor import GroundingPredictor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--questions", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", default="runs/bench/generation.json")
    args = parser.parse_args()
    machine, results = machine_state(), {}
    print(machine)
    scenes = list(generate_scenes(args.scenes, split="test"))
    questions = scene_questions(scenes)
    sides = together_and_apart(GroundingPredictor.from_pretrained(device="cpu"), questions)
    check_equal(sides[0](), sides[1]())
    title = f"{len(questions)} questions on {len(scenes)} scenes, answers identical"
    results[title] = interleaved_ratio(*sides, pairs=args.pairs, warmups=0)
    cpu = results[title].cpu.median
    print(f"{report(title, results[title])}: {1 / cpu:.1f} x faster (CPU)", flush=True)

    predictor = random_predictor(args.layers)
    image = next(one.image for one in questions)
    about_one = [one for one in questions if one.image is image]
    for k in args.questions:
        asked = (about_one * k)[:k]
        sides, ideal = together_and_apart(predictor, asked), ideal_speedup(predictor, asked)
        check_equal(sides[0](), sides[1]())
        title = f"k = {k}, answers identical"
        results[title] = interleaved_ratio(*sides, pairs=args.pairs, warmups=0)
        speedup = 1 / results[title].cpu.median
        print(
            f"{report(title, results[title])}: {speedup:.2f} x faster (CPU), "
            f"{speedup / ideal:.0%} of k(I+q)/(I+kq) = {ideal:.2f}",
            flush=True,
        )
    save_samples(args.out, machine, results)


if __name__ == "__main__":
    main()
