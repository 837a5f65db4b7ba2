"""Questions from records: what is asked, what is not, and that a seed decides all of it."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest

from cloc_mllm.config import ConversationConfig
from cloc_mllm.data.conversations import (
    Negative,
    build_questions,
    negatives_of,
    possible_questions,
    unambiguous_texts,
)
from cloc_mllm.data.records import Record, Region
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.data.wordings import TASKS, load_wordings
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
A_BOAT = Negative(frozenset(["boat"]), ("a boat",))


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
    config = ConversationConfig(questions_per_image=1, ground=0, caption=0)
    assert build_questions(record(region), config, BOX_FORMAT, rng())[0].answer == "a {sign} 100%"


def test_what_an_image_does_not_show_is_asked_for_by_phrases_that_share_no_word() -> None:
    config = ConversationConfig(questions_per_image=20, ground=0, refer=0, caption=0, absent=1)
    things = ["a crab", "the clocks", "a boat", "two crabs in a boat"]
    negatives = negatives_of([record(*(Region(LEFT, thing) for thing in things))])

    questions = build_questions(TWO_CRABS, config, BOX_FORMAT, rng(), negatives)

    assert {pair.question for pair in questions} == {"Where is a boat?"}
    assert {pair.answer for pair in questions} == {"not in the image"}
    assert build_questions(TWO_CRABS, config, BOX_FORMAT, rng()) == []


def test_questions_without_absent_ones_are_as_before_whatever_phrases_there_are() -> None:
    config = ConversationConfig(questions_per_image=20)
    expected = build_questions(TWO_CRABS, config, BOX_FORMAT, rng())
    assert build_questions(TWO_CRABS, config, BOX_FORMAT, rng(), [A_BOAT]) == expected


MEN = record(
    Region(LEFT, "Two men", group="1"),
    Region(RIGHT, "two men", group="1"),
    Region(TOP, "a wine glass", category="wine glass"),
    captions=["Two men look at a wine glass.", "nobody is named", "a man"],
)
CRABS = record(
    Region(RIGHT, "crab", category="crab", expressions=["the rightmost crab"]),
    Region(LEFT, "crab", category="crab"),
    Region(TOP, "clock", category="clock", expressions=["the clock"]),
    captions=["two crabs and a clock", "a clock above the two crabs", "a crab"],
)
L, R, T = (BOX_FORMAT.encode(box) for box in (LEFT, RIGHT, TOP))
ZEBRA = Negative(frozenset(["zebra"]), ("zebra", "the smaller zebra"))


def asked_and_answered(given: Record, task: str, *also: str) -> set[tuple[str, str]]:
    config = only(task, *also)
    questions = build_questions(given, config, BOX_FORMAT, rng(), [ZEBRA])
    possible = list(possible_questions(given, config, BOX_FORMAT, [ZEBRA]))
    assert all(pair in possible for pair in questions)
    return {(pair.question, pair.answer) for pair in questions if pair.task == task}


def only(*tasks: str, **settings: Any) -> ConversationConfig:
    weights = dict.fromkeys(TASKS, 0.0) | dict.fromkeys(tasks, 1.0)
    return ConversationConfig(questions_per_image=60, **weights, **settings)


@pytest.mark.parametrize(
    ("task", "given", "expected"),
    [
        ("several", MEN, {("Where is Two men?", L + R)}),
        ("several", CRABS, {("Where is crab?", L + R), ("Where is the two crabs?", L + R)}),
        ("all", CRABS, {("Where are all crabs?", L + R), ("Where are all clocks?", T)}),
        ("all", MEN, {("Where are all wine glasses?", T)}),
        (
            "count",
            CRABS,
            {
                ("How many crabs are there?", L + R + ": 2"),
                ("How many clocks are there?", T + ": 1"),
            },
        ),
        (
            "exists",
            CRABS,
            {
                ("Is there a crab?", "yes"),
                ("Is there a clock?", "yes"),
                ("Is there a zebra?", "no"),
            },
        ),
        (
            "grounded_caption",
            CRABS,
            {
                ("Describe the image with boxes.", f"<p>two crabs</p>{L}{R} and <p>a clock</p>{T}"),
                (
                    "Describe the image with boxes.",
                    f"<p>a clock</p>{T} above <p>the two crabs</p>{L}{R}",
                ),
            },
        ),
        (
            "grounded_caption",
            MEN,
            {
                (
                    "Describe the image with boxes.",
                    f"<p>Two men</p>{L}{R} look at <p>a wine glass</p>{T}.",
                )
            },
        ),
        (
            "region_caption",
            CRABS,
            {
                (f"Describe {R} <region>.", "the rightmost crab"),
                (f"Describe {T} <region>.", "clock"),
                (f"Describe {T} <region>.", "the clock"),
            },
        ),
        ("point", MEN, {("Point to a wine glass.", "<loc_50><loc_12>")}),
        (
            "absent",
            CRABS,
            {
                ("Where is zebra?", "not in the image"),
                ("Where is the smaller zebra?", "not in the image"),
            },
        ),
    ],
)
def test_every_task_asks_and_answers(task: str, given: Record, expected: set[Any]) -> None:
    assert asked_and_answered(given, task) == expected


def test_what_is_absent_is_asked_for_in_all_ways_that_are_taught() -> None:
    asked = asked_and_answered(CRABS, "absent", "all", "count")
    assert {question for question, _ in asked} == {
        "Where is zebra?",
        "Where is the smaller zebra?",
        "Where are all zebras?",
        "How many zebras are there?",
    }
    assert {answer for _, answer in asked} == {"not in the image"}


def test_yes_and_no_come_equally_often_where_much_is_absent() -> None:
    things = [Negative(frozenset([f"thing{n}"]), (f"thing{n}",)) for n in range(50)]
    questions = build_questions(CRABS, only("exists"), BOX_FORMAT, rng(), things)
    assert Counter(pair.answer for pair in questions) == {"yes": 30, "no": 30}


@pytest.mark.parametrize("task", TASKS)
def test_answer_boxes_are_those_of_the_answer_in_its_order(task: str) -> None:
    for pair in build_questions(CRABS, only(task), BOX_FORMAT, rng(), [ZEBRA]):
        written = "".join(map(BOX_FORMAT.encode, pair.answer_boxes))
        assert "".join(re.findall(r"(?:<loc_\d+>){4}", pair.answer)) == written
    head = BoxFormat("location_tokens", 101, head=True)
    for pair in build_questions(CRABS, only(task), head, rng(), [ZEBRA]):
        assert pair.answer.count("<box>") == len(pair.answer_boxes)


def test_more_boxes_than_an_answer_may_have_are_not_asked_for() -> None:
    boxes = [(x / 50, 0.1, (x + 1) / 50, 0.2) for x in range(40)]
    crowd = record(*(Region(box, "ant", category="ant") for box in boxes), captions=["40 ants"])
    for task in ("several", "all", "count", "grounded_caption"):
        assert build_questions(crowd, only(task), BOX_FORMAT, rng()) == []


def test_one_group_is_linked_in_a_caption_but_not_a_word_that_two_things_share() -> None:
    assert not any(
        "crab</p>" in answer for _, answer in asked_and_answered(CRABS, "grounded_caption")
    )


def test_negatives_have_a_name_and_expressions_of_their_category() -> None:
    scenes = [CRABS, record(Region(LEFT, "a boat", expressions=["my boat"])), record()]
    assert negatives_of(scenes) == [
        Negative(frozenset(["boat"]), ("a boat",)),  # no category: "my boat" may be anything
        Negative(frozenset(["clock"]), ("clock", "the clock")),
        Negative(frozenset(["crab"]), ("crab", "the rightmost crab")),
    ]


def test_wordings_are_drawn_from_the_trained_pool_alone() -> None:
    pools = load_wordings("pools")
    config = dataclasses.replace(only(*TASKS), questions_per_image=2_000)
    draws = [
        build_questions(CRABS, config, BOX_FORMAT, rng(seed), [ZEBRA], pools) for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert len({pair.question for pair in draws[0]}) > 200
    held_out = {
        wording.replace("{box}", box).replace("{phrase}", "clock").replace("{plural}", "clocks")
        for pool in pools.held_out.values()
        for wording in pool
        for box in (L, R, T)
    }
    assert not held_out & {pair.question for pair in draws[0]}


def test_single_wordings_give_the_data_that_shipped_configs_have_always_had() -> None:
    """A hash of questions and answers as they were before there were pools."""
    digest = hashlib.sha256()
    for config in (
        ConversationConfig(),
        ConversationConfig(questions_per_image=8, ground=1, refer=0.6, caption=0.1),
        ConversationConfig(questions_per_image=6, ground=1, refer=0.6, caption=0.05, locate=0.6),
    ):
        for seed, scene in enumerate(generate_scenes(10, split="train")):
            for pair in build_questions(
                scene, config, BoxFormat("location_tokens", 100), rng(seed)
            ):
                digest.update(repr((pair.question, pair.answer, pair.task)).encode())
    assert digest.hexdigest()[:16] == "76b3a8f215a86813"
