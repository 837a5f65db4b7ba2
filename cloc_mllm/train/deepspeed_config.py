"""DeepSpeed's configuration, made from ours, so that there is no second file to write."""

from __future__ import annotations

from typing import Any

from cloc_mllm.config import OptimConfig, RunConfig

# Numbers that ZeRO 1 and 2 send at a time and keep a buffer for. DeepSpeed's own 500 million, in
# float32, would take 2 GB of each GPU.
REDUCE_BUCKET = 50_000_000


def deepspeed_config(run: RunConfig, optim: OptimConfig, world_size: int) -> dict[str, Any]:
    """Makes the dictionary that `deepspeed.initialize` takes.

    Weights, gradients and optimizer state stay in float32: bf16 is `torch.autocast` around the
    forward pass, because DeepSpeed's own bf16 takes a phantom optimizer step at stage 0. The
    optimizer is ours, so there is no optimizer section and nothing to compile.

    Raises:
        ValueError: the ranks cannot share `global_batch_size` evenly, or ZeRO would cut matrices
            that Muon needs whole.
    """
    if optim.optimizer == "muon" and run.zero_stage:
        raise ValueError(
            f"optim.optimizer is muon, which needs whole matrices, but run.zero_stage "
            f"{run.zero_stage} cuts them; use zero_stage 0 or adamw"
        )
    if run.global_batch_size % world_size:
        raise ValueError(
            f"run.global_batch_size is {run.global_batch_size}, which {world_size} ranks cannot "
            f"share evenly; use a multiple of {world_size}"
        )
    return {
        "train_batch_size": run.global_batch_size,
        "train_micro_batch_size_per_gpu": run.global_batch_size // world_size,
        "gradient_accumulation_steps": 1,  # contrastive losses do not add up over micro-batches
        # without ZeRO `step_if_sound` clips, which knows the norm that DeepSpeed would ask for
        "gradient_clipping": optim.grad_clip if run.zero_stage else 0.0,
        "zero_optimization": {"stage": run.zero_stage, "reduce_bucket_size": REDUCE_BUCKET},
    }
