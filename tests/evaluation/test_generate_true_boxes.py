"""Region features side by side, each against the model asked for one box at a time."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cloc_mllm.data.transforms import preprocess
from cloc_mllm.evaluation.generate_cloc import Settings
from cloc_mllm.evaluation.generate_true_boxes import (
    TRUE_BOX_TASKS,
    crop_box,
    decode_mask,
    predict_true_boxes,
)
from cloc_mllm.evaluation.prompts import class_embeddings
from cloc_mllm.evaluation.true_boxes import TrueBox, TrueBoxes
from cloc_mllm.geometry import Boxes
from cloc_mllm.models.region_encoders.roi_align import roi_align_tokens
from tests.evaluation.conftest import build_tiny_cloc

pytest.importorskip("pycocotools")
NO_INDEX = torch.zeros(1, dtype=torch.long)
NAMES = [f"name {letter}" for letter in "abcdefghijklm"]


@pytest.fixture(scope="module")
def boxes(test_scenes):
    """Every region of the scenes; all but the first have their left half as mask."""
    items = []
    for record in test_scenes:
        height, width = record.height, record.width
        for index, region in enumerate(record.regions):
            x1, y1, x2, y2 = np.array(region.box) * [width, height, width, height]
            half = (x1 + x2) / 2
            mask = [[x1, y1, half, y1, half, y2, x1, y2]] if items else None
            name = f"{record.id}#{index}"
            items.append(TrueBox(name, record.id, region.box, "name c", mask, (height, width)))
    return TrueBoxes(NAMES, items)


@pytest.fixture(scope="module")
def rows(tiny_cloc, character_tokenizer, test_scenes, boxes):
    settings = Settings("tiny", batch_size=3, templates="none")
    tasks = list(TRUE_BOX_TASKS)
    return predict_true_boxes(tiny_cloc, character_tokenizer, test_scenes, boxes, tasks, settings)


def embed(model, record, item, kind):
    """One region's feature, from a batch of one image."""
    image = record.load_image()
    pixels, letterbox = preprocess(image, 64)
    if kind == "crop":
        x1, y1, x2, y2 = item.box
        left, top = int(np.floor(x1 * image.width)), int(np.floor(y1 * image.height))
        right, bottom = int(np.ceil(x2 * image.width)), int(np.ceil(y2 * image.height))
        part = Image.fromarray(np.asarray(image)[top:bottom, left:right])
        return model.encode_image(preprocess(part, 64)[0][None]).image_features
    features = model.encode_image(pixels[None])
    canvas = letterbox.to_canvas(Boxes.normalized([item.box])).xyxy.float()
    if kind == "cloc":
        return model.embed_boxes(features, canvas, NO_INDEX)
    tokens = features.tokens @ model.vision.encoder.visual.proj
    if kind == "roi_align":
        return roi_align_tokens(tokens, features.grid_hw, canvas, NO_INDEX)
    return pool_by_hand(tokens[0], canvas[0], letterbox, item)


def pool_by_hand(tokens, canvas, letterbox, item):
    """Mean of 4 x 4 tokens of 16 pixels by how many pixels of the shape each holds."""
    if item.segmentation is None:
        shape = torch.zeros(640, 640)
        x1, y1, x2, y2 = (640 * canvas).round().int().tolist()
        shape[y1:y2, x1:x2] = 1
    else:
        shape = letterbox.mask_to_canvas(torch.from_numpy(decode_mask(item)))
    side = len(shape) // 4
    weights = torch.stack(
        [
            shape[row * side : (row + 1) * side, column * side : (column + 1) * side].sum()
            for row in range(4)
            for column in range(4)
        ]
    )
    return (weights[:, None] * tokens).sum(0, keepdim=True) / weights.sum()


