from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloc_mllm.train.data_order import DataOrder, RankBatches, SeededDataset, load_batches


@settings(max_examples=50, deadline=None)
@given(num_samples=st.integers(1, 30), batch=st.integers(1, 12), seed=st.integers(0, 5))
def test_each_epoch_shows_every_sample_exactly_once(
    num_samples: int, batch: int, seed: int
) -> None:
    order = DataOrder(num_samples, batch, seed)
    num_steps = -(-3 * num_samples // batch)  # three epochs or a little more
    keys = [key for step in range(num_steps) for key in order.batch(step)]
    for epoch in range(3):
        assert sorted(i for e, i in keys if e == epoch) == list(range(num_samples))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    order = DataOrder(num_samples=10, global_batch_size=8, seed=3)
    for step in range(5):
        parts = [order.batch(step, rank, world_size) for rank in range(world_size)]
        assert [key for part in parts for key in part] == order.batch(step)


def test_resuming_at_any_step_continues_the_same_stream() -> None:
    order = DataOrder(num_samples=7, global_batch_size=4, seed=0)
    unbroken = list(RankBatches(order, 0, 9, rank=1, world_size=2))
    for start in range(9):
        assert list(RankBatches(order, start, 9, rank=1, world_size=2)) == unbroken[start:]


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    order = DataOrder(num_samples=50, global_batch_size=50, seed=0)
    first, second = ([i for _, i in order.batch(step)] for step in (0, 1))
    other_seed = [i for _, i in DataOrder(50, 50, seed=1).batch(0)]
    assert first != second
    assert first != other_seed
    assert first != sorted(first)


def test_sample_seeds_follow_run_seed_epoch_and_sample_only() -> None:
    samples = SeededDataset(["a", "b"], seed=0)
    again = SeededDataset(["a", "b"], seed=0)
    seeds = {samples[(epoch, index)][0] for epoch in range(3) for index in range(2)}
    assert len(seeds) == 6
    assert samples[(2, 1)] == again[(2, 1)]
    assert samples[(2, 1)][1] == "b"
    assert SeededDataset(["a", "b"], seed=1)[(2, 1)] != samples[(2, 1)]


def test_empty_data_is_refused() -> None:
    with pytest.raises(ValueError, match="training data is empty"):
        DataOrder(num_samples=0, global_batch_size=4, seed=0)


def with_num_threads(items: list[tuple[int, int]]) -> tuple[list[tuple[int, int]], int]:
    return items, torch.get_num_threads()


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_workers_keep_the_order_and_have_one_thread_each(num_workers: int) -> None:
    keys = RankBatches(DataOrder(50, 4, seed=0), 3, 40, rank=1, world_size=2)
    samples = SeededDataset(range(100, 150), seed=0)
    batches = list(load_batches(range(100, 150), keys, with_num_threads, num_workers))
    assert [items for items, _ in batches] == [[samples[key] for key in batch] for batch in keys]
    assert num_workers == 0 or {num_threads for _, num_threads in batches} == {1}
