from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from cloc_mllm.config import ConversationConfig
from cloc_mllm.geometry import Boxes
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.mllm import ClocMllmForConditionalGeneration, build_mllm, merge_and_save
from cloc_mllm.mllm.collate import ConversationCollator
from cloc_mllm.mllm.views import image_views, sharpest_view, tile_grid


@pytest.mark.parametrize(
    ("width", "height", "max_tiles", "expected"),
    [
        pytest.param(100, 80, 4, (1, 1), id="no larger than the canvas"),
        pytest.param(200, 200, 0, (1, 1), id="switched off"),
        pytest.param(200, 200, 4, (2, 2), id="square"),
        pytest.param(200, 200, 9, (2, 2), id="never above the picture's own resolution"),
        pytest.param(200, 200, 3, (1, 1), id="three strips show a square no larger"),
        pytest.param(400, 100, 4, (4, 1), id="wide"),
        pytest.param(100, 1000, 4, (1, 4), id="tall"),
        pytest.param(300, 200, 6, (3, 2), id="a tile a canvas"),
        pytest.param(1, 500, 6, (1, 5), id="one pixel wide"),
    ],
)
def test_the_grid_shows_the_picture_largest_with_the_fewest_tiles(
    width, height, max_tiles, expected
):
    assert tile_grid(width, height, 100, max_tiles) == expected


def test_tiles_part_the_picture_after_the_whole_image():
    views = image_views((301, 203), 100, 6)
    seen = np.zeros((203, 301), int)
    for view in views[1:]:
        left, top, right, bottom = view.crop_px
        seen[top:bottom, left:right] += 1
    assert views[0].crop_px == (0, 0, 301, 203) and len(views) == 7
    assert (seen == 1).all()


@pytest.mark.parametrize("size", [(640, 480), (333, 517), (1000, 90)], ids=str)
def test_a_painted_box_is_found_on_the_canvas_of_its_view(size):
    image = Image.new("RGB", size)
    box_px = (int(size[0] * 0.55), int(size[1] * 0.6), int(size[0] * 0.7), int(size[1] * 0.9))
    image.paste((255, 255, 255), box_px)
    box = Boxes.pixels([box_px], *size)
    views = image_views(size, 128, 6)
    for index in (0, sharpest_view(views, box.to_normalized().xyxy[0].tolist())):
        view = views[index]
        canvas = np.asarray(view.transform.apply(view.crop(image), (0, 0, 0)))[..., 0]
        ys, xs = (canvas > 127).nonzero()
        actual = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / 128
        expected = view.to_canvas(box).xyxy[0].clamp(0, 1)
        assert (actual - expected).abs().max() <= 1 / 128  # one pixel of the canvas


def test_the_frame_takes_canvas_boxes_back_to_the_original_image():
    for view in image_views((640, 333), 128, 6):
        box = Boxes.normalized([[0.1, 0.2, 0.35, 0.9]])
        canvas, frame = view.to_canvas(box).xyxy[0], view.frame()[0].double()
        size = (frame[2:] - frame[:2]).repeat(2)
        actual = frame[:2].repeat(2) + canvas * size
        torch.testing.assert_close(actual, box.xyxy[0], atol=1e-6, rtol=0)  # frames are float32


def test_a_region_goes_to_the_tile_that_holds_it_whole():
    views = image_views((400, 400), 200, 4)
    assert sharpest_view(views, (0.6, 0.1, 0.9, 0.4)) == 2
    assert sharpest_view(views, (0.4, 0.1, 0.6, 0.4)) == 0
    assert views[2].crop_px == (200, 0, 400, 200)


@pytest.fixture
def tiled(mllm_config):
    mllm_config.max_tiles = 4
    model, processor = build_mllm(mllm_config)
    return model.eval(), processor


def test_every_view_is_a_block_of_tokens_with_its_place(tiled):
    model, processor = tiled
    small, large = Image.new("RGB", (60, 40), "teal"), Image.effect_noise((128, 64), 90)
    box, across = [0.55, 0.1, 0.9, 0.9], [0.4, 0.1, 0.6, 0.9]
    texts = ["<image>a", "<image>b <region> <region>"]

    inputs = processor([small, large.convert("RGB")], texts, [None, [box, across]])

    num_tokens = (inputs["input_ids"] == processor.image_token_id).sum(1)
    assert num_tokens.tolist() == [16, 3 * 16] and len(inputs["pixel_values"]) == 4
    assert inputs["image_index"].tolist() == [0, 1, 2, 3]
    expected = torch.tensor([[0.0, -0.5, 1.0, 1.5], [0, 0, 0.5, 1], [0.5, 0, 1, 1]])
    torch.testing.assert_close(inputs["image_frame"][1:], expected)
    assert inputs["region_image_index"].tolist() == [3, 1]  # the right tile; the whole image
    torch.testing.assert_close(inputs["region_boxes"][0], torch.tensor([0.1, 0.1, 0.8, 0.9]))
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


def test_a_batch_of_views_answers_as_one_by_one(tiled, tmp_path):
    merge_and_save(*tiled, tmp_path)
    predictor = GroundingPredictor.from_pretrained(tmp_path, device="cpu")
    picture = Image.effect_noise((150, 64), 90).convert("RGB")
    phrases = ["crab", "a red apple", "the second boat from the left"]

    together = predictor.ground(picture, phrases)

    assert predictor.processor.max_tiles == 4
    apart = [predictor.ground(picture, phrase) for phrase in phrases]
    assert together.text == [one.text[0] for one in apart]
    assert predictor.ground(predictor.encode(picture), phrases).text == together.text


def test_training_rows_have_the_tokens_of_all_views(tiled, tiny_scenes):
    _, processor = tiled
    collator = ConversationCollator(processor, ConversationConfig(max_length=2000))
    record = replace(tiny_scenes[0], **scaled(tiny_scenes[0], 128))

    batch = collator([(0, record), (1, tiny_scenes[1])])

    blocks = (batch.inputs["input_ids"] == processor.image_token_id).sum() / 16
    assert blocks == len(batch.inputs["image_index"]) > 2


def scaled(record, long_side):
    image = record.load_image()
    scale = long_side / max(image.size)
    size = tuple(round(side * scale) for side in image.size)
    data = BytesIO()
    image.resize(size).save(data, "PNG")
    return {"image": data.getvalue(), "width": size[0], "height": size[1]}


def test_tiles_are_part_of_the_fingerprint(tiled, mllm_dir):
    _, processor = tiled
    plain = ClocMllmForConditionalGeneration.from_pretrained(mllm_dir)

    with pytest.raises(ValueError, match="max_tiles"):
        GroundingPredictor(plain, processor)