@torch.no_grad()
@pytest.mark.parametrize("task", TRUE_BOX_TASKS)
def test_each_box_is_named_by_its_own_feature(
    tiny_cloc, character_tokenizer, test_scenes, boxes, rows, task
):
    records = {record.id: record for record in test_scenes}
    classes = class_embeddings(tiny_cloc, character_tokenizer, NAMES, "none")
    actual = {row.id: row for row in rows if row.task == task}
    assert list(actual) == [f"{task}/{item.id}" for item in boxes.items]
    for item in boxes.items:
        z = embed(tiny_cloc, records[item.image_id], item, TRUE_BOX_TASKS[task])
        best = (F.normalize(z, dim=-1) @ classes.T)[0].topk(10)
        row = actual[f"{task}/{item.id}"]
        # scores are rounded to 4 digits; a box painted on pixels is up to half a pixel off
        torch.testing.assert_close(torch.tensor(row.scores), best.values, atol=1e-3, rtol=0)
        assert row.labels[0] in [NAMES[i] for i in best.indices[:2]]


def test_rows_say_how_they_were_made(rows, boxes):
    assert len(rows) == 4 * len(boxes.items)
    assert {row.model for row in rows} == {"tiny"}
    of_masks = [row.settings["mask"] for row in rows if row.task == "true_box_mask"]
    assert of_masks == ["box", *["segmentation"] * (len(boxes.items) - 1)]
    crop = next(row for row in rows if row.task == "true_box_crop")
    assert crop.settings == {
        "region_features": "crop",
        "image_size": 64,
        "precision": "fp32",
        "templates": "none",
    }


def test_features_differ_and_batch_size_does_not(
    tiny_cloc, character_tokenizer, test_scenes, boxes, rows
):
    tasks = list(TRUE_BOX_TASKS)
    other = predict_true_boxes(
        tiny_cloc,
        character_tokenizer,
        test_scenes,
        boxes,
        tasks,
        Settings(batch_size=1, templates="none"),
    )
    expected = {row.id: row.scores for row in rows}
    for row in other:
        assert row.scores == pytest.approx(expected[row.id], abs=2e-4)
    last = boxes.items[-1].id
    assert len({tuple(expected[f"{task}/{last}"]) for task in tasks}) == 4


@pytest.mark.parametrize("kind", ["roi_align", "none"])
def test_a_tower_without_prompter_answers_too(character_tokenizer, test_scenes, boxes, kind):
    model = build_tiny_cloc(character_tokenizer, kind)
    rows = predict_true_boxes(
        model, character_tokenizer, test_scenes, boxes, list(TRUE_BOX_TASKS), Settings()
    )
    assert len(rows) == 4 * len(boxes.items)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0.0, 0.0, 1.0, 1.0), (10, 4)),
        ((0.1, 0.25, 0.3, 0.5), (2, 1)),
        ((0.11, 0.3, 0.31, 0.51), (3, 2)),  # every pixel it touches
        ((1.0, 1.0, 1.0, 1.0), (1, 1)),
    ],
)
def test_crops_are_whole_pixels(box, expected):
    assert crop_box(Image.new("RGB", (10, 4)), box).size == expected


SQUARE = [[1, 1, 4, 1, 4, 3, 1, 3]]


@pytest.mark.parametrize(
    ("segmentation", "pixels"),
    [
        pytest.param(SQUARE, 6, id="polygon"),
        pytest.param([*SQUARE, [6, 0, 8, 0, 8, 2, 6, 2]], 10, id="two_polygons"),
        pytest.param({"counts": [5, 3, 42], "size": [5, 10]}, 3, id="run_lengths"),
        pytest.param(None, None, id="none"),
        pytest.param([], None, id="empty"),
        pytest.param({"counts": [50], "size": [5, 10]}, None, id="nothing_on"),
        pytest.param({"counts": "53Z1", "size": [5, 10]}, 3, id="compressed"),
        pytest.param([[1, 2]], None, id="no_polygon"),
        pytest.param([[1, 2, 3, 4]], None, id="a_box"),
        pytest.param({"counts": [5, 3], "size": [5, 10]}, None, id="too_short"),
        pytest.param({"counts": [5, 3, 42], "size": [10, 5]}, None, id="other_size"),
        pytest.param("?", None, id="no_segmentation"),
        pytest.param({"size": [5, 10]}, None, id="no_counts"),
    ],
)
def test_masks_of_every_kind(segmentation, pixels):
    mask = decode_mask(TrueBox("a", "i", (0, 0, 1, 1), "x", segmentation, (5, 10)))
    assert (None if mask is None else mask.sum()) == pixels
    assert mask is None or mask.shape == (5, 10)
