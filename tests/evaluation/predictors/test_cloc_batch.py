"""Region features side by side, and ranked boxes, each against the model asked one at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cloc_mllm.data.transforms import Preprocessing
from cloc_mllm.evaluation.predictors.class_names import class_embeddings
from cloc_mllm.evaluation.predictors.cloc import ClocSettings, predict_cloc
from cloc_mllm.evaluation.predictors.cloc_batch import crop_box, decode_mask, rank_boxes
from cloc_mllm.evaluation.queries import Candidates, Query, QuerySet, pair
from cloc_mllm.geometry import CANVAS, Boxes, elementwise_iou
from cloc_mllm.models.region_encoders.roi_align import roi_align_tokens
from tests.evaluation.conftest import build_tiny_cloc

pytest.importorskip("pycocotools")
NO_INDEX = torch.zeros(1, dtype=torch.long)
KINDS = ("cloc", "roi_align", "crop", "mask")
NAMES = [f"name {letter}" for letter in "abcdefghijklm"]


@pytest.fixture(scope="module")
def queries(test_scenes):
    """Every region of the scenes; all but the first have their left half as mask."""
    found = []
    for record in test_scenes:
        height, width = record.height, record.width
        for index, region in enumerate(record.regions):
            x1, y1, x2, y2 = np.array(region.box) * [width, height, width, height]
            half = (x1 + x2) / 2
            mask = [[x1, y1, half, y1, half, y2, x1, y2]] if found else None
            found.append(
                Query(
                    f"{record.id}#{index}",
                    record.id,
                    "t",
                    boxes=(region.box,),
                    segmentation=mask,
                    image_hw=(height, width),
                )
            )
    return found


@pytest.fixture(scope="module")
def sets(test_scenes, queries):
    """A set per kind of region features, rows named after it."""
    return [
        QuerySet(
            kind,
            "label",
            "cloc",
            test_scenes,
            [
                pair(replace(query, id=f"{kind}/{query.id}", task=kind), labels=["x"])
                for query in queries
            ],
            candidates=Candidates("class_names", NAMES),
            region_features=kind,
        )
        for kind in KINDS
    ]


@pytest.fixture(scope="module")
def rows(tiny_cloc, character_tokenizer, sets):
    settings = ClocSettings("tiny", batch_size=3, templates="none")
    return predict_cloc(tiny_cloc, character_tokenizer, sets, settings)


def embed(model, record, query, kind):
    """One region's feature, from a batch of one image."""
    image = record.load_image()
    pixels, transform = Preprocessing(64)(image)
    if kind == "crop":
        x1, y1, x2, y2 = query.boxes[0]
        left, top = int(np.floor(x1 * image.width)), int(np.floor(y1 * image.height))
        right, bottom = int(np.ceil(x2 * image.width)), int(np.ceil(y2 * image.height))
        part = Image.fromarray(np.asarray(image)[top:bottom, left:right])
        return model.encode_image(Preprocessing(64)(part)[0][None]).image_features
    features = model.encode_image(pixels[None])
    canvas = transform.to_canvas(Boxes.normalized(query.boxes)).xyxy.float()
    if kind == "cloc":
        return model.embed_boxes(features, canvas, NO_INDEX)
    tokens = features.tokens @ model.vision.encoder.visual.proj
    if kind == "roi_align":
        return roi_align_tokens(tokens, features.grid_hw, canvas, NO_INDEX)
    return pool_by_hand(tokens[0], canvas[0], transform, query)


def pool_by_hand(tokens, canvas, transform, query):
    """Mean of 4 x 4 tokens of 16 pixels by how many pixels of the shape each holds."""
    if query.segmentation is None:
        shape = torch.zeros(640, 640)
        x1, y1, x2, y2 = (640 * canvas).round().int().tolist()
        shape[y1:y2, x1:x2] = 1
    else:
        shape = transform.mask_to_canvas(
            torch.from_numpy(decode_mask(query.segmentation, query.image_hw))
        )
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
@pytest.mark.parametrize("kind", KINDS)
def test_each_box_is_named_by_its_own_feature(
    tiny_cloc, character_tokenizer, test_scenes, queries, rows, kind
):
    records = {record.id: record for record in test_scenes}
    classes = class_embeddings(tiny_cloc, character_tokenizer, NAMES, "none")
    actual = {row.id: row for row in rows if row.task == kind}
    assert list(actual) == [f"{kind}/{query.id}" for query in queries]
    for query in queries:
        z = embed(tiny_cloc, records[query.image_id], query, kind)
        best = (F.normalize(z, dim=-1) @ classes.T)[0].topk(10)
        row = actual[f"{kind}/{query.id}"]
        # scores are rounded to 4 digits; a box painted on pixels is up to half a pixel off
        torch.testing.assert_close(torch.tensor(row.scores), best.values, atol=1e-3, rtol=0)
        assert row.labels[0] in [NAMES[i] for i in best.indices[:2]]


