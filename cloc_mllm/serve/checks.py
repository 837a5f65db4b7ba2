"""Checks a request and turns its messages, images and boxes into a chat for the model."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cloc_mllm.data.images import IMAGE_FORMATS, upright_size
from cloc_mllm.data.wordings import IMAGE_TOKEN, REGION_TOKEN
from cloc_mllm.geometry import Boxes
from cloc_mllm.inference.chat import Chat
from cloc_mllm.inference.inputs import EncodedImage, check_box
from cloc_mllm.inference.sampling import Sampling
from cloc_mllm.mllm.coordinates import BoxFormat
from cloc_mllm.mllm.processing import ClocMllmProcessor
from cloc_mllm.serve.errors import ApiError
from cloc_mllm.serve.limits import Limits
from cloc_mllm.serve.schema import CompletionRequest, ImageUrl, Part, Regions

_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_LONGEST_HEAD = 256  # of a data URL
_BLANKS = b" \t\n\r"
# the characters of wrapped base64 that are quoted in URLs
_QUOTED = {b"%2B": b"+", b"%2F": b"/", b"%3D": b"=", b"%0A": b"", b"%0D": b"", b"%20": b""}
BOX_PLACEHOLDER = "{box}"  # in a text, stands for the next region as the model writes boxes


@dataclass(frozen=True)
class CheckedRequest:
    """A request that can be answered.

    Its images stay encoded, so that a request takes little memory while it waits.

    Args:
        messages: as `ClocMllmProcessor.render` takes them, with one image item per image.
        images: the image files, in the order of their items.
        names: for errors, the path of each image in the request.
        regions: the regions of each image.
        phrase: what is looked for, if the last message asks for it in the words of training; else
            None.
    """

    messages: list[dict[str, Any]]
    images: list[bytes]
    names: list[str]
    regions: list[Boxes]
    sampling: Sampling
    phrase: str | None

    def chat(self, encode: Callable[[bytes, str], EncodedImage]) -> Chat:
        """Makes the chat.

        Args:
            encode: decodes and encodes an image file, whose name in errors is the second argument.

        Raises:
            ImageError: an image is damaged behind its header.
        """
        return Chat(self.messages, list(map(encode, self.images, self.names)), self.regions)


def check_request(
    request: CompletionRequest, limits: Limits, processor: ClocMllmProcessor
) -> CheckedRequest:
    """Checks what the types of the schema cannot, and makes the chat.

    Raises:
        ApiError: 400 that names the field.
    """
    if len(request.messages) > limits.messages:
        count = len(request.messages)
        raise ApiError(
            400, f"got {count} messages, the limit is {limits.messages}", param="messages"
        )
    if request.messages[-1].role != "user":
        raise ApiError(
            400, "the last message must be the user's, which is answered", param="messages"
        )
    reader = _Reader(limits)
    messages: list[dict[str, Any]] = [
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": [
                reader.part(part, message.role, f"messages[{row}].content[{place}]")
                for place, part in enumerate(message.content)
            ],
        }
        for row, message in enumerate(request.messages)
    ]
    _write_boxes(messages, reader.regions, processor.coordinates)
    last = "".join(item.get("text", "") for item in messages[-1]["content"])
    return CheckedRequest(
        messages,
        reader.images,
        reader.names,
        reader.regions,
        _sampling(request, limits),
        processor.asked_in.phrase_in(last),
    )


class _Reader:
    """Collects images and regions in the order of their items."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.images: list[bytes] = []
        self.names: list[str] = []
        self.regions: list[Boxes] = []
        self.num_parts = 0
        self.num_chars = 0
        self.num_pixels = 0
        self.num_regions = 0

    def part(self, part: Part, role: str, path: str) -> dict[str, str]:
        """Checks one item and returns it as chat templates take it."""
        self.num_parts += 1
        if self.num_parts > self.limits.parts:
            raise ApiError(400, f"more than {self.limits.parts} parts in a request", param=path)
        if part.type == "text":
            if part.text is None or part.image_url is not None or part.regions is not None:
                raise ApiError(400, f"{path}: a text item has `text` and no picture", param=path)
            return {"type": "text", "text": self._text(part.text, path)}
        if part.image_url is None or part.text is not None:
            raise ApiError(400, f"{path}: a picture item has `image_url` and no text", param=path)
        if role != "user":
            raise ApiError(400, f"{path}: only messages of the user have pictures", param=path)
        image_wh = self._image(part.image_url, f"{path}.image_url.url")
        self.num_regions += len(part.regions.boxes) if part.regions else 0
        if self.num_regions > self.limits.regions:
            raise ApiError(
                400,
                f"more than {self.limits.regions} regions in a request",
                param=f"{path}.regions",
            )
        self.regions.append(_boxes(part.regions, image_wh, f"{path}.regions"))
        return {"type": "image"}

    def _text(self, text: str, path: str) -> str:
        self.num_chars += len(text)
        if self.num_chars > self.limits.text_chars:
            raise ApiError(
                400,
                f"the texts have more than {self.limits.text_chars} characters; shorten them",
                param=path,
            )
        if IMAGE_TOKEN in text:
            raise ApiError(
                400,
                f"{path}: {IMAGE_TOKEN} stands for a picture; send an image_url item instead",
                param=path,
            )
        return text

    def _image(self, image_url: ImageUrl, path: str) -> tuple[int, int]:
        """Keeps an image and returns the width and height of its upright picture."""
        limits = self.limits
        if len(self.images) == limits.images:
            raise ApiError(400, f"more than {limits.images} pictures in a request", param=path)
        data = _data_of(image_url.url, path, limits.image_bytes)
        size = upright_size(data, limits.image_pixels - self.num_pixels)
        if size is None:
            raise ApiError(
                400,
                f"{path}: expected a picture in {', '.join(IMAGE_FORMATS)}; it is none",
                param=path,
                code="invalid_image",
            )
        before = self.num_pixels
        self.num_pixels += size[0] * size[1]
        if self.num_pixels > limits.image_pixels:
            raise ApiError(
                400,
                f"{path}: the picture has {size[0]} x {size[1]} pixels, the limit is "
                f"{limits.image_pixels:,}{f', {before:,} of them used' if before else ''}; send a "
                "smaller one",
                param=path,
                code="image_too_large",
            )
        self.images.append(data)
        self.names.append(path)
        return size


