"""Captions of a real small model, and where they go."""

from __future__ import annotations

import pytest

from cloc_mllm.data.records import Record
from cloc_mllm.shipped import find_model
from cloc_mllm.vesl.captioner import Captioner


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    """The model that ships, a chat model that writes about built-in scenes."""
    return Captioner.from_pretrained(str(find_model("mllm")), max_new_tokens=16)


def test_a_caption_depends_on_its_own_picture(
    captioner: Captioner, tiny_scenes: list[Record]
) -> None:
    images = [record.load_image() for record in tiny_scenes[:3]]
    together = captioner.caption(images)
    assert all(together)
    assert together == [captioner.caption([image])[0] for image in images]
    assert not any("Describe" in text for text in together), "the question is not the answer"
