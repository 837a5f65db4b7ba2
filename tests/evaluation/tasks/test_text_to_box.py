from cloc_mllm.data.records import Region
from cloc_mllm.evaluation.tasks.text_to_box import TextToBox
from tests.evaluation.helpers import LEFT, RIGHT, by_prompt, query_sets, record


def test_a_phrase_is_located_once_per_image_with_all_its_boxes():
    photos = [
        record("p1", [Region(LEFT, "A man"), Region(LEFT, "the  runner"), Region(RIGHT, "a man")]),
        record("p2", [Region(LEFT, "a man")]),
    ]
    (asked,) = query_sets(TextToBox(), photos)
    assert {key: reference.boxes for key, reference in by_prompt(asked).items()} == {
        ("p1", "a man"): [LEFT, RIGHT],
        ("p1", "the runner"): [LEFT],
        ("p2", "a man"): [LEFT],
    }