def test_rows_say_how_they_were_made(rows, queries):
    assert len(rows) == 4 * len(queries)
    assert {row.model for row in rows} == {"tiny"}
    pooled_under = [row.settings["mask"] for row in rows if row.task == "mask"]
    assert pooled_under == ["box", *["segmentation"] * (len(queries) - 1)]
    crop = next(row for row in rows if row.task == "crop")
    assert crop.settings == {
        "region_features": "crop",
        "image_size": 64,
        "precision": "fp32",
        "region_prompt": "box",
        "templates": "none",
    }


def test_features_differ_and_batch_size_does_not(
    tiny_cloc, character_tokenizer, sets, queries, rows
):
    settings = ClocSettings(batch_size=1, templates="none")
    other = predict_cloc(tiny_cloc, character_tokenizer, sets, settings)
    expected = {row.id: row.scores for row in rows}
    for row in other:
        assert row.scores == pytest.approx(expected[row.id], abs=2e-4)
    last = queries[-1].id
    assert len({tuple(expected[f"{kind}/{last}"]) for kind in KINDS}) == 4


@pytest.mark.parametrize("prompter", ["roi_align", "none"])
def test_a_tower_without_prompter_answers_too(character_tokenizer, sets, queries, prompter):
    model = build_tiny_cloc(character_tokenizer, prompter)
    rows = predict_cloc(model, character_tokenizer, sets, ClocSettings())
    assert len(rows) == 4 * len(queries)


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
    mask = decode_mask(segmentation, (5, 10))
    assert (None if mask is None else mask.sum()) == pixels
    assert mask is None or mask.shape == (5, 10)


@pytest.fixture(scope="module")
def phrases(test_scenes):
    """Two phrases on every scene but the first, which has none."""
    queries = [
        Query(f"{record.id}/{text}", record.id, "phrase_grounding", text=text)
        for record in test_scenes[1:]
        for text in ("a crab", "clock")
    ]
    pairs = [pair(query, labels=[query.text]) for query in queries]
    return QuerySet("phrase_grounding", "ranked_boxes", "cloc", test_scenes, pairs)


@pytest.fixture(scope="module")
def ranked(tiny_cloc, character_tokenizer, phrases):
    settings = ClocSettings("tiny", batch_size=3)
    return predict_cloc(tiny_cloc, character_tokenizer, [phrases], settings)


@torch.no_grad()
def test_the_first_box_is_cloc_s_own_and_the_others_are_its_proposals(
    tiny_cloc, character_tokenizer, test_scenes, phrases, ranked
):
    records = {record.id: record for record in test_scenes}
    assert [row.id for row in ranked] == [query.id for query in phrases.queries]
    for query, row in zip(phrases.queries, ranked, strict=True):
        pixels, transform = Preprocessing(64)(records[query.image_id].load_image())
        image = tiny_cloc.encode_image(pixels[None])
        text = tiny_cloc.encode_text(character_tokenizer([query.text]))
        canvas = tiny_cloc.locate(image, text, NO_INDEX)
        first = transform.to_original(Boxes(canvas, CANVAS)).xyxy.clamp(0, 1)
        torch.testing.assert_close(torch.tensor(row.boxes[:1]), first)
        z = tiny_cloc.embed_boxes(image, canvas, NO_INDEX)
        assert row.confidence == pytest.approx(F.cosine_similarity(z, text).item(), abs=1e-4)
        _, proposals = tiny_cloc.vision.read_tokens(image)
        known = transform.to_original(Boxes(proposals[0], CANVAS)).xyxy.clamp(0, 1)
        for box in row.boxes[1:]:
            assert (known - torch.tensor(box)).abs().amax(1).min() < 1e-5
        assert 1 <= len(row.boxes) <= 10


def test_without_a_prompter_there_is_one_box(character_tokenizer, phrases):
    model = build_tiny_cloc(character_tokenizer, "none")
    rows = predict_cloc(model, character_tokenizer, [phrases], ClocSettings())
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
    assert rank_boxes(first, others, limit=3) == expected[:3]
    assert rank_boxes(first, [], limit=3) == [first]
