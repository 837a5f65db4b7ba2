from cloc_mllm.data.records import Region
from cloc_mllm.data.scenes import CONCEPTS, generate_scenes
from cloc_mllm.evaluation.tasks.region_classification import RegionClassification
from tests.evaluation.helpers import LEFT, RIGHT, query_sets, record


def test_a_region_without_a_category_is_not_asked():
    photo = record("p", [Region(LEFT, "a man", category="people"), Region(RIGHT, "it")])
    (asked,) = query_sets(RegionClassification(), [photo])
    assert [row.labels for row in asked.references] == [["people"]]
    assert asked.queries[0].boxes == (LEFT,)
    assert asked.candidates.names == ["people"]


def test_every_region_of_a_scene_is_asked_among_all_concepts():
    scenes = list(generate_scenes(2, split="test"))
    (asked,) = query_sets(RegionClassification(), scenes)
    assert len(asked.queries) == sum(len(scene.regions) for scene in scenes)
    assert {row.num_candidates for row in asked.references} == {len(CONCEPTS)}
