"""One file a target format, so that nobody is locked in; each counts what it wrote and left out."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from cloc_mllm.data.chats import Chat
from cloc_mllm.data.records import Record

_UNSAFE = re.compile(r"[^A-Za-z0-9_+-]")
_MAX_NAME = 120
_PIXEL_DECIMALS = 4  # finer than any annotation, coarse enough to hide the rounding of a division


def safe_name(record_id: str) -> str:
    """A relative path without suffix for an id: it stays below its folder whatever the id is.

    `/` still parts folders. Where characters were replaced, a digest of the id follows, so that
    ids stay apart.
    """
    parts = [_UNSAFE.sub("_", part)[:_MAX_NAME] for part in record_id.split("/")]
    name = "/".join(parts)
    if name == record_id and all(parts):
        return name
    digest = hashlib.sha256(record_id.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    return "/".join([*filter(None, parts[:-1]), f"{parts[-1]}-{digest}"])


def image_suffix(image: bytes) -> str:
    if image.startswith(b"\x89PNG"):
        return "png"
    return "webp" if image[8:12] == b"WEBP" else "jpg"


def write_image(record: Record, folder: Path) -> str:
    """Write the record's image file below `folder`; returns its path there."""
    return _write_image(
        f"{safe_name(record.id)}.{image_suffix(record.image)}", record.image, folder
    )


def write_images(chat: Chat, folder: Path) -> list[str]:
    """Write the images of a chat below `folder`, equal ones once; returns the path of each."""
    names: dict[bytes, str] = {}
    for number, of in enumerate(chat.images, 1):
        if of.image not in names:
            name = f"{safe_name(f'{chat.id}/{number}')}.{image_suffix(of.image)}"
            names[of.image] = _write_image(name, of.image, folder)
    return [names[of.image] for of in chat.images]


def _write_image(name: str, image: bytes, folder: Path) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:  # never over another image
        file.write(image)
    return name


def pixel_corners(record: Record) -> list[list[float]]:
    """Boxes as xyxy in pixels of the original image, rounded to 1/10,000."""
    size = (record.width, record.height) * 2
    return [
        [round(x * side, _PIXEL_DECIMALS) + 0.0 for x, side in zip(r.box, size, strict=True)]
        for r in record.regions  # + 0.0: -0.0 becomes 0.0
    ]


def pixel_xywh(corners: list[float]) -> list[float]:
    x1, y1, x2, y2 = corners
    return [x1, y1, round(x2 - x1, _PIXEL_DECIMALS), round(y2 - y1, _PIXEL_DECIMALS)]
