"""Records that training could not use are found before it starts."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable

import pytest

from cloc_mllm.config import ConversationConfig, MllmConfig
from cloc_mllm.data.conversations import possible_questions
from cloc_mllm.data.parquet import load_records, write_records
from cloc_mllm.data.records import Record, Region
from cloc_mllm.mllm import ClocMllmProcessor, build_mllm
from cloc_mllm.mllm.collate import ConversationCollator
from cloc_mllm.train.data_order import SeededDataset
from cloc_mllm.train.preflight import _Check, check_records
from tests.tiny_mllm import cloc_dir, llm_dir, mllm_config

__all__ = ["cloc_dir", "llm_dir", "mllm_config"]

GROUND = ConversationConfig(questions_per_image=2, refer=0, caption=0)
BOX = (0.1, 0.1, 0.5, 0.5)


@pytest.fixture(params=[False, True], ids=["tokens", "head"])
def processor(mllm_config: MllmConfig, request) -> ClocMllmProcessor:
    return build_mllm(dataclasses.replace(mllm_config, box_head=request.param))[1]


def report(
    records: list[Record], processor: ClocMllmProcessor, config: ConversationConfig, **settings
) -> str:
    collator = ConversationCollator(processor, config, phrases=settings.pop("phrases", ()))
    settings = {"seed": 0, "num_epochs": itertools.repeat(3), **settings}
    return check_records(records, len(records), collator, **settings).report()


def with_texts(record: Record, *phrases: str) -> Record:
    boxes = [(x / 10, 0.1, x / 10 + 0.1, 0.5) for x in range(len(phrases))]
    regions = [Region(box, phrase) for box, phrase in zip(boxes, phrases, strict=True)]
    return dataclasses.replace(record, id="odd", regions=regions, image=b"")


def test_good_records_are_counted_and_no_image_is_read(processor, tiny_scenes, tmp_path) -> None:
    write_records(tiny_scenes, tmp_path / "records")
    records = load_records(tmp_path / "records")
    textual = list(records.without_images())
    assert [dataclasses.replace(r, image=b"") for r in records] == textual
    config = ConversationConfig(locate=1, absent=1)
    line = report(textual, processor, config, phrases=["a zebra", "the crab"])
    assert line == "preflight: 16 of 16 records checked, all can be trained on"


def test_of_many_records_the_first_are_checked(processor, tiny_scenes, monkeypatch) -> None:
    monkeypatch.setattr("cloc_mllm.train.preflight.MAX_RECORDS", 3)
    line = report(tiny_scenes, processor, GROUND)
    assert line == "preflight: 3 of 16 records checked, all can be trained on"


@pytest.mark.parametrize(
    ("change", "config", "reason"),
    [
        (lambda r: with_texts(r), GROUND, "no_question"),
        (lambda r: with_texts(r, "two", "two"), GROUND, "no_question"),
        (lambda r: with_texts(r, "the crab <image>"), GROUND, "image_tokens"),
        (lambda r: with_texts(r, "the <region>"), GROUND, "region_tokens"),
        (lambda r: with_texts(r, " "), ConversationConfig(ground=0, caption=0), "nothing_learnt"),
        (
            lambda r: with_texts(r, "</s>"),
            ConversationConfig(ground=0, caption=0),
            "nothing_learnt",
        ),
        (lambda r: with_texts(r, "xyz " * 200), GROUND, "too_long"),
        (lambda r: with_texts(r, "xyz " * 200, "qrs " * 200), GROUND, "too_long"),
    ],
    ids=["empty", "ambiguous", "image", "region", "blank", "end", "long", "both long"],
)
def test_what_cannot_be_trained_on_is_named(
    processor, tiny_scenes, change: Callable, config: ConversationConfig, reason: str
) -> None:
    odd = change(tiny_scenes[0])
    with pytest.raises(ValueError, match=f"1 x {reason}: each ") as refused:
        report([*tiny_scenes[1:4], odd], processor, config)
    assert re.search(
        r"1 records cannot be trained on \(4 of 4 records checked\)", str(refused.value)
    )
    assert "(odd" in str(refused.value)


def test_a_box_token_in_a_text_is_refused_where_it_means_a_box(processor, tiny_scenes) -> None:
    odd = with_texts(tiny_scenes[0], "the <box>")
    config = ConversationConfig(ground=0, caption=0)
    if not processor.box_head:
        assert report([odd], processor, config).endswith("all can be trained on")
        return
    with pytest.raises(ValueError, match="1 x box_tokens"):
        report([odd], processor, config)


def test_reasons_are_counted_and_few_ids_shown(processor, tiny_scenes) -> None:
    odd = [dataclasses.replace(with_texts(tiny_scenes[0]), id=f"odd{n}") for n in range(5)]
    with pytest.raises(ValueError, match=r"5 x no_question: .*\(odd0; odd1; odd2; and 2 more\)"):
        report(odd, processor, GROUND)


def test_it_says_what_the_collator_would_meet_in_this_run(processor, tiny_scenes) -> None:
    """Of a short and a long question: refused exactly if an epoch draws the long one alone."""
    record = dataclasses.replace(
        with_texts(tiny_scenes[0], "crab", "xyz " * 200), image=tiny_scenes[0].image
    )
    collator = ConversationCollator(processor, GROUND)
    # regions come in turn: with two questions both are asked, with one only one of them
    collator.config = dataclasses.replace(GROUND, questions_per_image=1)
    outcomes = set()
    for seed in range(8):
        items = [SeededDataset([record], seed)[epoch, 0] for epoch in range(2)]
        expected = True
        try:
            for item in items:
                collator([item])
        except ValueError as error:
            assert str(error).startswith("record odd: max_length 512 holds no question")
            expected = False
        result = check_records([record], 1, collator, seed=seed, num_epochs=[2])
        assert (not result.ids) == expected
        outcomes.add(expected)
    assert outcomes == {True, False}
    assert report([record], processor, GROUND).endswith("all can be trained on")


def test_a_question_that_is_not_rendered_has_no_fault(processor, tiny_scenes) -> None:
    texts = ["ﷺ ﷺ", "é🦀\u0300", "\t\n  a", "ﬃ" * 9, "crab " * 20, "the <image>", "</s>", " "]
    records = [*tiny_scenes[:4], *(with_texts(tiny_scenes[0], text) for text in texts)]
    for max_length in (10, 40, 60, 70, 80, 90, 120, 512):
        config = ConversationConfig(locate=1, absent=1, max_length=max_length)
        check = _Check(ConversationCollator(processor, config, phrases=["a zebra", "xyz " * 50]))
        for record in records:
            rendered = list(check.odd_questions(record))
            for pair in possible_questions(record, config, check.coordinates, check.phrases):
                if pair not in rendered:
                    assert check.question_fault(pair, record)[0] == "", pair


def test_a_long_phrase_of_what_is_absent_counts(processor, tiny_scenes) -> None:
    config = ConversationConfig(questions_per_image=1, ground=0, refer=0, caption=0, absent=1)
    phrases = ["zebra " * 200]
    assert report(tiny_scenes, processor, config, phrases=["zebra"]).endswith("trained on")
    with pytest.raises(ValueError, match="16 x too_long"):
        report(tiny_scenes, processor, config, phrases=phrases)
    with pytest.raises(ValueError, match="16 x no_question"):
        report(tiny_scenes, processor, config, phrases=[])
