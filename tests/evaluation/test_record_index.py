import pytest

from cloc_mllm.data.compositional import compositional_kind, generate_compositional
from cloc_mllm.data.records import Region
from cloc_mllm.data.scenes import CONCEPTS, ZERO_SHOT_CONCEPTS, generate_scenes
from cloc_mllm.evaluation.config import EvalConfig
from cloc_mllm.evaluation.record_index import RecordIndex
from cloc_mllm.evaluation.tasks import task_class
from cloc_mllm.evaluation.tasks.rec import Rec
from cloc_mllm.evaluation.tasks.region_classification import RegionClassification
from cloc_mllm.evaluation.tasks.text_to_box import TextToBox
from tests.evaluation.helpers import LEFT, RIGHT, query_sets, record

PHOTOS = [
    record("p1", [Region(LEFT, "A man"), Region(LEFT, "the  runner"), Region(RIGHT, "a man")]),
    record("p2", [Region(LEFT, "a man")], ["Someone runs .", "a man"]),
    record("p3", [], ["someone runs ."]),
]


def test_equal_boxes_are_one_region_and_equal_texts_one_text():
    index = RecordIndex(PHOTOS)
    assert index.phrases == ["a man", "the runner"]
    assert [region.id for region in index.regions] == ["p1#0", "p1#1", "p2#0"]
    assert index.regions[0].phrases == ("a man", "the runner")
    assert index.captions == {
        "p1": [],
        "p2": ["someone runs .", "a man"],
        "p3": ["someone runs ."],
    }
    assert index.distinct_captions == ["a man", "someone runs ."]


def test_other_names_of_a_photo_region_count_as_its_texts():
    regions = [Region(LEFT, "A man", expressions=["the runner"])]
    photo = RecordIndex([record("p", regions)])
    assert photo.phrases == ["a man", "the runner"]
    assert len(photo.regions_by_phrase) == 2
    scene = RecordIndex([record("s", regions, source="openmoji-scenes")])
    assert scene.phrases == ["a man"]


def test_classes_are_all_categories_and_all_concepts_of_built_in_scenes():
    photos = [record("p", [Region(LEFT, "a man", category="people"), Region(RIGHT, "it")])]
    assert RecordIndex(photos).class_names == ["people"]
    for split, concepts in (("test", CONCEPTS), ("zero_shot", ZERO_SHOT_CONCEPTS)):
        scenes = list(generate_scenes(2, split=split))
        assert RecordIndex(scenes).class_names == sorted(concepts)


def test_every_expression_of_every_region_is_one():
    regions = [
        Region(LEFT, "bowl", expressions=["bowl", "white bowl", "bowl"]),
        Region(RIGHT, "bowl", expressions=["bowl"]),
    ]
    index = RecordIndex([record("p0", regions, source="refcoco")])
    assert [(found.text, found.boxes, found.kind) for found in index.expressions] == [
        ("bowl", [LEFT], "refcoco"),
        ("white bowl", [LEFT], "refcoco"),
        ("bowl", [LEFT], "refcoco"),
        ("bowl", [RIGHT], "refcoco"),
    ]


@pytest.mark.parametrize("group", ["chain 7", ""], ids=["group", "bare phrases"])
def test_an_expression_has_every_box_of_what_a_phrase_names_together(group):
    names = ["men"] if group else []
    regions = [Region(box, "Two men", expressions=names, group=group) for box in (LEFT, RIGHT)]
    found = {item.text: item.boxes for item in RecordIndex([record("p0", regions)]).expressions}
    assert found == {text: [LEFT, RIGHT] for text in ["two men", *names]}


def test_built_in_expressions_know_their_kind():
    texts = ["the crab", "the smaller crab", "the leftmost crab", "the crab above the clock"]
    scene = record("s", [Region(LEFT, "crab", expressions=texts)], source="openmoji-scenes")
    kinds = [found.kind for found in RecordIndex([scene]).expressions]
    assert kinds == ["unique", "size", "ordinal", "relation"]


def test_a_reference_says_the_size_of_its_image_and_what_distracts():
    boxes = [(0.1 * i, 0.0, 0.1 * i + 0.1, 1.0) for i in range(4)]
    crabs = [Region(box, "a crab", category="Crab") for box in boxes[:3]]
    records = [record("p", [*crabs, Region(boxes[3], "it")])]
    references = [
        reference
        for task in (TextToBox(), RegionClassification())
        for asked in query_sets(task, records)
        for reference in asked.references
    ]
    assert {row.id: row.num_distractors for row in references} == {
        "text_to_box/p/0": 0,  # any of the three counts as right, so none distracts
        "text_to_box/p/1": None,  # of what kind "it" is, the record does not say
        **{f"region_classification/p#{index}": 2 for index in range(3)},
    }
    assert {(row.width, row.height) for row in references} == {(100, 100)}


def test_of_compositional_scenes_only_the_expressions_are_asked():
    scenes = list(generate_compositional(6))
    pairs = [
        pair
        for task in (TextToBox(), Rec())
        for asked in query_sets(task, scenes)
        for pair in zip(asked.queries, asked.references, strict=True)
    ]
    expected = {
        (task, scene.id, region.expressions[0], region.box)
        for scene in scenes
        for region in scene.regions
        if region.expressions
        for task in ("text_to_box", "rec")
    }
    assert {(q.task, q.image_id, q.text, ref.boxes[0]) for q, ref in pairs} == expected
    assert len(pairs) == len(expected)
    kind_of = {scene.id: compositional_kind(scene.source) for scene in scenes}
    for _, reference in pairs:
        kind = kind_of[reference.image_id]
        assert reference.kind == kind
        assert (reference.num_distractors == 0) == (kind == "unseen concept")


def test_query_ids_are_unique_over_all_tasks():
    scenes = list(generate_scenes(3, split="test"))
    asked = [s for name in EvalConfig().tasks for s in query_sets(task_class(name)(), scenes)]
    ids = [query.id for query_set in asked for query in query_set.queries]
    assert len(set(ids)) == len(ids)
    assert [row.id for query_set in asked for row in query_set.references] == ids


def test_only_the_first_captions_are_taken_where_a_benchmark_says_so():
    photo = record("p", captions=[f"caption {k}" for k in range(7)])
    assert len(RecordIndex([photo], captions_per_image=5).distinct_captions) == 5
    assert len(RecordIndex([photo]).distinct_captions) == 7


def test_two_records_of_one_id_are_refused():
    with pytest.raises(ValueError, match="two records have the id 'p1'"):
        RecordIndex([PHOTOS[0], PHOTOS[0]])
