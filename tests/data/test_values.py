"""Ids and numbers, whatever an annotation file holds."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloc_mllm.data.values import by_id, id_key, number, numbers, size_of


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *[(one, "1") for one in (1, 1.0, "1", "1.0", " 1 ", "1.", "\ufeff1", "1\r\n")],
        *[(-3, "-3"), (1.5, "1.5"), (10**20, str(10**20)), (1e20, str(10**20))],
        *[("007", "007"), ("a/0001.jpg", "a/0001.jpg"), ("1e3", "1e3"), ("v1.0.0", "v1.0.0")],
        *[("0", "0"), (0, "0"), (-0.0, "0"), ("None", "None"), ("１", "１")],
        *[(none, None) for none in (None, "", "  ", True, False, math.nan, math.inf, [1], {})],
    ],
)
def test_id(value: Any, expected: str | None) -> None:
    assert id_key(value) == expected


@given(st.integers(-(10**15), 10**15))
def test_an_integer_is_one_id_however_it_is_written(value: int) -> None:
    spellings = [value, float(value), str(value), f"{value}.0", f" {value}\n"]
    assert {id_key(spelling) for spelling in spellings} == {str(value)}


@given(st.one_of(st.none(), st.booleans(), st.text(), st.floats(), st.lists(st.integers())))
def test_an_id_of_an_id_is_the_same(value: Any) -> None:
    assert (key := id_key(value)) is None or id_key(key) == key


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *[(12, 12.0), (1.5, 1.5), ("12", 12.0), (" 12\n", 12.0), ("1.28e2", 128.0), (".2", 0.2)],
        *[("１２", 12.0), ("-５．５", -5.5), ("1E-3", 0.001), ("+4", 4.0), (10**30, 1e30)],
    ],
)
def test_number(value: Any, expected: float) -> None:
    assert number(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        *[None, True, False, "", "twelve", "1,5", "1_000", "nan", "inf", math.nan, -math.inf],
        *[10**400, [1], {}, b"1", "1 2", "0x10"],
    ],
)
def test_what_is_no_number(value: Any) -> None:
    assert math.isnan(number(value))


def test_numbers_are_as_many_as_asked_for() -> None:
    assert numbers(["1", 2, 3.5, "4e0"], 4) == [1.0, 2.0, 3.5, 4.0]
    for value in ([1, 2, 3], [1, 2, 3, 4, 5], "1234", None, 7, {1: 2}):
        assert all(map(math.isnan, numbers(value, 4)))


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0), (-5, 5), (None, 5), ("x", 5)])
def test_a_size_that_states_nothing(width: Any, height: Any) -> None:
    assert size_of(width, height) is None
    assert size_of("640", 480.0) == (640.0, 480.0)


def test_one_id_stands_for_one_thing() -> None:
    rows = [{"id": 1, "name": "cat"}, {"id": "1", "name": "cat"}, {"name": "none"}, {"id": 2.0}]
    assert list(by_id(rows, "name", "x.json")) == ["1", "2"]
    with pytest.raises(ValueError, match=r"x.json, images: .* id 1 has a.jpg and b/a.jpg"):
        by_id(
            [{"id": 1, "file_name": "a.jpg"}, {"id": 1.0, "file_name": "b/a.jpg"}],
            "file_name",
            "x.json, images",
        )
