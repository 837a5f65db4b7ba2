"""Records to packed batches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from cloc_mllm.data.collate import ClocCollator
from cloc_mllm.data.records import Record
from cloc_mllm.data.tokenizer import load_text_tokenizer
from cloc_mllm.data.transforms import PIXEL_MEAN, PIXEL_STD


@pytest.fixture(scope="module")
def collator() -> ClocCollator:
    return ClocCollator(load_text_tokenizer("builtin", 24), image_size=64, regions_per_image=2)


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
    plain = ClocCollator(tokenizer, 64, regions_per_image=0)
    flipping = ClocCollator(tokenizer, 64, regions_per_image=0, flip=True)
    seeds = [seed for seed in range(8) if np.random.default_rng(seed).random() < 0.5]
    item = [(seeds[0], tiny_scenes[0])]
    straight, mirrored = plain(item), flipping(item)
    torch.testing.assert_close(mirrored.pixel_values, straight.pixel_values.flip(-1))
    torch.testing.assert_close(mirrored.boxes[:, 0], 1 - straight.boxes[:, 2])


def test_pixels_are_normalised_as_clip_does(collator: ClocCollator) -> None:
    import io

    from PIL import Image

    encoded = io.BytesIO()
    Image.new("RGB", (64, 64), (255, 0, 51)).save(encoded, "PNG")
    record = Record("p", encoded.getvalue(), 64, 64, ["a wall"], [], "test")
    pixel = collator([(0, record)]).pixel_values[0, :, 0, 0]
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    torch.testing.assert_close(pixel, expected)


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
