"""Questions from records: what is asked, what is not, and that a seed decides all of it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from cloc_mllm.config import ConversationConfig
from cloc_mllm.data.conversations import TASKS, build_questions, refer_question, unambiguous_texts
from cloc_mllm.data.records import Record, Region
from cloc_mllm.mllm.coordinates import BoxFormat

LEFT, RIGHT, TOP = (0.0, 0.5, 0.25, 1.0), (0.75, 0.5, 1.0, 1.0), (0.25, 0.0, 0.75, 0.25)
BOX_FORMAT = BoxFormat("location_tokens", 101)


def record(*regions: Region, captions: list[str] | None = None) -> Record:
    return Record("r1", b"", 100, 100, captions or [], list(regions), "test")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


TWO_CRABS = record(
    Region(LEFT, "crab", expressions=["the smaller crab"]),
    Region(RIGHT, "Crab", expressions=["the larger crab"]),
    Region(TOP, "clock"),
    captions=["two crabs and a clock"],
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param(
            TWO_CRABS, [["the smaller crab"], ["the larger crab"], ["clock"]], id="shared phrase"
        ),
        pytest.param(
            record(Region(LEFT, "two men", group="1"), Region(RIGHT, "two men", group="1")),
            [[], []],
            id="group of several boxes",
        ),
        pytest.param(
            record(Region(LEFT, "a man"), Region(LEFT, "a runner")),
            [["a man"], ["a runner"]],
            id="one box, two phrases",
        ),
        pytest.param(
            record(Region(LEFT, "a", expressions=["it"]), Region(RIGHT, "b", expressions=["it"])),
            [["a"], ["b"]],
            id="expression of two boxes",
        ),
    ],
)
def test_only_texts_with_one_answer_are_grounded(given: Record, expected: list[list[str]]) -> None:
    assert unambiguous_texts(given) == expected


def test_questions_by_task() -> None:
    config = ConversationConfig(questions_per_image=200)
    questions = build_questions(TWO_CRABS, config, BOX_FORMAT, rng())
    by_task = {
        task: {(t.question, t.answer) for t in questions if t.task == task} for task in TASKS
    }
    assert by_task["ground"] == {
        ("Where is the smaller crab?", "<loc_0><loc_50><loc_25><loc_100>"),
        ("Where is the larger crab?", "<loc_75><loc_50><loc_100><loc_100>"),
        ("Where is clock?", "<loc_25><loc_0><loc_75><loc_25>"),
    }
    assert by_task["refer"] == {
        ("What is in <loc_0><loc_50><loc_25><loc_100> <region>?", "crab"),
        ("What is in <loc_75><loc_50><loc_100><loc_100> <region>?", "Crab"),
        ("What is in <loc_25><loc_0><loc_75><loc_25> <region>?", "clock"),
    }
    assert by_task["caption"] == {("Describe the image.", "two crabs and a clock")}
    assert all((pair.region is not None) == (pair.task == "refer") for pair in questions)
    counts = Counter(pair.task for pair in questions)
    assert min(counts["ground"], counts["refer"]) > 2 * counts["caption"] > 0


def test_every_region_is_asked_about_before_one_comes_again() -> None:
    config = ConversationConfig(questions_per_image=3, ground=0, caption=0)
    answers = [pair.answer for pair in build_questions(TWO_CRABS, config, BOX_FORMAT, rng())]
    assert sorted(answers) == ["Crab", "clock", "crab"]


def test_the_seed_decides() -> None:
    config = ConversationConfig(questions_per_image=8)
    draws = [build_questions(TWO_CRABS, config, BOX_FORMAT, rng(seed)) for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("given", "tasks"),
    [
        pytest.param(record(captions=["a clock"]), {"caption"}, id="caption only"),
        pytest.param(record(Region(LEFT, "x"), Region(RIGHT, "x")), {"refer"}, id="ambiguous"),
        pytest.param(record(), set(), id="nothing"),
    ],
)
def test_tasks_without_material_are_left_out(given: Record, tasks: set[str]) -> None:
    questions = build_questions(given, ConversationConfig(), BOX_FORMAT, rng())
    assert {pair.task for pair in questions} == tasks


def test_braces_in_a_phrase_are_text() -> None:
    region = Region(LEFT, "a {sign} 100%")
    config = ConversationConfig(questions_per_image=1, refer=0, caption=0)
    assert build_questions(record(region), config, BOX_FORMAT, rng())[0].question == (
        "Where is a {sign} 100%?"
    )
    assert refer_question(region, BOX_FORMAT).answer == "a {sign} 100%"


def test_what_an_image_does_not_show_is_asked_for_by_phrases_that_share_no_word() -> None:
    config = ConversationConfig(questions_per_image=20, ground=0, refer=0, caption=0, absent=1)
    phrases = ["a crab", "the clocks", "a boat", "two crabs in a boat"]

    questions = build_questions(TWO_CRABS, config, BOX_FORMAT, rng(), phrases)

    assert {pair.question for pair in questions} == {"Where is a boat?"}
    assert {pair.answer for pair in questions} == {"not in the image"}
    assert build_questions(TWO_CRABS, config, BOX_FORMAT, rng()) == []


def test_questions_without_absent_ones_are_as_before_whatever_phrases_there_are() -> None:
    config = ConversationConfig(questions_per_image=20)
    expected = build_questions(TWO_CRABS, config, BOX_FORMAT, rng())
    assert build_questions(TWO_CRABS, config, BOX_FORMAT, rng(), ["a boat"]) == expected
