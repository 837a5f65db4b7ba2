"""Images of chats, in each way Transformers lets a chat carry them."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cloc_mllm.data.images import ImageError, open_image
from cloc_mllm.geometry import Boxes
from cloc_mllm.mllm import ClocMllmProcessor
from cloc_mllm.mllm.chat_images import open_chat_image
from tests.photos import encoded


@pytest.fixture(scope="module")
def processor(mllm_dir: Path) -> ClocMllmProcessor:
    return ClocMllmProcessor.from_pretrained(mllm_dir)


def scene() -> Image.Image:
    """Half transparent, so that a reader that lays it on black is found out."""
    image = Image.new("RGBA", (90, 60), (0, 0, 0, 0))
    image.paste((200, 30, 30, 255), (10, 10, 40, 25))
    return image


UPRIGHT = open_image(scene())
PHOTO = encoded(scene(), orientation=6)
BASE64 = base64.b64encode(PHOTO).decode()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server of PHOTO at /photo.png, behind a redirect at /moved.png; a page at all else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/moved.png":
                self.send_response(302)
                self.send_header("Location", "/photo.png")
                self.end_headers()
                return
            found = self.path == "/photo.png"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(PHOTO if found else b"<html>not here")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "a photo.png"
    path.write_bytes(PHOTO)
    return path


def items(photo: Path, address: str) -> list[dict[str, object]]:
    return [
        {"type": "image", "path": str(photo)},
        {"type": "image", "path": photo},
        {"type": "image", "url": photo.as_uri()},
        {"type": "image", "url": f"{address}/photo.png"},
        {"type": "image", "url": f"{address}/moved.png"},
        {"type": "image", "url": f"data:image/png;base64,{BASE64}"},
        {"type": "image", "base64": BASE64},
        {"type": "image", "base64": base64.encodebytes(PHOTO).decode()},
        {"type": "image", "image": PHOTO},
        {"type": "image", "image": Image.open(io.BytesIO(PHOTO))},
        {"type": "image", "image": np.asarray(UPRIGHT)},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BASE64}"}},
    ]


def test_every_item_of_a_chat_is_the_upright_picture_on_white(
    processor: ClocMllmProcessor, photo: Path, address: str
) -> None:
    region = Boxes.pixels([[10, 10, 40, 25]], 90, 60)
    expected = processor(UPRIGHT, "<image><region>", [region])
    for item in items(photo, address):
        chat = [{"role": "user", "content": [item, {"type": "text", "text": "<region>"}]}]
        actual = processor.apply_chat_template(
            chat, tokenize=True, return_dict=True, processor_kwargs={"regions": [region]}
        )
        for key in ("pixel_values", "image_frame", "region_boxes"):
            assert torch.equal(actual[key], expected[key]), (item, key)


def test_images_are_opened_wherever_they_enter_the_processor(processor: ClocMllmProcessor) -> None:
    tagged = Image.open(io.BytesIO(PHOTO))
    expected = processor(UPRIGHT, "<image>")["pixel_values"]
    assert torch.equal(processor.vision_inputs([tagged], [None])["pixel_values"], expected)
    twice = processor([[tagged, tagged]], "<image><image>")
    assert torch.equal(twice["pixel_values"], expected)  # one object is prepared once
    assert twice["image_index"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere/photo.png", r"'nowhere/photo\.png'.*missing_image.*no such file"),
        ("data:image/png;base64,%%%", r"missing_image"),
        ("data:image/png;base64,", r"missing_image"),
        ("data:text/html;base64,PGh0bWw+", r"not_an_image.*<html>"),
        ("x" * 100_001, r"'x{80}\.\.\.'.*missing_image"),
        ("http://127.0.0.1:1/photo.png", r"missing_image.*fetching it failed"),
        ("http://[", r"missing_image.*fetching it failed"),
    ],
    ids=["path", "base64", "empty", "html", "long", "no_server", "no_address"],
)
def test_a_text_that_names_no_image_says_why(text: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        open_chat_image(text)


def test_an_address_that_answers_with_an_error_says_which(address: str) -> None:
    with pytest.raises(ImageError, match=r"gone\.png.*fetching it failed.*404"):
        open_chat_image(f"{address}/gone.png")


def test_a_broken_image_names_its_sample(processor: ClocMllmProcessor) -> None:
    with pytest.raises(ImageError, match=r"'sample 1'.*broken_image"):
        processor([UPRIGHT, PHOTO[:-40]], ["<image>", "<image>"])
