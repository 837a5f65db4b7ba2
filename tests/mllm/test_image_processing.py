"""The image processor of Transformers gives the pixels of training."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from cloc_mllm.data.images import ImageError
from cloc_mllm.data.transforms import Preprocessing
from cloc_mllm.mllm import ClocMllmImageProcessor, ClocMllmProcessor
from cloc_mllm.shipped import find_model
from tests.photos import encoded

PHOTO = Image.effect_noise((90, 60), 60).convert("RGB")


def test_any_image_gets_the_pixels_of_training(tmp_path: Path) -> None:
    expected = Preprocessing(64)(PHOTO)[0]
    data = encoded(PHOTO, orientation=6)  # stored sideways
    (tmp_path / "p.png").write_bytes(data)
    sources = [PHOTO, np.asarray(PHOTO), data, tmp_path / "p.png", str(tmp_path / "p.png")]
    sources.append(Image.open(io.BytesIO(data)))
    processor = ClocMllmImageProcessor(64)

    together = processor(sources)["pixel_values"]

    assert together.shape == (6, 3, 64, 64)
    assert all(torch.equal(pixels, expected) for pixels in together)
    assert torch.equal(processor(PHOTO)["pixel_values"], expected[None])
    as_array = processor(PHOTO, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(as_array, expected[None].numpy())


def test_its_numbers_are_what_it_prepares_with(tmp_path: Path) -> None:
    default = ClocMllmImageProcessor()
    assert default.size == {"height": 128, "width": 128}
    assert default.preprocessing == Preprocessing(128)
    own = ClocMllmImageProcessor(64, image_mean=[0, 0, 0], image_std=[1, 1, 1], padding_rgb=[0] * 3)

    own.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)

    assert isinstance(loaded, ClocMllmImageProcessor) and loaded.to_dict() == own.to_dict()
    pixels = loaded.prepare(PHOTO)
    assert torch.equal(pixels, own.prepare(PHOTO))
    assert pixels.min() == 0 and (pixels[:, :10] == 0).all()  # padding above the photo
    in_0_to_1, _ = Preprocessing(64, mean=(0, 0, 0), std=(1, 1, 1))(PHOTO)
    torch.testing.assert_close(pixels[:, 32], in_0_to_1[:, 32])


def test_only_squares_and_images_are_taken() -> None:
    with pytest.raises(ValueError, match="size of a square"):
        ClocMllmImageProcessor({"height": 64, "width": 32})
    with pytest.raises(ImageError, match="float64"):
        ClocMllmImageProcessor()(np.zeros((8, 8, 3)))


def test_it_is_saved_with_the_processor(mllm_dir: Path, tmp_path: Path) -> None:
    processor = ClocMllmProcessor.from_pretrained(mllm_dir)
    expected = processor.image_processor(PHOTO)["pixel_values"]
    assert torch.equal(processor(PHOTO, "<image>")["pixel_values"], expected)

    processor.save_pretrained(tmp_path)

    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["image_processor"]["size"] == {"height": 64, "width": 64}
    loaded = ClocMllmProcessor.from_pretrained(tmp_path)
    assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()
    assert loaded.image_size == 64 and loaded.fingerprint == processor.fingerprint


def test_a_processor_of_other_numbers_is_refused_by_name(mllm_dir: Path, tmp_path: Path) -> None:
    processor = ClocMllmProcessor.from_pretrained(mllm_dir)
    processor.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    saved = json.loads(file.read_text())
    saved["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    file.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"pixel_mean: the saved processor has \[0.48"):
        ClocMllmProcessor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="image_size is 32, but the image processor's is"):
        ClocMllmProcessor(processor.tokenizer, processor.image_processor, image_size=32)


def test_processors_saved_without_one_still_load(tmp_path: Path) -> None:
    directory = shutil.copytree(find_model("mllm"), tmp_path / "mllm")
    saved = json.loads((directory / "processor_config.json").read_text())
    del saved["image_processor"]
    (directory / "processor_config.json").write_text(json.dumps(saved))
    processor = ClocMllmProcessor.from_pretrained(directory)
    assert torch.equal(processor.image_processor.prepare(PHOTO), Preprocessing(128)(PHOTO)[0])
