"""Batched predictions against one query at a time, straight from the model."""

import pytest
import torch
import torch.nn.functional as F

from cloc_mllm.data.transforms import Preprocessing
from cloc_mllm.evaluation.metrics import pairs_by_task
from cloc_mllm.evaluation.predictors.cloc import ClocSettings, predict_cloc
from cloc_mllm.evaluation.quick import CLOC_TASKS
from cloc_mllm.evaluation.tasks import EvalData, all_scorers, task_class
from cloc_mllm.evaluation.tasks.rejection import Rejection
from cloc_mllm.evaluation.tasks.text_to_box import TextToBox
from cloc_mllm.geometry import CANVAS, Boxes
from tests.evaluation.helpers import query_sets

NO_INDEX = torch.zeros(1, dtype=torch.long)


@pytest.fixture(scope="module")
def asked(test_scenes):
    """The query set of each task of the rows."""
    data = EvalData(lambda: test_scenes)
    sets = [found for name in CLOC_TASKS for found in task_class(name)().query_sets(data)]
    return {query_set.task: query_set for query_set in sets}


@pytest.fixture(scope="module")
def rows(tiny_cloc, character_tokenizer, asked):
    settings = ClocSettings("tiny", batch_size=3)
    return predict_cloc(tiny_cloc, character_tokenizer, list(asked.values()), settings)


def rows_of(rows, task):
    return {row.id: row for row in rows if row.task == task}


@torch.no_grad()
def similarities(queries, candidates):
    return F.normalize(queries, dim=-1) @ F.normalize(candidates, dim=-1).T


def test_every_query_is_answered_once(rows, asked):
    expected = [query.id for query_set in asked.values() for query in query_set.queries]
    assert [row.id for row in rows] == expected
    assert {row.model for row in rows} == {"tiny"}
    assert rows[0].settings == {"image_size": 64, "precision": "fp32", "region_prompt": "box"}


@torch.no_grad()
@pytest.mark.parametrize("task", ["region_classification", "region_to_text"])
def test_regions_are_named_by_their_own_embedding(
    tiny_cloc, character_tokenizer, test_scenes, asked, rows, task
):
    names = asked[task].candidates.names
    texts = torch.cat([tiny_cloc.encode_text(character_tokenizer([name])) for name in names])
    records = {record.id: record for record in test_scenes}
    actual = rows_of(rows, task)
    assert len(actual) == sum(len(record.regions) for record in test_scenes)
    for query in asked[task].queries:
        pixels, transform = Preprocessing(64)(records[query.image_id].load_image())
        box = transform.to_canvas(Boxes.normalized(query.boxes)).xyxy.float()
        z = tiny_cloc.embed_boxes(tiny_cloc.encode_image(pixels[None]), box, NO_INDEX)
        best = similarities(z, texts)[0].topk(min(10, len(names)))
        # ranks may swap where scores agree to rounding
        torch.testing.assert_close(
            torch.tensor(actual[query.id].scores), best.values, atol=1e-4, rtol=0
        )
        assert actual[query.id].labels[0] == names[best.indices[0]]


@torch.no_grad()
def test_text_finds_regions_and_images(tiny_cloc, character_tokenizer, test_scenes, asked, rows):
    texts = asked["image_to_text"].candidates.names
    image_ids = [record.id for record in test_scenes]
    image = torch.cat(
        [
            tiny_cloc.encode_image(Preprocessing(64)(record.load_image())[0][None]).image_features
            for record in test_scenes
        ]
    )
    text = torch.cat([tiny_cloc.encode_text(character_tokenizer([caption])) for caption in texts])
    expected = similarities(image, text)
    for query in asked["image_to_text"].queries:
        row = expected[image_ids.index(query.image_id)]
        assert rows_of(rows, "image_to_text")[query.id].labels[0] == texts[row.argmax()]
    for query in asked["text_to_image"].queries:
        column = expected[:, texts.index(query.text)]
        assert rows_of(rows, "text_to_image")[query.id].labels[0] == image_ids[column.argmax()]
    region_ids = set(asked["text_to_region"].candidates.names)
    for row in rows_of(rows, "text_to_region").values():
        assert set(row.labels) <= region_ids and len(row.labels) == 10


