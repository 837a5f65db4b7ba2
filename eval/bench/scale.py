"""What the paper's recipe costs on H100s: computed, not run (docs/scale.md).

python eval/bench/scale.py [--mfu 0.3] [--micro_batch 64]
"""

import argparse

from cloc_mllm.bench.scale import (
    Gpu,
    Recipe,
    Shapes,
    forward_flops,
    loss_flops,
    memory,
    num_parameters,
    step_time,
)

MODELS = {"ViT-B-16": 224, "ViT-L-14": 336}
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mfu", type=float, default=Gpu.mfu, help="share of the bf16 peak")
    parser.add_argument("--micro_batch", type=int, default=64, help="images forward at a time")
    parser.add_argument("--batch", type=int, default=Recipe.batch_size)
    args = parser.parse_args()
    recipe, gpu = Recipe(batch_size=args.batch), Gpu(mfu=args.mfu)
    print("GiB and seconds on a GPU; all*: with gradient checkpointing")
    for name, size in MODELS.items():
        shapes = Shapes.of(name, size)
        print(f"\n{name} at {size}, {num_parameters(shapes) / 1e6:.0f} M parameters; COMPUTED")
        parts = forward_flops(shapes, recipe)
        tower = parts["image tower"]
        for part, flops in parts.items():
            print(f"  {part:<14} {flops / 1e9:8.2f} GFLOP forward  {flops / tower:7.1%}")
        loss = loss_flops(shapes, recipe)
        print(f"  {'loss':<14} {loss / 1e9:8.2f} GFLOP in all   {loss / 3 / tower:7.1%}")
        print("  GPUs stage  weights grads  Adam  activ. (checkp.) gathered  all* |"
              "  towers  loss  comm.  s/step  GPU-days")  # fmt: skip
        for gpus in (8, 64, 256):
            for stage in (0, 1, 2, 3):
                share = args.batch // gpus  # stage 3 knows no micro-batches
                images = share if stage == 3 else min(args.micro_batch, share)
                layout = {"gpus": gpus, "stage": stage}
                plain = memory(shapes, recipe, **layout, images=images, checkpointing=False)
                less = memory(shapes, recipe, **layout, images=images, checkpointing=True)
                time = step_time(shapes, recipe, gpu, **layout, extra_forward=True)
                parts = (plain.weights, plain.gradients, plain.optimizer, plain.activations)
                columns = [f"{part / GIB:6.2f}" for part in (*parts, less.activations)]
                columns += [f"{plain.gathered / GIB:8.2f}", f"{less.total / GIB:6.1f} |"]
                seconds = (time.towers, time.loss, time.communication, time.total)
                columns += [f"{second:7.3f}" for second in seconds]
                days = gpus * time.total * recipe.steps / 86400
                print(f"  {gpus:4d} {stage:5d}  {' '.join(columns)} {days:8,.0f}")


if __name__ == "__main__":
    main()
