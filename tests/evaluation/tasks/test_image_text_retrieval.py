from cloc_mllm.evaluation.tasks import EvalData
from cloc_mllm.evaluation.tasks.image_text_retrieval import ImageTextRetrieval
from tests.evaluation.helpers import by_prompt, query_sets, record

PHOTOS = [
    record("p1"),
    record("p2", captions=["Someone runs .", "a man"]),
    record("p3", captions=["someone runs ."]),
]


def test_images_sharing_a_caption_are_all_right():
    to_text, to_image = query_sets(ImageTextRetrieval(), PHOTOS)
    assert to_text.candidates.names == ["a man", "someone runs ."]
    assert to_image.candidates.names == ["p1", "p2", "p3"]
    right = by_prompt(to_text)
    assert list(right) == [("p2", None), ("p3", None)]  # p1 has no caption
    assert right["p2", None].labels == ["someone runs .", "a man"]
    right = by_prompt(to_image)
    assert right["p3", "someone runs ."].labels == ["p2", "p3"]
    assert right["p3", "someone runs ."].num_candidates == 3


def test_a_declared_benchmark_takes_the_first_captions():
    photos = [record(f"p{i}", captions=[f"caption {k}" for k in range(7)]) for i in range(2)]
    data = EvalData(lambda: photos, captions_per_image=5)
    to_text, to_image = ImageTextRetrieval().query_sets(data)
    assert to_text.candidates.names == [f"caption {k}" for k in range(5)]
    assert len(to_image.queries) == 10
