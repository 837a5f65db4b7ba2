from __future__ import annotations

import pytest

from cloc_mllm.config import OptimConfig, RunConfig
from cloc_mllm.train.deepspeed_config import REDUCE_BUCKET, deepspeed_config


@pytest.mark.parametrize(("world_size", "per_rank"), [(1, 12), (2, 6), (3, 4)])
def test_batch_is_shared_evenly(world_size: int, per_rank: int) -> None:
    run = RunConfig(global_batch_size=12, zero_stage=2)
    actual = deepspeed_config(run, OptimConfig(grad_clip=0.5), world_size)
    assert actual == {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": per_rank,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": REDUCE_BUCKET},
    }


def test_without_zero_deepspeed_does_not_clip() -> None:
    """Our own step does, which knows the norm."""
    actual = deepspeed_config(RunConfig(zero_stage=0), OptimConfig(grad_clip=0.5), world_size=1)
    assert actual["gradient_clipping"] == 0.0


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"global_batch_size is 10.*4 ranks.*multiple of 4"):
        deepspeed_config(RunConfig(global_batch_size=10), OptimConfig(), world_size=4)


def test_muon_refuses_the_stage_that_cuts_its_matrices() -> None:
    with pytest.raises(ValueError, match=r"muon, which needs whole matrices.*zero_stage 2"):
        deepspeed_config(RunConfig(zero_stage=2), OptimConfig(optimizer="muon"), world_size=1)
