"""Every way to bring a picture to the canvas: pixels, boxes and masks move together, and back."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

from cloc_mllm.data.collate import ClocCollator
from cloc_mllm.data.records import Record, Region
from cloc_mllm.data.tokenizer import load_text_tokenizer
from cloc_mllm.data.transforms import CLIP_MEAN, Preprocessing
from cloc_mllm.geometry import CANVAS, Boxes, CanvasTransform, Resize
from cloc_mllm.mllm.views import image_views

SIDE = 96
RESIZES: tuple[Resize, ...] = ("letterbox", "squash")
SIZES = [(300, 200), (200, 300), (97, 96), (640, 61), (31, 500), (96, 96), (1, 7)]
CASES = list(itertools.product(RESIZES, SIZES, (False, True)))


def _painted(wh: tuple[int, int], box_px: list[int]) -> Image.Image:
    picture = Image.new("RGB", wh, (0, 0, 0))
    picture.paste((255, 255, 255), tuple(box_px))  # type: ignore[call-overload]
    return picture


def _found(canvas: torch.Tensor) -> list[float]:
    """The box around what is at least half white, from 0 to 1 of the canvas."""
    rows, columns = (canvas.float().mean(0) > 127).nonzero(as_tuple=True)
    box = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
    return [value / canvas.shape[-1] for value in box]


@pytest.mark.parametrize(("resize", "wh", "flip"), CASES)
def test_a_painted_square_is_found_where_its_box_is(
    resize: Resize, wh: tuple[int, int], flip: bool
) -> None:
    width, height = wh
    box_px = [width // 5, height // 3, math.ceil(width * 0.6), math.ceil(height * 0.9)]
    preprocessing = Preprocessing(SIDE, resize, padding_rgb=(0, 0, 0))
    transform = preprocessing.transform(*wh, flip=flip)
    canvas = preprocessing.canvas(_painted(wh, box_px), transform)
    moved = transform.to_canvas(Boxes.pixels([box_px], *wh)).xyxy[0].tolist()
    assert _found(canvas) == pytest.approx(moved, abs=0.75 / SIDE)
    mask = torch.zeros(height, width)
    mask[box_px[1] : box_px[3], box_px[0] : box_px[2]] = 1
    # a mask keeps every pixel that it touches
    assert _found(255 * transform.mask_to_canvas(mask)[None]) == pytest.approx(moved, abs=1 / SIDE)


@pytest.mark.parametrize(("resize", "wh", "flip"), CASES)
def test_boxes_come_back(resize: Resize, wh: tuple[int, int], flip: bool) -> None:
    boxes = torch.rand(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    transform = CanvasTransform(*wh, SIDE, flip, resize)
    there = transform.to_canvas(Boxes.normalized(boxes))
    back = transform.to_original(Boxes(there.xyxy, CANVAS))
    torch.testing.assert_close(back.xyxy, boxes)
    if resize == "squash" and not flip:
        assert torch.equal(there.xyxy, boxes)


@pytest.mark.parametrize("resize", RESIZES)
def test_a_square_is_found_on_the_tile_that_shows_it(resize: Resize) -> None:
    wh, box_px = (400, 260), [240, 30, 280, 90]
    preprocessing = Preprocessing(SIDE, resize, padding_rgb=(0, 0, 0))
    picture, box = _painted(wh, box_px), Boxes.pixels([box_px], *wh)
    views = image_views(wh, SIDE, 6, resize)
    assert len(views) == 7
    for view in views:
        on_canvas = view.to_canvas(box).xyxy[0]
        if ((on_canvas < 0) | (on_canvas > 1)).any():
            continue
        canvas = preprocessing.canvas(view.crop(picture), view.transform)
        assert _found(canvas) == pytest.approx(on_canvas.tolist(), abs=0.75 / SIDE)
        left, top, right, bottom = view.frame()[0].tolist()
        original = [
            left + float(on_canvas[0]) * (right - left),
            top + float(on_canvas[1]) * (bottom - top),
        ]
        assert original == pytest.approx([240 / 400, 30 / 260])


def test_it_normalises_as_it_says() -> None:
    picture = Image.new("RGB", (10, 20), (51, 102, 204))
    own = Preprocessing(8, "squash", mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    pixels, _ = own(picture)
    expected = torch.tensor([(0.2 - 0.1) / 0.5, (0.4 - 0.2) / 1.0, (0.8 - 0.3) / 2.0])
    torch.testing.assert_close(pixels, expected[:, None, None].expand(3, 8, 8))
    padded, _ = Preprocessing(8, padding_rgb=(255, 0, 0), mean=(0, 0, 0), std=(1, 1, 1))(picture)
    assert padded[:, 0, 0].tolist() == [1, 0, 0]  # left of the upright picture


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
def test_it_resizes_with_pillows_kernel(interpolation: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    picture = Image.fromarray(noise)
    own = Preprocessing(16, "squash", interpolation)  # type: ignore[arg-type]
    actual = own.canvas(picture, own.transform(70, 50))
    expected = picture.resize((16, 16), Image.Resampling[interpolation.upper()])
    assert torch.equal(actual, torch.from_numpy(np.array(expected)).permute(2, 0, 1))


@pytest.mark.parametrize(
    "change",
    [
        {"mean": (0.5, 0.5, 0.5)},
        {"std": (0.5, 0.5, 0.5)},
        {"resize": "squash"},
        {"interpolation": "bilinear"},
        {"padding_rgb": (0, 0, 0)},
        {"size": 65},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_is_in_the_fingerprint(change: dict[str, object]) -> None:
    tokenizer = load_text_tokenizer("builtin", 24)
    first = Preprocessing(64)
    other = dataclasses.replace(first, **change)  # type: ignore[arg-type]
    assert first.fingerprint(tokenizer) != other.fingerprint(tokenizer)


def test_wrong_numbers_are_named() -> None:
    with pytest.raises(ValueError, match=r"preprocess.mean is \[0.5\]; expected three numbers"):
        Preprocessing(8, mean=(0.5,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"preprocess.std is \[1, 0, 1\]; .*above 0"):
        Preprocessing(8, std=(1, 0, 1))


@pytest.mark.parametrize("resize", RESIZES)
def test_a_batch_is_what_the_model_would_see(resize: Resize) -> None:
    """Also of a long JPEG, which may be decoded smaller, but never smaller than the canvas."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 160, 3), np.uint8)
    picture = Image.fromarray(noise).resize((1600, 120), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95)
    record = Record(
        "a", file.getvalue(), 1600, 120, ["noise"], [Region((0.1, 0.2, 0.5, 0.7), "it")], "test"
    )
    own = Preprocessing(64, resize, mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7))
    batch = ClocCollator(load_text_tokenizer("builtin", 24), own)([(0, record)])
    assert batch.pixel_values.dtype == torch.uint8
    pixels = batch.to("cpu").pixel_values
    expected, transform = own(record.load_image())
    assert (pixels[0] - expected).abs().mean() < 0.05  # 0 or a reduced decode's grey levels
    boxes = transform.to_canvas(Boxes.normalized([[0.1, 0.2, 0.5, 0.7]]))
    torch.testing.assert_close(batch.boxes, boxes.xyxy.float())
    assert transform.wanted_side == (64 if resize == "letterbox" else 854)


def test_clips_numbers_are_the_default() -> None:
    assert Preprocessing(64).mean == CLIP_MEAN
    assert Preprocessing(64).pixel_fingerprint() == {
        "image_size": 64,
        "resize": "long side, bicubic, centred padding",
        "padding_rgb": "(124, 116, 104)",
        "pixel_mean": "(0.48145466, 0.4578275, 0.40821073)",
        "pixel_std": "(0.26862954, 0.26130258, 0.27577711)",
    }
