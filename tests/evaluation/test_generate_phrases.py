"""Ranked boxes of phrases against the model asked for one image at a time."""

import pytest
import torch
import torch.nn.functional as F
from cloc_mllm.evaluation.generate_cloc import Settings
from cloc_mllm.evaluation.generate_phrases import predict_phrases, rank_boxes

from cloc_mllm.data.transforms import preprocess
from cloc_mllm.evaluation.queries import Query
from cloc_mllm.geometry import CANVAS, Boxes, elementwise_iou
from tests.evaluation.conftest import build_tiny_cloc

NO_INDEX = torch.zeros(1, dtype=torch.long)


@pytest.fixture(scope="module")
def queries(test_scenes):
    """Two phrases on every scene but the first, which has none."""
    return [
        Query(f"{record.id}/{text}", record.id, "phrase_grounding", text=text)
        for record in test_scenes[1:]
        for text in ("a crab", "clock")
    ]


@pytest.fixture(scope="module")
def rows(tiny_cloc, character_tokenizer, test_scenes, queries):
    settings = Settings("tiny", batch_size=3)
    return predict_phrases(tiny_cloc, character_tokenizer, test_scenes, queries, settings)


@torch.no_grad()
def test_the_first_box_is_cloc_s_own_and_the_others_are_its_proposals(
    tiny_cloc, character_tokenizer, test_scenes, queries, rows
):
    records = {record.id: record for record in test_scenes}
    assert [row.id for row in rows] == [query.id for query in queries]
    for query, row in zip(queries, rows, strict=True):
        pixels, letterbox = preprocess(records[query.image_id].load_image(), 64)
        image = tiny_cloc.encode_image(pixels[None])
        text = tiny_cloc.encode_text(character_tokenizer([query.text]))
        canvas = tiny_cloc.locate(image, text, NO_INDEX)
        first = letterbox.to_original(Boxes(canvas, CANVAS)).xyxy.clamp(0, 1)
        torch.testing.assert_close(torch.tensor(row.boxes[:1]), first)
        z = tiny_cloc.embed_boxes(image, canvas, NO_INDEX)
        assert row.confidence == pytest.approx(F.cosine_similarity(z, text).item(), abs=1e-4)
        _, proposals = tiny_cloc.vision.read_tokens(image)
        known = letterbox.to_original(Boxes(proposals[0], CANVAS)).xyxy.clamp(0, 1)
        for box in row.boxes[1:]:
            assert (known - torch.tensor(box)).abs().amax(1).min() < 1e-5
        assert 1 <= len(row.boxes) <= 10


def test_without_a_prompter_there_is_one_box(character_tokenizer, test_scenes, queries):
    model = build_tiny_cloc(character_tokenizer, "none")
    rows = predict_phrases(model, character_tokenizer, test_scenes, queries, Settings())
    assert {len(row.boxes) for row in rows} == {1}


def test_boxes_are_ranked_by_score_without_repeats():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(200, 2, 2, generator=generator, dtype=torch.float64).sort(1).values
    boxes = [tuple(row) for row in corners.flatten(1).tolist()]
    first, others = boxes[0], [(k / 250, box) for k, box in enumerate(boxes[1:])]
    expected = [first]
    for _, box in sorted(others, reverse=True):  # plain greedy suppression
        near = [elementwise_iou(torch.tensor([box]), torch.tensor([kept])) for kept in expected]
        if max(near) <= 0.5:
            expected.append(box)
    assert 12 < len(expected) < 150
    assert rank_boxes(first, others, limit=200) == expected
    assert rank_boxes(first, others) == expected[:10]
    assert rank_boxes(first, others, limit=3) == expected[:3]
    assert rank_boxes(first, []) == [first]
