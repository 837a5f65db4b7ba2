"""Opens the images of chats, in every form that Transformers allows, through `open_image`."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from PIL import Image

from cloc_mllm.data.images import ImageError, ImageSource, open_image

_TIMEOUT_S = 60
_SHOWN_CHARACTERS = 80  # most characters of a text in an error; base64 would fill the screen


def open_rows(images: Any, num_rows: int) -> list[list[Image.Image]]:
    """Opens each row's images.

    Args:
        images: None, one image, or for each row None, an image or a list of images. An image is
            what `open_image` takes, or a text as `open_chat_image` does.

    Returns:
        upright RGB pictures, row by row; places that share an object get one object.

    Raises:
        ValueError: the number of rows differs, or a row holds something else; names the row.
        ImageError: an image cannot be used.
    """
    rows = [None] * num_rows if images is None else [images] if _is_image(images) else list(images)
    if len(rows) != num_rows:
        raise ValueError(
            f"got {num_rows} texts but {len(rows)} images; pass one per text, or a list of them"
        )
    sources = [_as_list(row, index) for index, row in enumerate(rows)]
    opened: dict[int, Image.Image] = {}
    for index, row_sources in enumerate(sources):
        for source in row_sources:
            if id(source) not in opened:
                opened[id(source)] = _open(source, index)
    return [[opened[id(source)] for source in row_sources] for row_sources in sources]


def open_images(images: Any) -> list[Image.Image]:
    """Opens one image or several; see `open_rows` for what is taken."""
    return [image for row in open_rows([images], 1) for image in row]


def open_chat_image(text: str) -> Image.Image:
    """Opens the image that a text of a chat names.

    Args:
        text: a path, an address that starts with `file://`, `http://`, `https://` (fetched,
            redirects followed) or `data:`, or an image file in bare base64.

    Raises:
        ImageError: the image cannot be used; reason `missing_image` if there is no such file, or
            nothing at the address.
    """
    name = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
    scheme = text.partition(":")[0].lower()
    source: Path | bytes
    if scheme in ("http", "https"):
        source = _fetch(text, name)
    elif scheme == "file":
        source = Path(url2pathname(urlsplit(text).path))
    elif scheme == "data":
        source = _from_base64(text.partition(",")[2], name)
    elif os.path.isfile(text):  # unlike Path.is_file, False for a text too long for a name
        source = Path(text)
    else:
        source = _from_base64(text, name)
    return open_image(source, name=name)


def _is_image(value: Any) -> bool:
    return isinstance(value, ImageSource)


def _as_list(row: Any, index: int) -> list[Any]:
    images = [] if row is None else list(row) if isinstance(row, (list, tuple)) else [row]
    if not all(map(_is_image, images)):
        found = ", ".join(type(image).__name__ for image in images)
        raise ValueError(
            f"sample {index} needs images (PIL, path, address, bytes or uint8 array), got {found}"
        )
    return images


def _open(source: Any, index: int) -> Image.Image:
    if isinstance(source, str):
        return open_chat_image(source)
    return open_image(source, name=str(source) if isinstance(source, Path) else f"sample {index}")


def _fetch(address: str, name: str) -> bytes:
    import httpx

    try:
        response = httpx.get(address, follow_redirects=True, timeout=_TIMEOUT_S)
        response.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ImageError(name, "missing_image", f"fetching it failed: {error}") from error
    return response.content


def _from_base64(payload: str, name: str) -> bytes:
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except ValueError as error:
        raise ImageError(
            name,
            "missing_image",
            "there is no such file, and it is neither an address (file://, http://, https://, "
            f"data:image/png;base64,...) nor an image in base64 ({error})",
        ) from error
