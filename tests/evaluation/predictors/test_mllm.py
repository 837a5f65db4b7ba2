"""Answering with a tiny random model: what is asked, in which words, and what a row says of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.data.wordings import load_wordings
from cloc_mllm.evaluation.predictors.mllm import MllmRows, predict_mllm
from cloc_mllm.evaluation.queries import Answer, Query, QuerySet, pair
from cloc_mllm.inference.grounding_predictor import GroundingPredictor

BOX = (0.0, 0.0, 0.5, 1.0)
RECORDS = list(generate_scenes(2, split="test", long_side=64))


@pytest.fixture(scope="module")
def predictor(mllm_dir: Path) -> GroundingPredictor:
    return GroundingPredictor.from_pretrained(mllm_dir, device="cpu")


def make_set(answer: Answer, **query: Any) -> QuerySet:
    """The same question about both images."""
    pairs = [pair(Query(f"{r.id}/0", r.id, answer, **query), labels=["yes"]) for r in RECORDS]
    return QuerySet(answer, answer, "mllm", RECORDS, pairs, max_new_tokens=3)


def first_row(predictor: GroundingPredictor, asked: QuerySet) -> Any:
    rows = list(predict_mllm(predictor, asked, "tiny"))
    assert [row.id for row in rows] == [query.id for query in asked.queries]
    assert {row.model for row in rows} == {"tiny"}
    return rows[0]


def test_where_a_thing_is_is_answered_with_a_box(predictor) -> None:
    row = first_row(predictor, make_set("box", text="a crab"))
    assert row.prompt == "Where is a crab?"
    assert len(row.boxes) == 1 and row.failure is None
    assert row.settings == {
        "box_format": "location_tokens",
        "num_bins": 20,
        "decoding": "greedy",
        "precision": "fp32",
        "max_new_tokens": 5,  # a box and one more
    }


def test_a_model_is_asked_in_its_own_words_or_in_those_that_no_training_uses(predictor) -> None:
    pools = load_wordings("pools")
    asked = make_set("boxes", text="a crab")
    first, trained, held_out = (
        {row.prompt for row in predict_mllm(predictor, replace(asked, asked_in=words), "tiny")}
        for words in ("first", "trained", "held_out")
    )
    assert first == trained == {"Where is a crab?"}  # the only wording of this model
    assert held_out <= {wording.format(phrase="a crab") for wording in pools.held_out["ground"]}
    row = first_row(predictor, replace(asked, asked_in="held_out"))
    assert len(row.boxes) == len(row.box_scores) == 1  # it was taught one box
    again = first_row(predictor, replace(asked, asked_in="held_out"))
    assert row == again  # by the query's id
    regions = replace(make_set("text", boxes=(BOX,)), asked_in="held_out")
    box = "<loc_0><loc_0><loc_10><loc_19>"
    expected = {wording.format(box=box) for wording in pools.held_out["refer"]}
    assert first_row(predictor, regions).prompt in expected
    assert MllmRows("", torch.device("cpu")).identity().keys() == {"mllm"}
    other = MllmRows("", torch.device("cpu"), wordings="held_out").identity()
    assert other["wordings"] == "held_out"


def test_what_may_be_absent_is_answered_in_any_words(predictor) -> None:
    row = first_row(predictor, make_set("box_or_refusal", text="a crab"))
    assert row.prompt == "Where is a crab?"
    assert (row.failure is None) == bool(row.boxes)
    assert row.settings["max_new_tokens"] == 5


def test_words_are_no_failure_for_not_being_a_box(predictor) -> None:
    row = first_row(predictor, make_set("text", text="Is <region> a crab?", boxes=(BOX,)))
    assert row.prompt == "Is <loc_0><loc_0><loc_10><loc_19> <region> a crab?"
    assert row.failure is None and row.boxes == []
    assert row.settings["max_new_tokens"] == 3 and "region_prompt" not in row.settings
    drawn = make_set("text", text="A crab?", region_prompt="point")
    assert first_row(predictor, drawn).settings["region_prompt"] == "point"


def test_a_region_alone_is_asked_about_as_in_training(predictor) -> None:
    row = first_row(predictor, make_set("text", boxes=(BOX,)))
    assert row.prompt == "What is in <loc_0><loc_0><loc_10><loc_19> <region>?"


def test_batches_give_the_same_words(predictor) -> None:
    asked = make_set("box", text="a crab")
    together = list(predict_mllm(predictor, asked, "tiny", 4))
    alone = list(predict_mllm(predictor, asked, "tiny", 1))
    assert [row.raw_text for row in alone] == [row.raw_text for row in together]


def test_finished_queries_are_not_asked_again(mllm_dir) -> None:
    asked = make_set("box", text="a crab")
    first, second = (query.id for query in asked.queries)
    rows = MllmRows(str(mllm_dir), torch.device("cpu")).rows([asked], {first})
    assert [(row.id, row.model) for row in rows] == [(second, str(mllm_dir))]


def test_batches_may_be_larger_than_64(predictor, monkeypatch) -> None:
    """They were cut at the predictor's own default."""
    record = RECORDS[0]
    pairs = [pair(Query(f"q{i}", record.id, "rec", "a crab"), boxes=[BOX]) for i in range(70)]
    asked = QuerySet("rec", "box", "mllm", [record], pairs)
    sizes: list[int] = []
    read = GroundingPredictor.read

    def counting(self: GroundingPredictor, requests: Any) -> Any:
        sizes.append(len(requests))
        return read(self, requests)

    monkeypatch.setattr(GroundingPredictor, "read", counting)
    assert len(list(predict_mllm(predictor, asked, "tiny", batch_size=70))) == 70
    assert sizes == [70]
