"""Batched predictions against one query at a time, straight from the model."""

import pytest
import torch
import torch.nn.functional as F

from cloc_mllm.data.records import Record
from cloc_mllm.data.transforms import preprocess
from cloc_mllm.evaluation.generate_cloc import Settings, predict_cloc
from cloc_mllm.evaluation.queries import build_benchmark
from cloc_mllm.evaluation.quick import CLOC_TASKS, quick_region_metrics
from cloc_mllm.evaluation.scoring import SCORERS, pairs_by_task
from cloc_mllm.geometry import CANVAS, Boxes

NO_INDEX = torch.zeros(1, dtype=torch.long)


@pytest.fixture(scope="module")
def bench(test_scenes):
    return build_benchmark(test_scenes, CLOC_TASKS)


@pytest.fixture(scope="module")
def rows(tiny_cloc, character_tokenizer, test_scenes, bench):
    settings = Settings("tiny", batch_size=3)
    return predict_cloc(tiny_cloc, character_tokenizer, test_scenes, bench, settings)


def rows_of(rows, task):
    return {row.id: row for row in rows if row.task == task}


@torch.no_grad()
def similarities(queries, candidates):
    return F.normalize(queries, dim=-1) @ F.normalize(candidates, dim=-1).T


def test_every_query_is_answered_once(rows, bench):
    assert sorted(row.id for row in rows) == sorted(query.id for query in bench.queries)
    assert {row.model for row in rows} == {"tiny"}
    assert rows[0].settings == {"image_size": 64, "precision": "fp32", "region_prompt": "box"}


@torch.no_grad()
@pytest.mark.parametrize("task", ["region_classification", "region_to_text"])
def test_regions_are_named_by_their_own_embedding(
    tiny_cloc, character_tokenizer, test_scenes, bench, rows, task
):
    names = bench.class_names if task == "region_classification" else bench.phrases
    texts = torch.cat([tiny_cloc.encode_text(character_tokenizer([name])) for name in names])
    records = {record.id: record for record in test_scenes}
    actual = rows_of(rows, task)
    assert len(actual) == sum(len(record.regions) for record in test_scenes)
    for query in bench.of_task(task):
        pixels, letterbox = preprocess(records[query.image_id].load_image(), 64)
        box = letterbox.to_canvas(Boxes.normalized([query.box])).xyxy.float()
        z = tiny_cloc.embed_boxes(tiny_cloc.encode_image(pixels[None]), box, NO_INDEX)
        best = similarities(z, texts)[0].topk(min(10, len(names)))
        # ranks may swap where scores agree to rounding
        torch.testing.assert_close(
            torch.tensor(actual[query.id].scores), best.values, atol=1e-4, rtol=0
        )
        assert actual[query.id].labels[0] == names[best.indices[0]]


@torch.no_grad()
def test_text_finds_regions_and_images(tiny_cloc, character_tokenizer, test_scenes, bench, rows):
    texts = bench.captions
    image = torch.cat(
        [
            tiny_cloc.encode_image(preprocess(record.load_image(), 64)[0][None]).image_features
            for record in test_scenes
        ]
    )
    text = torch.cat([tiny_cloc.encode_text(character_tokenizer([caption])) for caption in texts])
    expected = similarities(image, text)
    for query in bench.of_task("image_to_text"):
        row = expected[bench.image_ids.index(query.image_id)]
        assert rows_of(rows, "image_to_text")[query.id].labels[0] == texts[row.argmax()]
    for query in bench.of_task("text_to_image"):
        column = expected[:, texts.index(query.text)]
        assert (
            rows_of(rows, "text_to_image")[query.id].labels[0] == bench.image_ids[column.argmax()]
        )
    region_ids = {region.id for region in bench.regions}
    for row in rows_of(rows, "text_to_region").values():
        assert set(row.labels) <= region_ids and len(row.labels) == 10


@torch.no_grad()
def test_located_boxes_are_in_the_frame_of_the_original_image(
    tiny_cloc, character_tokenizer, test_scenes, bench, rows
):
    records = {record.id: record for record in test_scenes}
    assert any(record.width != record.height for record in test_scenes)
    for query in bench.of_task("text_to_box"):
        pixels, letterbox = preprocess(records[query.image_id].load_image(), 64)
        text = tiny_cloc.encode_text(character_tokenizer([query.text]))
        located = tiny_cloc.locate(tiny_cloc.encode_image(pixels[None]), text, NO_INDEX)
        expected = letterbox.to_original(Boxes(located, CANVAS)).xyxy.clamp(0, 1)
        actual = torch.tensor(rows_of(rows, "text_to_box")[query.id].boxes)
        torch.testing.assert_close(actual, expected)


def test_batch_size_changes_nothing(tiny_cloc, character_tokenizer, test_scenes, bench, rows):
    other = predict_cloc(
        tiny_cloc, character_tokenizer, test_scenes, bench, Settings("tiny", batch_size=8)
    )
    for a, b in zip(rows, other, strict=True):
        assert a.id == b.id
        torch.testing.assert_close(
            torch.tensor(a.scores), torch.tensor(b.scores), atol=2e-4, rtol=0
        )
        torch.testing.assert_close(torch.tensor(a.boxes), torch.tensor(b.boxes))


def test_a_diverged_model_answers_no_box(tiny_cloc, character_tokenizer, test_scenes):
    bench = build_benchmark(test_scenes, ["text_to_box"])
    parameter = next(tiny_cloc.vision.region_encoder.box_head.parameters())
    saved = parameter.detach().clone()
    try:
        with torch.no_grad():
            parameter.fill_(float("nan"))
        rows = predict_cloc(tiny_cloc, character_tokenizer, test_scenes, bench, Settings())
    finally:
        with torch.no_grad():
            parameter.copy_(saved)
    assert {row.failure for row in rows} == {"not_finite"}
    pairs = pairs_by_task(rows, bench.references)["text_to_box"]
    assert SCORERS["text_to_box"].score(pairs)["mean_iou"].mean() == 0


def test_quick_metrics_leave_the_model_as_it_was(tiny_cloc, character_tokenizer, test_scenes):
    tiny_cloc.train()
    tiny_cloc.vision.eval()
    before = [module.training for module in tiny_cloc.modules()]
    metrics = quick_region_metrics(tiny_cloc, character_tokenizer, test_scenes, batch_size=3)
    assert [module.training for module in tiny_cloc.modules()] == before
    assert set(metrics) == {
        "region_classification/macro_acc",
        "region_to_text/r_at_10",
        "text_to_region/r_at_10",
        "image_to_text/r_at_1",
        "text_to_box/acc_at_0_5",
        "text_to_box/mean_iou",
    }
    assert all(0 <= value <= 1 for value in metrics.values())
    tiny_cloc.eval()


def test_records_without_any_region_or_text(tiny_cloc, character_tokenizer, test_scenes):
    bare = Record("bare", test_scenes[0].image, 64, 64, [], [], "photos")
    assert quick_region_metrics(tiny_cloc, character_tokenizer, [bare]) == {}


def test_regions_can_be_prompted_by_a_shape_drawn_in_them(
    tiny_cloc, character_tokenizer, test_scenes, bench, rows
):
    def answers(prompt):
        settings = Settings("tiny", region_prompt=prompt)
        made = predict_cloc(tiny_cloc, character_tokenizer, test_scenes, bench, settings)
        return [row.scores for row in rows_of(made, "region_classification").values()]

    boxes = [row.scores for row in rows_of(rows, "region_classification").values()]
    assert answers("point") == answers("point") != boxes
