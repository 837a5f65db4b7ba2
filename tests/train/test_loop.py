"""The loop on one process, with a toy model: resume, skipping, stopping, freezing."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cloc_mllm.config import OptimConfig
from cloc_mllm.data.images import ImageError, open_image
from cloc_mllm.train.checkpoint import list_checkpoints, load_checkpoint
from cloc_mllm.train.data_order import DataOrder
from cloc_mllm.train.deepspeed_internals import linear_as_it_was
from cloc_mllm.train.engine import start_engine, start_processes, whole_model
from cloc_mllm.train.health import MAX_SKIPPED, DivergedError
from cloc_mllm.train.logging import read_log
from cloc_mllm.train.loop import Job, train
from tests.train.toy import (
    Batch,
    ToyModel,
    collate,
    dataset,
    run_config,
    sample_indices,
    step_fn,
    toy_job,
    train_toy,
)

pytest.importorskip("deepspeed")

STAGES = pytest.mark.parametrize("zero_stage", [0, 2, 3])


def assert_same_checkpoint(actual: Path, expected: Path) -> None:
    """Weights, optimizer state and counters bit for bit."""
    left, right = load_checkpoint(actual), load_checkpoint(expected)
    assert left.state == right.state
    for ours, theirs in ((left.weights, right.weights), (left.optimizer, right.optimizer)):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert torch.equal(ours[name], theirs[name]), name


def last_checkpoint(output_dir: Path) -> Path:
    return list_checkpoints(output_dir / "checkpoints")[-1]


def at_step(step: int, action: Callable[[], None]) -> Callable[[nn.Module, Batch], Any]:
    """`step_fn` that also does something in its `step`-th call (from 1)."""
    num_calls = 0

    def acting(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        nonlocal num_calls
        num_calls += 1
        if num_calls == step:
            action()
        return step_fn(model, batch)

    return acting


def noting(
    seen: list[list[int]], signal_number: int = 0, at: int | None = None
) -> Callable[[nn.Module, Batch], dict[str, Tensor]]:
    """`step_fn` that appends each step's samples, and raises a signal when it has seen `at`."""

    def step(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        seen.append(sample_indices(batch))
        if len(seen) == at:
            signal.raise_signal(signal.Signals(signal_number))
        return step_fn(model, batch)

    return step


def poisoned(steps: set[int], poison: Callable[[nn.Module, Batch], dict[str, Tensor]]) -> Any:
    """`step_fn` with its `steps` (from 1) replaced."""
    num_calls = 0

    def step(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        nonlocal num_calls
        num_calls += 1
        return poison(model, batch) if num_calls in steps else step_fn(model, batch)

    return step


def nan_input(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    return step_fn(model, Batch(batch.x * math.nan, batch.y))


def infinite_constant(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """A loss that is not finite although every gradient is."""
    losses = step_fn(model, batch)
    return losses | {"loss": losses["loss"] + math.inf}


def infinite_gradient(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """A finite loss with an infinite gradient: the square root at 0."""
    losses = step_fn(model, batch)
    return losses | {"loss": losses["loss"] + (model.logit_scale * 0).sqrt().sum()}


def test_training_learns_and_writes_everything(tmp_path: Path) -> None:
    config = run_config(tmp_path, steps=40, save_every=0)
    _, result = train_toy(config, evaluate=lambda model: {"training": float(model.training)})
    losses = [row["loss"] for row in read_log(tmp_path / "log.jsonl")]
    assert result.step == len(losses) == 40
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert result.metrics == {"training": 0.0}
    assert read_log(tmp_path / "log.jsonl", "eval")[-1]["step"] == 40
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000040"]


@pytest.mark.parametrize(
    ("zero_stage", "optim"),
    [(0, None), (2, None), (3, None), (0, OptimConfig(optimizer="muon", warmup_steps=2))],
    ids=["zero-0", "zero-2", "zero-3", "muon"],
)
def test_resume_is_bit_equal_to_the_unbroken_run(
    tmp_path: Path, zero_stage: int, optim: OptimConfig | None
) -> None:
    unbroken, broken = (
        run_config(tmp_path / name, zero_stage=zero_stage) for name in ("unbroken", "broken")
    )
    train_toy(unbroken, optim=optim)
    stop = at_step(5, lambda: signal.raise_signal(signal.SIGTERM))
    train_toy(broken, step_fn=stop, optim=optim)
    _, result = train_toy(broken, optim=optim)
    assert result.step == 10
    assert_same_checkpoint(
        last_checkpoint(tmp_path / "broken"), last_checkpoint(tmp_path / "unbroken")
    )
    logs = [
        [(row["step"], row["loss"], row["lr"], row["grad_norm"]) for row in read_log(path)]
        for path in (tmp_path / "broken" / "log.jsonl", tmp_path / "unbroken" / "log.jsonl")
    ]
    assert logs[0] == logs[1]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A run's last checkpoint, and which samples each step had."""
    directory, seen = tmp_path_factory.mktemp("unbroken"), []
    train_toy(run_config(directory), step_fn=noting(seen))
    return last_checkpoint(directory), seen


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("stops", [(1,), (4,), (9,), (3, 7)], ids=str)
def test_a_run_may_be_stopped_at_any_step(
    tmp_path: Path,
    unbroken: tuple[Path, list[list[int]]],
    stops: tuple[int, ...],
    num_workers: int,
) -> None:
    """Step 3 is the first that spans two epochs; batches prefetched before a stop are not lost."""
    seen: list[list[int]] = []
    for stop in (*stops, None):
        step = noting(seen, signal.SIGTERM if stop else 0, at=stop)
        _, result = train_toy(run_config(tmp_path), step_fn=step, num_workers=num_workers)
        assert result.step == (stop or 10)
    assert seen == unbroken[1]
    assert_same_checkpoint(last_checkpoint(tmp_path), unbroken[0])


def test_a_run_may_resume_at_another_zero_stage(tmp_path: Path) -> None:
    """The optimizer state is stored by name. Only the clipping norm is summed in another order:
    measured 6e-8 after 10 steps; moments that start at zero again would be off by 1e-2."""
    moves = {"same": (0, 0), "0-2": (0, 2), "2-0": (2, 0), "1-3": (1, 3), "3-0": (3, 0)}
    for name, stages in moves.items():
        stop = at_step(5, lambda: signal.raise_signal(signal.SIGTERM))
        train_toy(run_config(tmp_path / name, zero_stage=stages[0]), step_fn=stop)
        train_toy(run_config(tmp_path / name, zero_stage=stages[1]))
    expected = load_checkpoint(last_checkpoint(tmp_path / "same"))
    for name in list(moves)[1:]:
        actual = load_checkpoint(last_checkpoint(tmp_path / name))
        assert actual.state["optimizer_steps"] == expected.state["optimizer_steps"] == 10
        torch.testing.assert_close(actual.weights, expected.weights, atol=1e-6, rtol=0)
        torch.testing.assert_close(actual.optimizer, expected.optimizer, atol=1e-6, rtol=0)


def test_zero_3_starts_without_a_second_copy_of_the_weights(tmp_path: Path) -> None:
    """The main rank makes a whole model when it needs one, and the caller lets it go."""
    model, device = ToyModel(), start_processes()
    model.head.weight.requires_grad_(False)
    model.register_buffer("seen", torch.zeros(2))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with linear_as_it_was():
        engine = start_engine(
            model, step_fn, run_config(tmp_path, zero_stage=3), OptimConfig(warmup_steps=0)
        )
    assert all(parameter.is_meta for parameter in engine.shell.parameters())
    model.get_buffer("seen").add_(1)
    expected["seen"] += 1

    for _ in range(2):
        whole = whole_model(engine, model, device)
        actual = whole.state_dict()
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
        assert not whole.get_parameter("head.weight").requires_grad
        assert whole.get_parameter("encoder.weight").requires_grad


def test_torch_is_left_as_it_was(tmp_path: Path) -> None:
    """ZeRO-3 replaces `functional.linear`; what the process does next must not notice."""
    linear = nn.functional.linear
    train_toy(run_config(tmp_path, steps=1, zero_stage=3))
    assert nn.functional.linear is linear


@STAGES
@pytest.mark.parametrize("poison", [nan_input, infinite_constant, infinite_gradient])
def test_a_step_that_is_not_finite_changes_nothing(
    tmp_path: Path, zero_stage: int, poison: Callable[..., Any]
) -> None:
    """The skipped step is the last one, so the state after it must be the one before it."""
    config = run_config(tmp_path, steps=4, save_every=1, zero_stage=zero_stage)
    train_toy(config, step_fn=poisoned({4}, poison))
    before, after = (load_checkpoint(path) for path in list_checkpoints(tmp_path / "checkpoints"))
    assert (before.state["step"], after.state["step"]) == (3, 4)
    assert before.state["optimizer_steps"] == after.state["optimizer_steps"] == 3
    for old, new in ((before.weights, after.weights), (before.optimizer, after.optimizer)):
        assert all(torch.equal(old[name], new[name]) for name in old)
    (row,) = read_log(tmp_path / "log.jsonl", "skipped")
    assert row["step"] == 4
    assert len(row["sample_ids"]) == config.global_batch_size


@STAGES
def test_training_goes_on_after_a_skipped_step(tmp_path: Path, zero_stage: int) -> None:
    config = run_config(tmp_path, steps=6, zero_stage=zero_stage)
    model, _ = train_toy(config, step_fn=poisoned({3}, nan_input))
    assert load_checkpoint(last_checkpoint(tmp_path)).state["optimizer_steps"] == 5
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("every", [1, 2], ids=["in a row", "every second"])
def test_too_many_skipped_steps_stop_the_run(tmp_path: Path, every: int) -> None:
    steps = set(range(5, 5 + every * MAX_SKIPPED, every))
    newest = f"step_{4 * ((max(steps) - 1) // 4):08d}"
    with pytest.raises(DivergedError, match=rf"10 of the last \d+ steps.*{newest}"):
        train_toy(run_config(tmp_path, steps=40), step_fn=poisoned(steps, nan_input))
    weights = load_checkpoint(last_checkpoint(tmp_path)).weights
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["ctrl-c", "sigterm", "sighup"]
)
def test_a_signal_ends_the_step_saves_and_reports(tmp_path: Path, number: signal.Signals) -> None:
    config = run_config(tmp_path, save_every=0)
    stop = at_step(3, lambda: os.kill(os.getpid(), number))
    _, result = train_toy(config, step_fn=stop)
    assert (result.step, result.exit_code) == (3, 128 + number)
    assert last_checkpoint(tmp_path).name == "step_00000003"
    assert not (tmp_path / "model").exists()


def test_the_echo_of_a_signal_is_not_a_second_request(tmp_path: Path) -> None:
    """A launcher forwards the Ctrl-C that its whole process group has already got."""

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)

    _, result = train_toy(run_config(tmp_path), step_fn=at_step(2, twice))
    assert (result.step, result.exit_code) == (2, 130)


def test_signal_handlers_are_given_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train_toy(run_config(tmp_path, steps=1))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_time_up_saves_checkpoint_and_model(tmp_path: Path) -> None:
    _, result = train_toy(run_config(tmp_path, max_seconds=1e-9))
    assert (result.step, result.exit_code) == (1, 0)
    assert last_checkpoint(tmp_path).name == "step_00000001"
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first, _ = train_toy(run_config(tmp_path))
    again, result = train_toy(run_config(tmp_path))
    assert result.step == 10
    for actual, expected in zip(again.parameters(), first.parameters(), strict=True):
        assert torch.equal(actual, expected)


def test_frozen_parameters_do_not_move(tmp_path: Path) -> None:
    model, before = ToyModel(), ToyModel()
    optim = OptimConfig(lr=1e-2, warmup_steps=0, layer_lr={"encoder": 0.0})
    train_toy(run_config(tmp_path), optim, model=model)
    for (name, after), start in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(after, start) == name.startswith("encoder"), name


def test_checkpoints_may_leave_frozen_parameters_out(tmp_path: Path) -> None:
    optim = OptimConfig(lr=1e-2, warmup_steps=0, layer_lr={"encoder": 0.0})
    stop = at_step(5, lambda: signal.raise_signal(signal.SIGTERM))
    train_toy(run_config(tmp_path / "a"), optim, kept_frozen=(), step_fn=stop)
    weights = load_checkpoint(last_checkpoint(tmp_path / "a")).weights
    assert not [name for name in weights if name.startswith("encoder")]
    resumed, _ = train_toy(run_config(tmp_path / "a"), optim, kept_frozen=())
    unbroken, _ = train_toy(run_config(tmp_path / "b"), optim)
    for actual, expected in zip(resumed.parameters(), unbroken.parameters(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": {"image_size": 96}}, "fingerprint image_size: 64 != 96"),
        ({"resolved_config": {"run": {"seed": 1}}}, "config run.seed: 0 != 1"),
        ({"dataset": [(torch.zeros(6), torch.zeros(3))] * 19}, "training samples: 20 != 19"),
    ],
    ids=["fingerprint", "config", "data"],
)
def test_the_checkpoint_of_another_run_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    train_toy(run_config(tmp_path, steps=1))
    with pytest.raises(ValueError, match=message):
        train_toy(run_config(tmp_path, steps=2), **changes)


def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_toy(run_config(tmp_path / "broken"))
    train_toy(run_config(tmp_path / "unbroken"))
    newest = last_checkpoint(tmp_path / "broken")
    (newest / "optimizer.safetensors").write_bytes(b"")
    train_toy(run_config(tmp_path / "broken"))
    said = capsys.readouterr().out
    assert "optimizer.safetensors differs from its sha256" in said
    assert "resuming from" in said
    assert "step_00000008" in said
    assert_same_checkpoint(newest, last_checkpoint(tmp_path / "unbroken"))


def test_checkpoints_are_not_overwritten_by_a_run_that_does_not_resume(tmp_path: Path) -> None:
    train_toy(run_config(tmp_path, steps=1))
    with pytest.raises(ValueError, match=r"holds checkpoints, but run.resume is false"):
        train_toy(run_config(tmp_path, steps=1, resume=False))


def test_a_single_checkpoint_is_not_enough(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep at least 2"):
        train_toy(run_config(tmp_path, keep_checkpoints=1))


def test_workers_do_not_change_the_run(tmp_path: Path) -> None:
    losses = []
    for num_workers in (0, 2):
        config = run_config(tmp_path / str(num_workers), steps=5)
        train_toy(config, num_workers=num_workers)
        losses.append([row["loss"] for row in read_log(tmp_path / str(num_workers) / "log.jsonl")])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_sample_that_cannot_be_read_stops_the_run(tmp_path: Path, num_workers: int) -> None:
    """An image decoded when the records were built, so it is damaged now. The run says which, and
    goes on from its checkpoint, without a sample lost, when the file is whole again."""

    def broken(items: list[Any]) -> Batch:
        if any(torch.equal(y, dataset()[5][1]) for _, (_, y) in items):
            open_image(b"", name="000123")
        return collate(items)

    def train_with(collate_fn: Any, seen: list[list[int]]) -> None:
        train_toy(
            run_config(tmp_path, save_every=1),
            collate_fn=collate_fn,
            num_workers=num_workers,
            step_fn=noting(seen),
        )

    seen: list[list[int]] = []
    with pytest.raises(ImageError, match=r"'000123' cannot be used \(missing_image\)"):
        train_with(broken, seen)
    assert multiprocessing.active_children() == []  # Python would wait for them at exit
    train_with(collate, seen)
    order = DataOrder(20, 8, seed=0)
    assert seen == [[index for _, index in order.batch(step)] for step in range(10)]
    one_epoch = list(itertools.chain(*seen))[:20]
    assert sorted(one_epoch) == list(range(20))  # nothing lost, nothing twice


def test_bf16_keeps_float32_weights(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []

    class Watching(ToyModel):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            seen.append(self.encoder(x).dtype)
            return out

    model, _ = train_toy(run_config(tmp_path, steps=2, precision="bf16"), model=Watching())
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_batch_norm_statistics_stay_fixed(tmp_path: Path) -> None:
    class Normed(ToyModel):
        def __init__(self) -> None:
            super().__init__()
            self.batch_norm = nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.batch_norm(x))

    job: Job = toy_job(model=Normed())
    train(job, run_config(tmp_path, steps=2), OptimConfig(warmup_steps=0))
    assert torch.equal(job.model.batch_norm.running_mean, torch.zeros(6))