def _data_of(url: str, path: str, max_bytes: int) -> bytes:
    """Decodes a data URL of at most so many bytes.

    Nothing is ever fetched: an address could name any machine or file that this server reaches.
    """
    head = url[:_LONGEST_HEAD].partition(",")[0]
    kind = head.lower()
    is_image = kind.startswith(("data:image/", "data:image;")) and kind.endswith(";base64")
    if not (is_image and url.startswith(",", len(head))):
        raise ApiError(
            400,
            f"{path}: expected data:image/png;base64,... (or jpeg, webp), got {url[:32]!r}; "
            "addresses are not fetched, send the picture itself",
            param=path,
            code="invalid_image_url",
        )
    # as clients write it: in lines, in the alphabet of URLs, quoted, without padding; in steps that
    # make no object per character
    payload = url[len(head) + 1 :].encode(errors="replace")
    if b"%" in payload:
        for quoted, plain in _QUOTED.items():
            payload = payload.replace(quoted, plain).replace(quoted.lower(), plain)
    payload = payload.translate(_URL_SAFE, _BLANKS).rstrip(b"=")
    if len(payload) * 3 // 4 > max_bytes:
        raise ApiError(
            400,
            f"{path}: the picture has {len(payload) * 3 // 4:,} bytes, the limit is "
            f"{max_bytes:,}; send a smaller one",
            param=path,
            code="image_too_large",
        )
    try:
        return base64.b64decode(payload + b"=" * (-len(payload) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(
            400, f"{path}: no base64: {error}", param=path, code="invalid_base64"
        ) from error


def _boxes(regions: Regions | None, image_wh: tuple[int, int], path: str) -> Boxes:
    """Clips and normalises the boxes of an image."""
    boxes = []
    scale = (1, 1) if regions is None or regions.unit == "pixels" else image_wh
    for index, box in enumerate(regions.boxes if regions else []):
        box_px = [value * side for value, side in zip(box, (*scale, *scale), strict=True)]
        try:
            boxes.append(check_box(box_px, *image_wh))
        except ValueError as error:
            place = f"{path}.boxes[{index}]"
            raise ApiError(400, f"{place}: {error}", param=place) from error
    return Boxes.normalized(boxes)


def _write_boxes(
    messages: list[dict[str, Any]], regions: list[Boxes], box_format: BoxFormat
) -> None:
    """Replaces each `{box}` by a box; each `<region>` and each `{box}` is the next region."""
    boxes = [box for image_regions in regions for box in image_regions.xyxy.tolist()]
    items = [item for message in messages for item in message["content"] if "text" in item]
    num_regions = sum(item["text"].count(REGION_TOKEN) for item in items)
    if num_regions != len(boxes):
        raise ApiError(
            400,
            f"the texts have {num_regions} {REGION_TOKEN} but the pictures {len(boxes)} regions; "
            f"write one {REGION_TOKEN} per box, in their order",
            param="messages",
        )
    num_written = sum(item["text"].count(BOX_PLACEHOLDER) for item in items)
    if not boxes or not num_written:
        return
    if num_written != len(boxes):
        raise ApiError(
            400,
            f"the texts have {num_written} {BOX_PLACEHOLDER} but the pictures {len(boxes)} "
            f"regions; write none, or one beside each {REGION_TOKEN}",
            param="messages",
        )
    texts = iter([box_format.encode(box) for box in boxes])
    for item in items:
        first, *rest = item["text"].split(BOX_PLACEHOLDER)
        item["text"] = first + "".join(next(texts) + piece for piece in rest)


def _sampling(request: CompletionRequest, limits: Limits) -> Sampling:
    asked = request.max_completion_tokens or request.max_tokens or limits.default_answer_tokens
    return Sampling(
        max_new_tokens=min(asked, limits.answer_tokens),
        temperature=request.temperature or 0.0,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        stop=tuple(request.stop or ()),
    )
