"""Wordings: the package's pools, a file of one's own, and what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cloc_mllm.data.wordings import (
    FIRST_WORDINGS,
    SINGLE,
    TASKS,
    Wordings,
    asked,
    load_wordings,
)

POOLS = load_wordings("pools")
GOOD = "ground:\n  trained: ['Find {phrase}.']\n"


def test_every_pool_has_twenty_trained_wordings_and_ten_held_out_ones() -> None:
    for task in TASKS:
        if task == "locate":  # a step of teaching that nobody asks
            continue
        trained, held_out = POOLS.of(task), POOLS.held_out_of(task)
        assert len(trained) >= 20 and len(held_out) >= 10, task
        assert not set(trained) & set(held_out)
        assert len({wording.casefold() for wording in trained}) == len(trained)


def test_no_held_out_wording_of_a_task_is_a_trained_one_of_another() -> None:
    trained = {wording for pool in POOLS.trained.values() for wording in pool}
    assert not trained & {wording for pool in POOLS.held_out.values() for wording in pool}


def test_a_phrase_is_asked_for_in_the_same_words_whether_it_is_one_or_several() -> None:
    assert POOLS.first("ground") == POOLS.first("several")
    assert SINGLE.first("ground") == SINGLE.first("several")


def test_the_single_wordings_are_those_that_old_models_were_taught() -> None:
    assert load_wordings("single") is SINGLE
    assert SINGLE.digest() == FIRST_WORDINGS
    assert len({POOLS.digest(), FIRST_WORDINGS, Wordings(POOLS.trained).digest()}) == 3
    assert SINGLE.first("absent") == SINGLE.first("ground") == "Where is {phrase}?"


def test_drawing_is_decided_by_the_seed_and_a_single_wording_draws_nothing() -> None:
    draws = [
        [POOLS.draw("ground", rng) for _ in range(1000)]
        for rng in (np.random.default_rng(seed) for seed in (3, 3, 4))
    ]
    assert draws[0] == draws[1] != draws[2]
    assert set(draws[0]) == set(POOLS.of("ground"))
    rng, untouched = np.random.default_rng(0), np.random.default_rng(0)
    assert SINGLE.draw("ground", rng, 0.5) == "Where is {phrase}?"
    assert rng.integers(1 << 40) == untouched.integers(1 << 40)


def test_a_share_is_asked_in_the_first_wording() -> None:
    rng = np.random.default_rng(0)
    draws = [POOLS.draw("ground", rng, 0.5) for _ in range(2000)]
    share = draws.count(POOLS.first("ground")) / len(draws)
    expected = 0.5 + 0.5 / len(POOLS.of("ground"))
    assert share == pytest.approx(expected, abs=0.04) and set(draws) == set(POOLS.of("ground"))
    plain, same = np.random.default_rng(0), np.random.default_rng(0)
    assert POOLS.draw("ground", plain, 0.0) == POOLS.draw("ground", same)


def test_json_gives_the_same_wordings_back() -> None:
    for wordings in (SINGLE, POOLS):
        assert Wordings.from_dict(json.loads(json.dumps(wordings.to_dict()))) == wordings


@pytest.mark.parametrize(
    ("wording", "values", "expected"),
    [
        ("Find {phrase}.", {"phrase": "a {sign} 100%"}, "Find a {sign} 100%."),
        ("All {plural}!", {"phrase": "wine glass"}, "All wine glasses!"),
        ("What is in {box} <region>?", {"box": "[1, 2]"}, "What is in [1, 2] <region>?"),
        ("Caption {{it}}.", {}, "Caption {it}."),
    ],
)
def test_placeholders_are_filled_in(wording: str, values: dict[str, str], expected: str) -> None:
    assert asked(wording, **values) == expected


def test_a_file_of_ones_own_replaces_the_tasks_it_names(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        'ground:\n  trained: ["Wo ist {phrase}?", "Zeig {phrase}."]\n', encoding="utf-8"
    )
    own = load_wordings(str(path))
    assert own.of("ground") == ("Wo ist {phrase}?", "Zeig {phrase}.")
    assert own.of("refer") == SINGLE.of("refer")
    assert own.held_out_of("ground") == POOLS.held_out_of("ground")  # it has none of its own
    assert own.digest() not in (FIRST_WORDINGS, POOLS.digest())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "line 1: expected a mapping with tasks"),
        ("- Find", "line 1: expected a mapping with tasks"),
        (GOOD + "grond: {trained: [x]}", "line 3, task grond: there is no such task"),
        (GOOD + GOOD, "line 3, task ground: the task is there twice"),
        ("ground: [Find]", "line 1: expected a mapping with `trained` and `held_out`"),
        ("ground:\n  train: [Find]", "line 2, task ground: expected `trained` or `held_out`"),
        ("ground:\n  held_out: ['{phrase}']", "line 1, task ground: expected at least one"),
        ("ground: {trained: []}", "task ground: expected at least one wording"),
        (GOOD + "  held_out:\n  - {a: 1}", "line 4, task ground: expected a wording"),
        (GOOD + "  held_out: ['Find {phrase}.']", "line 3, .*stands in line 2, too"),
        ("ground: {trained: [Find it.]}", r"expected \{phrase\}, each once, .* no placeholder"),
        ("ground: {trained: ['{phrase} {phrase}']}", r"found \{phrase\}, \{phrase\}"),
        ("all: {trained: ['{phrases}']}", r"expected \{phrase\} or \{plural\}.*found \{phrases\}"),
        ("refer: {trained: ['What is {box}?']}", r"expected <region> and \{box\}"),
        ("caption: {trained: ['Say {phrase}']}", "expected no placeholder"),
        ("caption: {trained: ['Say }']}", "has a lone brace"),
        ("caption: [", "expected YAML in UTF-8"),
    ],
)
def test_what_is_wrong_is_named_with_file_task_and_line(
    tmp_path: Path, text: str, expected: str
) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=expected) as error:
        load_wordings(str(path))
    assert str(error.value).startswith(str(path))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected `single`, `pools` or the path"):
        load_wordings(str(tmp_path / "own.yaml"))
