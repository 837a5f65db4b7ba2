import pytest

from cloc_mllm.data.compositional import compositional_kind, generate_compositional
from cloc_mllm.data.records import Record, Region
from cloc_mllm.data.scenes import CONCEPTS, ZERO_SHOT_CONCEPTS, generate_scenes
from cloc_mllm.evaluation.queries import TASKS, build_benchmark, row_tasks

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def record(record_id, regions=(), captions=(), source="photos"):
    return Record(record_id, b"", 100, 100, list(captions), list(regions), source)


def by_prompt(bench, task):
    """{(image, asked text or box): reference} of a task."""
    pairs = zip(bench.queries, bench.references, strict=True)
    return {(q.image_id, q.text or q.box): ref for q, ref in pairs if q.task == task}


PHOTOS = [
    record("p1", [Region(LEFT, "A man"), Region(LEFT, "the  runner"), Region(RIGHT, "a man")]),
    record("p2", [Region(LEFT, "a man")], ["Someone runs .", "a man"]),
    record("p3", [], ["someone runs ."]),
]


def test_equal_boxes_are_one_region_and_equal_texts_one_text():
    bench = build_benchmark(PHOTOS, ["region_text_retrieval"])
    assert bench.phrases == ["a man", "the runner"]
    assert [region.id for region in bench.regions] == ["p1#0", "p1#1", "p2#0"]
    to_text = by_prompt(bench, "region_to_text")
    assert to_text["p1", LEFT].labels == ["a man", "the runner"]
    assert to_text["p2", LEFT].labels == ["a man"]
    assert to_text["p2", LEFT].num_candidates == 2
    to_region = by_prompt(bench, "text_to_region")
    assert to_region["p2", "a man"].labels == ["p1#0", "p1#1", "p2#0"]
    assert to_region["p1", "the runner"].labels == ["p1#0"]
    assert to_region["p1", "the runner"].num_candidates == 3
    assert len(to_region) == 3


def test_images_sharing_a_caption_are_all_right():
    bench = build_benchmark(PHOTOS, ["image_text_retrieval"])
    assert bench.captions == ["a man", "someone runs ."]
    to_text = by_prompt(bench, "image_to_text")
    assert list(to_text) == [("p2", None), ("p3", None)]  # p1 has no caption
    assert to_text["p2", None].labels == ["someone runs .", "a man"]
    to_image = by_prompt(bench, "text_to_image")
    assert to_image["p3", "someone runs ."].labels == ["p2", "p3"]
    assert to_image["p3", "someone runs ."].num_candidates == 3


def test_a_phrase_is_located_once_an_image_with_all_its_boxes():
    bench = build_benchmark(PHOTOS, ["text_to_box"])
    boxes = {key: reference.boxes for key, reference in by_prompt(bench, "text_to_box").items()}
    assert boxes == {
        ("p1", "a man"): [LEFT, RIGHT],
        ("p1", "the runner"): [LEFT],
        ("p2", "a man"): [LEFT],
    }


def test_rec_asks_every_expression_of_every_region():
    regions = [
        Region(LEFT, "bowl", expressions=["bowl", "white bowl", "bowl"]),
        Region(RIGHT, "bowl", expressions=["bowl"]),
    ]
    bench = build_benchmark([record("p0", regions, source="refcoco")], ["rec"])
    asked = [(ref.labels[0], ref.boxes, ref.kind) for ref in bench.references]
    assert asked == [
        ("bowl", [LEFT], "refcoco"),
        ("white bowl", [LEFT], "refcoco"),
        ("bowl", [LEFT], "refcoco"),
        ("bowl", [RIGHT], "refcoco"),
    ]


@pytest.mark.parametrize("group", ["chain 7", ""], ids=["group", "bare phrases"])
def test_rec_takes_any_box_of_what_a_phrase_names_together(group):
    names = ["men"] if group else []
    regions = [Region(box, "Two men", expressions=names, group=group) for box in (LEFT, RIGHT)]
    bench = build_benchmark([record("p0", regions)], ["rec"])
    asked = {ref.labels[0]: ref.boxes for ref in bench.references}
    assert asked == {text: [LEFT, RIGHT] for text in ["two men", *names]}