@torch.no_grad()
def test_located_boxes_are_in_the_frame_of_the_original_image(
    tiny_cloc, character_tokenizer, test_scenes, asked, rows
):
    records = {record.id: record for record in test_scenes}
    assert any(record.width != record.height for record in test_scenes)
    for query in asked["text_to_box"].queries:
        pixels, transform = Preprocessing(64)(records[query.image_id].load_image())
        text = tiny_cloc.encode_text(character_tokenizer([query.text]))
        located = tiny_cloc.locate(tiny_cloc.encode_image(pixels[None]), text, NO_INDEX)
        expected = transform.to_original(Boxes(located, CANVAS)).xyxy.clamp(0, 1)
        actual = torch.tensor(rows_of(rows, "text_to_box")[query.id].boxes)
        torch.testing.assert_close(actual, expected)


def test_batch_size_changes_nothing(tiny_cloc, character_tokenizer, asked, rows):
    settings = ClocSettings("tiny", batch_size=8)
    other = predict_cloc(tiny_cloc, character_tokenizer, list(asked.values()), settings)
    for a, b in zip(rows, other, strict=True):
        assert a.id == b.id
        torch.testing.assert_close(
            torch.tensor(a.scores), torch.tensor(b.scores), atol=2e-4, rtol=0
        )
        torch.testing.assert_close(torch.tensor(a.boxes), torch.tensor(b.boxes))


def test_a_diverged_model_answers_no_box(tiny_cloc, character_tokenizer, test_scenes):
    asked = query_sets(TextToBox(), test_scenes)
    parameter = next(tiny_cloc.vision.region_encoder.box_head.parameters())
    saved = parameter.detach().clone()
    try:
        with torch.no_grad():
            parameter.fill_(float("nan"))
        rows = predict_cloc(tiny_cloc, character_tokenizer, asked, ClocSettings())
    finally:
        with torch.no_grad():
            parameter.copy_(saved)
    assert {row.failure for row in rows} == {"not_finite"}
    pairs = pairs_by_task(rows, asked[0].references)["text_to_box"]
    assert all_scorers()["text_to_box"].score(pairs)["mean_iou"].mean() == 0


def test_regions_can_be_prompted_by_a_shape_drawn_in_them(
    tiny_cloc, character_tokenizer, asked, rows
):
    def answers(prompt):
        settings = ClocSettings("tiny", region_prompt=prompt)
        made = predict_cloc(
            tiny_cloc, character_tokenizer, [asked["region_classification"]], settings
        )
        return [row.scores for row in made]

    boxes = [row.scores for row in rows_of(rows, "region_classification").values()]
    assert answers("point") == answers("point") != boxes


def test_cloc_refuses_under_its_threshold(tiny_cloc, character_tokenizer):
    asked = query_sets(Rejection(by="cloc", num_scenes=4))
    rows = predict_cloc(tiny_cloc, character_tokenizer, asked, ClocSettings("tiny"))
    assert [row.id for row in rows] == [query.id for query in asked[0].queries]
    (threshold,) = {row.settings["threshold"] for row in rows}
    assert -1 <= threshold <= 1
    for row in rows:
        assert row.labels == ["absent" if row.confidence < threshold else "present"]
    asked = query_sets(Rejection(by="cloc", num_scenes=4, threshold=2.0))
    all_refused = predict_cloc(tiny_cloc, character_tokenizer, asked, ClocSettings("tiny"))
    assert {row.labels[0] for row in all_refused} == {"absent"}


def test_sets_about_other_records_are_encoded_with_their_own(
    tiny_cloc, character_tokenizer, asked, rows
):
    """Tasks with images of their own stand beside those of `--data`."""
    rejection = query_sets(Rejection(by="cloc", num_scenes=3, threshold=0.1))
    settings = ClocSettings("tiny", batch_size=3)
    alone = predict_cloc(tiny_cloc, character_tokenizer, rejection, settings)
    both = [asked["text_to_box"], *rejection]
    together = predict_cloc(tiny_cloc, character_tokenizer, both, settings)
    assert together == [*rows_of(rows, "text_to_box").values(), *alone]
