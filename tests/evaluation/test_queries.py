from __future__ import annotations

from dataclasses import replace

import pytest

from cloc_mllm.evaluation.queries import (
    Candidates,
    Coverage,
    Query,
    QuerySet,
    pair,
    queries_digest,
)
from tests.evaluation.helpers import LEFT, record


def make_set(*texts: str, **settings) -> QuerySet:
    queries = [Query(f"q{i}", f"p{i}", "rec", text) for i, text in enumerate(texts)]
    pairs = [pair(query, boxes=[LEFT]) for query in queries]
    records = [record(query.image_id) for query in queries]
    return QuerySet("rec", "box", "mllm", records, pairs, **settings)


def test_a_question_says_where_its_boxes_go() -> None:
    query = Query("q", "p", "pope", "What is this?", (LEFT,))
    with pytest.raises(ValueError, match="'q' has 0 <region> but 1 boxes; write one <region> per"):
        QuerySet("pope", "text", "mllm", [record("p")], [pair(query, labels=["yes"])])


def test_a_limit_is_counted_as_left_out() -> None:
    asked = make_set("a", "b", "c", coverage=Coverage("B", 5, {"missing_image": 2}))
    assert str(asked.coverage) == "3 of 5 questions (missing_image 2)"
    limited = asked.limited(2)
    assert str(limited.coverage) == "2 of 5 questions (missing_image 2, over_limit 1)"
    assert [query.text for query in limited.queries] == ["a", "b"]
    assert [found.id for found in limited.records] == ["p0", "p1"]
    assert [row.id for row in limited.references] == ["q0", "q1"]
    assert asked.limited(0) is asked and asked.limited(3) is asked
    assert make_set("a", "b").limited(1).queries == make_set("a", "b").queries  # no benchmark


def test_a_part_of_a_benchmark_is_refused_unless_allowed() -> None:
    part = make_set("a", coverage=Coverage("B", 2, {"missing_image": 1}, unit="expressions"))
    with pytest.raises(ValueError, match=r"B: expected all 2 expressions, found 1 of 2 .*--allow"):
        part.check_coverage(allow_partial=False)
    part.check_coverage(allow_partial=True)
    nothing = make_set(coverage=Coverage("B", 2, {"missing_image": 2}))
    with pytest.raises(ValueError, match=r"B: nothing to ask, 0 of 2 .*check that --images"):
        nothing.check_coverage(allow_partial=True)
    make_set("a").check_coverage(allow_partial=False)


@pytest.mark.parametrize(
    "other",
    [
        make_set("the crab", "a boat"),
        make_set("a boat", "a crab"),
        make_set("a crab"),
        replace(make_set("a crab", "a boat"), max_new_tokens=4),
        replace(make_set("a crab", "a boat"), answer="text"),
        replace(make_set("a crab", "a boat"), threshold=0.5),
        replace(make_set("a crab", "a boat"), candidates=Candidates("texts", ["x"])),
    ],
    ids=["text", "order", "fewer", "length", "answer", "threshold", "candidates"],
)
def test_other_questions_have_another_digest(other: QuerySet) -> None:
    asked = make_set("a crab", "a boat")
    assert queries_digest([asked]) == queries_digest([make_set("a crab", "a boat")])
    assert queries_digest([asked]) != queries_digest([other])
