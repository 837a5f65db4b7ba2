"""What one process shows of the engine: the rank's GPU, clipping, the thread of checkpoints."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from cloc_mllm.config import OptimConfig
from cloc_mllm.train import checkpoint
from cloc_mllm.train.checkpoint import Checkpoint, CheckpointWriter, list_checkpoints
from cloc_mllm.train.engine import _gpu_of_rank, start_engine, start_processes, step_if_sound
from tests.train.toy import ToyModel, collate, dataset, run_config, step_fn

pytest.importorskip("deepspeed")


@pytest.mark.parametrize(
    ("local_rank", "num_gpus", "expected"),
    [(0, 1, 0), (3, 8, 3), (3, 1, 0)],
    ids=["alone", "of eight", "srun shows each rank one"],
)
def test_the_gpu_of_a_rank(local_rank: int, num_gpus: int, expected: int) -> None:
    assert _gpu_of_rank(local_rank, num_gpus) == expected


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(ValueError, match="LOCAL_RANK 4 of its machine, but 4 GPUs are visible"):
        _gpu_of_rank(4, 4)


@pytest.mark.parametrize("grad_clip", [0.0, 0.1, 1e6], ids=["none", "clips", "too long to clip"])
def test_clipping_is_torchs(tmp_path: Path, grad_clip: float) -> None:
    """The first moment is a tenth of the clipped gradient."""
    device = start_processes()
    batch = collate(list(enumerate(dataset(8))))
    optim = OptimConfig(grad_clip=grad_clip, betas=(0.9, 0.999), warmup_steps=0)
    model, reference = ToyModel(dropout=0.0), ToyModel(dropout=0.0)
    engine = start_engine(model, step_fn, run_config(tmp_path), optim)
    loss = engine(batch.to(device))["loss"]
    engine.backward(loss)
    outcome = step_if_sound(engine, loss, grad_clip, flag=True)
    actual = {
        name: engine.optimizer.state[parameter]["exp_avg"]
        for name, parameter in model.named_parameters()
    }

    step_fn(reference, batch)["loss"].backward()
    limit = grad_clip or float("inf")
    expected_norm = float(nn.utils.clip_grad_norm_(reference.parameters(), limit))

    assert outcome.flagged and not outcome.fault
    assert outcome.loss == pytest.approx(float(loss.detach()))
    assert outcome.grad_norm == pytest.approx(expected_norm)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(actual[name], 0.1 * parameter.grad, msg=name)


def empty(step: int) -> Checkpoint:
    tensors = {"a": torch.zeros(1)}
    return Checkpoint(tensors, tensors, {"step": step, "config": {}})


def test_checkpoints_are_written_behind_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on, save = threading.Event(), checkpoint.save_checkpoint

    def slow(*arguments: object) -> Path:
        may_go_on.wait()
        return save(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "save_checkpoint", slow)
    with CheckpointWriter() as writer:
        writer.write(tmp_path, empty(1), keep=2)
        assert list_checkpoints(tmp_path) == []  # and the run is here already
        may_go_on.set()
        writer.write(tmp_path, empty(2), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001", "step_00000002"]


def test_a_failed_write_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"), CheckpointWriter() as writer:
        writer.write(tmp_path, empty(1), keep=2)