def test_other_names_of_a_photo_region_count_as_its_texts():
    regions = [Region(LEFT, "A man", expressions=["the runner"])]
    photo = build_benchmark([record("p", regions)], ["region_text_retrieval", "text_to_box"])
    assert photo.phrases == ["a man", "the runner"]
    assert len(by_prompt(photo, "text_to_box")) == 2
    scene = build_benchmark([record("s", regions, source="openmoji-scenes")], ["text_to_box"])
    assert scene.phrases == ["a man"]


def test_classes_are_all_categories_and_all_concepts_of_built_in_scenes():
    photos = [record("p", [Region(LEFT, "a man", category="people"), Region(RIGHT, "it")])]
    bench = build_benchmark(photos, ["region_classification"])
    assert bench.class_names == ["people"]
    assert len(bench.queries) == 1  # the region without a category is not asked
    for split, concepts in (("test", CONCEPTS), ("zero_shot", ZERO_SHOT_CONCEPTS)):
        scenes = list(generate_scenes(2, split=split))
        bench = build_benchmark(scenes, ["region_classification"])
        assert bench.class_names == sorted(concepts)
        assert len(bench.queries) == sum(len(scene.regions) for scene in scenes)


def test_built_in_expressions_know_their_kind():
    texts = ["the crab", "the smaller crab", "the leftmost crab", "the crab above the clock"]
    scene = record("s", [Region(LEFT, "crab", expressions=texts)], source="openmoji-scenes")
    bench = build_benchmark([scene], ["rec"])
    assert [ref.kind for ref in bench.references] == ["unique", "size", "ordinal", "relation"]


def test_a_reference_says_the_size_of_its_image_and_what_distracts():
    boxes = [(0.1 * i, 0.0, 0.1 * i + 0.1, 1.0) for i in range(4)]
    crabs = [Region(box, "a crab", category="Crab") for box in boxes[:3]]
    regions = [*crabs, Region(boxes[3], "it")]
    bench = build_benchmark([record("p", regions)], ["text_to_box", "region_classification"])
    counts = {ref.id: ref.num_distractors for ref in bench.references}
    assert counts == {
        "text_to_box/p/0": 0,  # any of the three counts as right, so none distracts
        "text_to_box/p/1": None,  # of what kind "it" is, the record does not say
        **{f"region_classification/p#{index}": 2 for index in range(3)},
    }
    assert {(ref.width, ref.height) for ref in bench.references} == {(100, 100)}


def test_of_compositional_scenes_only_the_expressions_are_asked():
    scenes = list(generate_compositional(6))
    bench = build_benchmark(scenes, ["text_to_box", "rec"])
    expected = {
        (task, scene.id, region.expressions[0], region.box)
        for scene in scenes
        for region in scene.regions
        if region.expressions
        for task in ("text_to_box", "rec")
    }
    pairs = list(zip(bench.queries, bench.references, strict=True))
    assert {(q.task, q.image_id, q.text, ref.boxes[0]) for q, ref in pairs} == expected
    assert len(pairs) == len(expected)
    kind_of = {scene.id: compositional_kind(scene.source) for scene in scenes}
    for reference in bench.references:
        kind = kind_of[reference.image_id]
        assert reference.kind == kind
        assert (reference.num_distractors == 0) == (kind == "unseen concept")


def test_query_ids_are_unique_over_all_tasks():
    bench = build_benchmark(list(generate_scenes(3, split="test")), TASKS)
    ids = [query.id for query in bench.queries]
    assert len(set(ids)) == len(ids)
    assert [reference.id for reference in bench.references] == ids


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"unknown tasks \['recc'\]; expected some of: region_cl"):
        row_tasks(["rec", "recc"])
    with pytest.raises(ValueError, match="two records have the id 'p1'"):
        build_benchmark([PHOTOS[0], PHOTOS[0]], ["rec"])
