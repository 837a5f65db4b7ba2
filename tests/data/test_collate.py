"""Records to packed batches."""

from __future__ import annotations

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from cloc_mllm.data.collate import ClocCollator, log_prior_of_texts
from cloc_mllm.data.records import Record, Region
from cloc_mllm.data.tokenizer import load_text_tokenizer
from cloc_mllm.data.transforms import CLIP_MEAN, CLIP_STD, Preprocessing
from cloc_mllm.geometry import CanvasTransform


@pytest.fixture(scope="module")
def collator() -> ClocCollator:
    return ClocCollator(load_text_tokenizer("builtin", 24), Preprocessing(64), regions_per_image=2)


def _items(records: list[Record]) -> list[tuple[int, Record]]:
    return list(enumerate(records))


def test_regions_are_packed_and_phrases_encoded_once(
    collator: ClocCollator, tiny_scenes: list[Record]
) -> None:
    batch = collator(_items(tiny_scenes))
    assert batch.pixel_values.shape == (16, 3, 64, 64)
    assert len(batch.boxes) == len(batch.region_image_index) == len(batch.region_phrase_index)
    assert torch.bincount(batch.region_image_index, minlength=16).max() <= 2
    phrases = {tuple(row) for row in batch.phrase_input_ids.tolist()}
    assert len(phrases) == len(batch.phrase_input_ids)
    assert batch.region_phrase_index.max() < len(batch.phrase_input_ids)
    assert batch.ids == [record.id for record in tiny_scenes]


def test_a_sample_is_the_same_wherever_it_stands(
    collator: ClocCollator, tiny_scenes: list[Record]
) -> None:
    items = _items(tiny_scenes)
    together, alone = collator(items), collator(items[5:6])
    mine = together.region_image_index == 5
    assert torch.equal(together.boxes[mine], alone.boxes)
    assert torch.equal(together.pixel_values[5], alone.pixel_values[0])


def test_images_without_regions_or_captions(
    collator: ClocCollator, tiny_scenes: list[Record]
) -> None:
    bare = dataclasses.replace(tiny_scenes[0], regions=[], captions=[])
    batch = collator([(0, bare)])
    assert batch.boxes.shape == (0, 4) and batch.phrase_input_ids.shape[0] == 0
    assert batch.caption_input_ids.shape[0] == 0 and batch.caption_image_index.tolist() == []


def test_flip_moves_pixels_and_boxes_together(tiny_scenes: list[Record]) -> None:
    tokenizer = load_text_tokenizer("builtin", 24)
    plain = ClocCollator(tokenizer, Preprocessing(64), regions_per_image=0)
    flipping = ClocCollator(tokenizer, Preprocessing(64), regions_per_image=0, flip=True)
    seeds = [seed for seed in range(8) if np.random.default_rng(seed).random() < 0.5]
    item = [(seeds[0], tiny_scenes[0])]
    straight, mirrored = plain(item), flipping(item)
    torch.testing.assert_close(mirrored.pixel_values, straight.pixel_values.flip(-1))
    torch.testing.assert_close(mirrored.boxes[:, 0], 1 - straight.boxes[:, 2])


def test_a_region_is_paired_with_any_of_its_texts() -> None:
    encoded = io.BytesIO()
    Image.new("RGB", (64, 64)).save(encoded, "PNG")
    regions = [
        Region((0.0, 0.0, 0.5, 1.0), "A man", expressions=["a man", "the left man"]),
        Region((0.5, 0.0, 1.0, 1.0), "a man", expressions=["a tall one"]),
    ]
    record = Record("two", encoded.getvalue(), 64, 64, [], regions, "test")
    seen = []

    def tokenizer(texts: list[str]) -> torch.Tensor:
        seen.append(texts)
        return torch.zeros(len(texts), 1, dtype=torch.long)

    for texts, expected in (
        ("phrase", {("a man",)}),
        (
            "all",
            {("a man",), ("a man", "a tall one"), ("the left man", "a man")}
            | {("the left man", "a tall one")},
        ),
    ):
        collator = ClocCollator(tokenizer, Preprocessing(64), region_texts=texts)  # type: ignore[arg-type]
        seen.clear()
        batches = [collator([(seed, record)]) for seed in range(32)]
        assert {tuple(phrases) for phrases in seen[1::2]} == expected
        for batch, phrases in zip(batches, seen[1::2], strict=True):
            named_by_each = [2 if phrases[i] == "a man" else 1 for i in batch.region_phrase_index]
            counts = torch.bincount(batch.phrase_box_region, minlength=2).tolist()
            assert counts == named_by_each
            for region, box in enumerate(batch.boxes):
                own = batch.phrase_boxes[batch.phrase_box_region == region]
                assert (own == box).all(1).any()


def test_pixels_are_normalised_as_clip_does(collator: ClocCollator) -> None:
    encoded = io.BytesIO()
    Image.new("RGB", (64, 64), (255, 0, 51)).save(encoded, "PNG")
    record = Record("p", encoded.getvalue(), 64, 64, ["a wall"], [], "test")
    pixel = collator([(0, record)]).to("cpu").pixel_values[0, :, 0, 0]
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(pixel, expected)


