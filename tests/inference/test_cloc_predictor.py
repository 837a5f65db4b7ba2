"""Encode once, prompt many."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cloc_mllm.data.tokenizer import load_text_tokenizer
from cloc_mllm.data.transforms import Preprocessing
from cloc_mllm.geometry import Boxes, CanvasTransform
from cloc_mllm.inference.cloc_predictor import ClocPredictor
from cloc_mllm.inference.inputs import EncodedImage
from cloc_mllm.models.build import build_cloc, save_cloc
from cloc_mllm.models.region_encoders.prompter import Prompter
from tests.models.tiny import tiny_cloc, tiny_config
from tests.photos import encoded

NAMES = ["a crab", "a clock", "a key"]


@pytest.fixture(scope="module")
def predictor() -> ClocPredictor:
    return ClocPredictor(tiny_cloc(), load_text_tokenizer("builtin", 24))


def _picture(width: int = 90, height: int = 60) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    image.paste((200, 30, 30), (10, 10, 40, 40))
    return image


def test_phrases_are_located(predictor: ClocPredictor) -> None:
    picture = _picture()
    result = predictor.locate(picture, ["a crab", "the clock"])
    assert result.image is picture and result.boxes.image_wh == (90, 60)
    assert (result.labels, result.text) == (["a crab", "the clock"], ["", ""])
    assert (result.failures, result.query_index.tolist()) == ([None, None], [0, 1])
    assert ((result.boxes.xyxy >= 0) & (result.boxes.xyxy <= 1)).all()
    assert (result.scores.abs() <= 1.0001).all()
    alone = predictor.locate(picture, "the clock")
    torch.testing.assert_close(alone.boxes.xyxy, result[1].boxes.xyxy)


def test_regions_get_the_most_probable_name(predictor: ClocPredictor) -> None:
    boxes = Boxes.pixels([[10, 10, 40, 40], [0, 0, 90, 60]], 90, 60)
    result = predictor.classify(_picture(), boxes, NAMES)
    torch.testing.assert_close(result.probabilities.sum(1), torch.ones(2))
    assert result.labels == [NAMES[i] for i in result.probabilities.argmax(1).tolist()]
    assert torch.equal(result.scores, result.probabilities.amax(1))
    torch.testing.assert_close(result.boxes.to_pixels().xyxy, boxes.xyxy)
    assert torch.equal(result[1].probabilities, result.probabilities[1:])


def test_an_encoded_image_is_not_encoded_again(
    predictor: ClocPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes = Boxes.normalized([[0, 0, 0.5, 1]])
    expected = [predictor.locate(_picture(), NAMES), predictor.classify(_picture(), boxes, NAMES)]
    image = predictor.encode(_picture())
    monkeypatch.setattr(predictor.model, "encode_image", None)
    actual = [predictor.locate(image, NAMES), predictor.classify(image, boxes, NAMES)]
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.scores, other.scores)
        assert torch.equal(one.boxes.xyxy, other.boxes.xyxy)
    assert predictor.encode(image) is image
    other_model = ClocPredictor(tiny_cloc(), predictor.tokenizer)
    with pytest.raises(ValueError, match="encoded by another model"):
        other_model.locate(image, NAMES)


def test_images_and_texts_are_embedded_as_clip_does(
    predictor: ClocPredictor, tmp_path: Path
) -> None:
    _picture().save(tmp_path / "p.png")
    pictures = [_picture(), _picture(40, 80)]
    size = predictor.model.vision.encoder.image_size
    pixels = torch.stack([Preprocessing(size)(picture)[0] for picture in pictures])
    with torch.no_grad():
        features = predictor.model.encode_image(pixels).image_features
        texts = predictor.model.encode_text(predictor.tokenizer(NAMES))
    actual = predictor.embed_image(pictures)
    torch.testing.assert_close(actual, F.normalize(features, dim=-1))
    torch.testing.assert_close(predictor.embed_text(NAMES), F.normalize(texts, dim=-1))
    torch.testing.assert_close(predictor.embed_image(str(tmp_path / "p.png")), actual[:1])
    torch.testing.assert_close(predictor.embed_text(NAMES[0]), predictor.embed_text(NAMES)[:1])
    assert predictor.embed_image([]).shape == (0, actual.shape[1])


def test_regions_are_embedded_in_any_frame_and_clipped(predictor: ClocPredictor) -> None:
    boxes = Boxes.pixels([[10, 10, 40, 40], [0, 0, 90, 60]], 90, 60)
    embedded = predictor.embed_regions(_picture(), boxes)
    torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(2))
    for same in (boxes.to_normalized(), boxes.to_normalized().xyxy.tolist()):
        torch.testing.assert_close(predictor.embed_regions(_picture(), same), embedded)
    reaching_out = Boxes.pixels([[-20, -5, 200, 100]], 90, 60)
    torch.testing.assert_close(predictor.embed_regions(_picture(), reaching_out), embedded[1:])
    with pytest.raises(ValueError, match="inverted"):
        predictor.embed_regions(_picture(), [[0.5, 0, 0.1, 1]])


def test_what_prompts_share_is_computed_once(
    predictor: ClocPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, box = _picture(), Boxes.normalized([[0.1, 0.2, 0.6, 0.9]])
    features = predictor._encode_pictures([picture])
    unprepared = EncodedImage(picture, features, predictor._encoder)
    expected = predictor.locate(unprepared, NAMES), predictor.embed_regions(unprepared, box)
    computed = []
    for name in ("prepare", "_readouts"):
        whole = getattr(Prompter, name)
        monkeypatch.setattr(
            Prompter, name, lambda *a, w=whole, n=name: (computed.append(n), w(*a))[1]
        )
    encoded = predictor.encode(picture)
    actual = predictor.locate(encoded, NAMES), predictor.embed_regions(encoded, box)
    assert computed == ["prepare", "_readouts"]
    torch.testing.assert_close(actual[0].boxes.xyxy, expected[0].boxes.xyxy)
    torch.testing.assert_close(actual[0].scores, expected[0].scores)
    torch.testing.assert_close(actual[1], expected[1])


def test_texts_are_encoded_once_while_they_are_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    predictor = ClocPredictor(tiny_cloc(), load_text_tokenizer("builtin", 24))
    image = predictor.encode(_picture())
    expected = predictor.locate(image, NAMES), predictor.embed_text(["a crab"])
    with monkeypatch.context() as patch:
        patch.setattr(predictor.model, "encode_text", None)
        actual = predictor.locate(image, NAMES), predictor.embed_text(["a crab"])
    assert torch.equal(actual[0].boxes.xyxy, expected[0].boxes.xyxy)
    assert torch.equal(actual[1], expected[1])
    long = [f"crab {index}" for index in range(300)]
    for number in range(40):
        predictor.embed_text([f"a crab {number}"])
        predictor.embed_text(long)
    assert len(predictor._known_texts) == 32 and tuple(long) not in predictor._known_texts


def test_pooling_equals_a_plain_clips() -> None:
    clip = ClocPredictor(tiny_cloc(kind="none"), load_text_tokenizer("builtin", 24))
    picture, boxes = _picture(), Boxes.normalized([[0.1, 0.2, 0.6, 0.9], [0.0, 0.0, 1.0, 1.0]])
    expected = clip.embed_regions(picture, boxes)
    torch.testing.assert_close(clip.pool_regions(picture, boxes, "mean"), expected)
    aligned = clip.pool_regions(picture, boxes, "roi_align")
    torch.testing.assert_close(aligned.norm(dim=-1), torch.ones(2))
    assert not torch.allclose(aligned, expected)


@pytest.mark.parametrize("kind", ["prompter", "roi_align", "none"])
def test_a_phrase_is_compared_with_every_place(kind: str) -> None:
    predictor = ClocPredictor(tiny_cloc(kind=kind), load_text_tokenizer("builtin", 24))
    side = predictor._encoder.preprocessing.size
    encoded = predictor.encode(_picture(side, side // 2))  # half of the canvas, in its middle
    actual = predictor.similarity_map(encoded, "a crab")
    assert actual.shape == (side // 2, side)
    encoder, texts = predictor.model.vision.region_encoder, predictor._encode_text(["a crab"])
    with torch.inference_mode():
        cosines = encoder.similarity(encoded.features, texts)
    grid = cosines.view(1, 1, *encoded.features.grid_hw)
    canvas = F.interpolate(grid, (side, side), mode="bilinear", align_corners=False)[0, 0]
    expected = canvas[side // 4 : side // 4 + side // 2]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_points_and_masks_are_embedded_under_their_mask() -> None:
    config = tiny_config()
    config = replace(config, prompter=replace(config.prompter, free_form=True))
    torch.manual_seed(0)
    predictor = ClocPredictor(build_cloc(config), load_text_tokenizer("builtin", 24))
    mask = torch.zeros(60, 90, dtype=torch.bool)
    mask[10:40, 10:25] = True
    box, point = [0.1, 0.2, 0.5, 0.9], [0.5, 0.5]

    actual = predictor.embed_regions(_picture(), [mask.numpy(), box, point])

    transform = CanvasTransform(90, 60, predictor.model.vision.encoder.image_size)
    drawn = torch.zeros(60, 90)
    drawn[30, 45] = 1
    canvas = torch.stack([transform.mask_to_canvas(m) for m in (mask, drawn)])
    image = predictor.encode(_picture())
    with torch.no_grad():
        z = predictor.model.vision.embed_masks(image.features, canvas, torch.zeros(2).long())
    torch.testing.assert_close(actual[[0, 2]], F.normalize(z, dim=-1))
    torch.testing.assert_close(actual[1:2], predictor.embed_regions(image, [box]))
    with pytest.raises(ValueError, match="mask is empty"):
        predictor.embed_regions(image, [torch.zeros(60, 90)])
    boxes = predictor.classify(image, [mask, point], NAMES).boxes
    assert boxes.to_pixels().xyxy.round().tolist() == [[10, 10, 25, 40], [45, 30, 46, 31]]


def test_a_photo_with_an_exif_orientation_is_turned(
    predictor: ClocPredictor, tmp_path: Path
) -> None:
    boxes = Boxes.pixels([[10, 10, 40, 40]], 90, 60)
    expected = predictor.embed_regions(_picture(), boxes)
    data = encoded(_picture(), orientation=8)
    (tmp_path / "photo.png").write_bytes(data)
    photo = Image.open(io.BytesIO(data))
    for source in (photo, data, tmp_path / "photo.png", np.asarray(_picture())):
        assert torch.equal(predictor.embed_regions(source, boxes), expected)
    with pytest.raises(ValueError, match=r"pixels of a 60 x 90 picture, but the upright one is 90"):
        predictor.embed_regions(photo, Boxes.pixels([[1, 1, 2, 2]], *photo.size))


def test_wrong_use_says_what_to_do(predictor: ClocPredictor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one name"):
        predictor.classify(_picture(), Boxes.normalized([[0, 0, 1, 1]]), [])
    with pytest.raises(FileNotFoundError, match="no CLOC model directory"):
        ClocPredictor.from_pretrained(tmp_path)


def test_from_a_saved_directory_and_a_file(tmp_path: Path) -> None:
    config = tiny_config()
    save_cloc(build_cloc(config), tmp_path / "m", config, load_text_tokenizer("builtin", 24))
    _picture().save(tmp_path / "p.png")
    predictor = ClocPredictor.from_pretrained(tmp_path / "m")
    assert len(predictor.locate(tmp_path / "p.png", ["a crab"]).boxes) == 1
