from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cloc_mllm.config import DataConfig
from cloc_mllm.data.mixture import load_training_data, parts_of
from cloc_mllm.data.parquet import load_records, write_records
from cloc_mllm.data.records import Record


@pytest.fixture
def folders(tiny_scenes: list[Record], tmp_path: Path) -> tuple[str, str]:
    write_records(tiny_scenes[:5], tmp_path / "b")
    write_records(tiny_scenes[5:8], tmp_path / "a")
    return str(tmp_path / "b"), str(tmp_path / "a")


def test_records_stand_one_set_behind_another_in_the_order_of_names(folders) -> None:
    b, a = folders
    mixture = load_training_data(DataConfig(mixture={b: 2, a: 1}))
    expected = [*load_records(a), *load_records(b)]
    assert [mixture[index] for index in range(len(mixture))] == expected
    assert parts_of(mixture) == ((a, 3, 1), (b, 5, 2))
    assert load_training_data(DataConfig(mixture={a: 1, b: 2})).parts == parts_of(mixture)
    assert list(mixture.without_images()) == [dataclasses.replace(r, image=b"") for r in expected]
    with pytest.raises(IndexError, match="record 8 of 8"):
        mixture[8]


def test_one_set_is_no_mixture(folders) -> None:
    dataset = load_training_data(DataConfig(train=folders[0]))
    assert (len(dataset), parts_of(dataset)) == (5, ())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "data.train is empty; name a directory"),
        ({"train": "x", "mixture": {"y": 1}}, "both are given"),
        ({"mixture": {"y": 0}}, "gives y the weight 0; give a number above 0"),
        ({"mixture": {"y": float("nan")}}, "gives y the weight nan"),
        ({"mixture": {"y": float("inf")}}, "gives y the weight inf"),
    ],
    ids=["none", "both", "zero", "nan", "infinite"],
)
def test_what_is_no_mixture_is_refused(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_training_data(DataConfig(**config))