def test_training_sees_the_pixels_of_evaluation(
    collator: ClocCollator, tiny_scenes: list[Record]
) -> None:
    batch = collator(_items(tiny_scenes))
    assert batch.pixel_values.dtype == torch.uint8
    actual = batch.to("cpu").to("cpu")  # moving a batch again normalises nothing twice
    expected = torch.stack([Preprocessing(64)(r.load_image())[0] for r in tiny_scenes])
    assert torch.equal(actual.pixel_values, expected)


@pytest.mark.gpu
def test_pinned_pixels_are_normalised_on_the_gpu(
    collator: ClocCollator, tiny_scenes: list[Record]
) -> None:
    batch = collator(_items(tiny_scenes))
    pinned = batch.pin_memory()
    assert pinned.pixel_values.is_pinned() and pinned.ids == batch.ids
    on_gpu = pinned.to("cuda")
    assert on_gpu.pixel_values.is_cuda
    torch.testing.assert_close(on_gpu.pixel_values.cpu(), batch.to("cpu").pixel_values)


@pytest.mark.parametrize("tag", [1, 3, 6, 8], ids=["upright", "180", "90", "270"])
@pytest.mark.parametrize("wh", [(640, 480), (643, 477)], ids=["even", "odd"])
def test_boxes_stay_exact_where_a_jpeg_is_decoded_smaller(wh: tuple[int, int], tag: int) -> None:
    """A white rectangle on black: its edges lie where the full decode has them, and
    `test_geometry` finds the box there. Measured: 0.03 canvas pixels apart; 0.2 where the column
    or row that the decoder fills up counts as whole."""
    upright = Image.new("RGB", wh)
    upright.paste("white", (401, 303, *wh))
    turn = {1: None, 3: "ROTATE_180", 6: "ROTATE_90", 8: "ROTATE_270"}[tag]
    stored = upright.transpose(Image.Transpose[turn]) if turn else upright
    exif = Image.Exif()
    exif[0x0112] = tag
    file = io.BytesIO()
    stored.save(file, "JPEG", quality=95, exif=exif)
    record = Record("r", file.getvalue(), *wh, [], [], "test")
    actual, expected = (
        CanvasTransform(*wh, 64).apply(record.load_image(wanted_side=side), (0, 0, 0))
        for side in (64, None)
    )
    for axis in (0, 1):  # how much white lies in the row and in the column through (56, 48)
        widths = [
            np.asarray(canvas)[..., 0].take((48, 56)[axis], axis).sum() / 255
            for canvas in (actual, expected)
        ]
        assert widths[0] == pytest.approx(widths[1], abs=0.06)


@pytest.mark.parametrize("spec", ["builtin", "open_clip:ViT-B-16"])
def test_tokenizers_cut_to_the_longest_text_and_never_fail(spec: str) -> None:
    tokenizer = load_text_tokenizer(spec, 16)
    assert (
        tokenizer(["a crab"]).shape[1] < tokenizer(["a crab", "two red crabs and a key"]).shape[1]
    )
    assert tokenizer(["word " * 100]).shape == (1, 16)
    assert tokenizer(["ŻÓŁĆ 😀 \x00"]).max() < tokenizer.vocab_size
    assert tokenizer([]).shape[0] == 0
    assert tokenizer(["A CRAB"]).tolist() == tokenizer(["a crab"]).tolist()


def test_builtin_tokenizer_ends_with_its_highest_id() -> None:
    """open_clip's native text tower pools at the highest id."""
    tokenizer = load_text_tokenizer("builtin", 16)
    ids = tokenizer(["a crab", "a very long text that is cut at sixteen tokens " * 3])
    assert (ids.max(1).values == tokenizer.vocab_size - 1).all()


def test_how_often_texts_are_said_stands_beside_them() -> None:
    encoded = io.BytesIO()
    Image.new("RGB", (64, 64)).save(encoded, "PNG")
    boxes = [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)]
    regions = [
        Region(boxes[0], "A left Dog", expressions=["a pet"]),
        Region(boxes[1], "a left dog"),
    ]
    record = Record("two", encoded.getvalue(), 64, 64, [], regions, "test")
    assert log_prior_of_texts([record], "phrase", 0.5) == {"a left dog": 0.5 * math.log(2)}
    log_prior = log_prior_of_texts([record], "all", 1.0)
    assert log_prior == {"a left dog": math.log(1.5), "a pet": math.log(0.5)}
    collator = ClocCollator(
        load_text_tokenizer("builtin", 24), Preprocessing(64), flip=True, log_prior=log_prior
    )
    alone = dataclasses.replace(record, regions=regions[1:])
    for seed in range(4):  # mirrored or not, it is as frequent as the text that it was
        beside = collator([(seed, alone)]).phrase_log_prior
        assert beside is not None and beside.tolist() == [pytest.approx(math.log(1.5))]
    collator.log_prior = None
    assert collator([(0, record)]).phrase_log_prior is None
