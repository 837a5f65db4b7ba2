from cloc_mllm.data.records import Region
from cloc_mllm.evaluation.tasks.region_text_retrieval import RegionTextRetrieval
from tests.evaluation.helpers import LEFT, RIGHT, by_prompt, query_sets, record

PHOTOS = [
    record("p1", [Region(LEFT, "A man"), Region(LEFT, "the  runner"), Region(RIGHT, "a man")]),
    record("p2", [Region(LEFT, "a man")]),
    record("p3"),
]


def test_whatever_carries_a_text_is_right():
    to_text, to_region = query_sets(RegionTextRetrieval(), PHOTOS)
    assert to_text.candidates.names == ["a man", "the runner"]
    assert to_region.candidates.names == ["p1#0", "p1#1", "p2#0"]
    assert [(r.image_id, r.box) for r in to_region.candidates.regions] == [
        ("p1", LEFT),
        ("p1", RIGHT),
        ("p2", LEFT),
    ]
    right = by_prompt(to_text)
    assert right["p1", LEFT].labels == ["a man", "the runner"]
    assert right["p2", LEFT].labels == ["a man"]
    assert right["p2", LEFT].num_candidates == 2
    right = by_prompt(to_region)
    assert right["p2", "a man"].labels == ["p1#0", "p1#1", "p2#0"]
    assert right["p1", "the runner"].labels == ["p1#0"]
    assert right["p1", "the runner"].num_candidates == 3
    assert len(right) == 3
