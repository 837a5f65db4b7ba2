"""Limits how much one request, and all requests together, may take."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """The limits; each is an option `--limits.NAME` of `cloc-mllm serve`.

    Args:
        body_bytes: size of a request; images in it are base64, 4/3 of their size.
        images: images per request.
        image_bytes: size of one encoded image.
        image_pixels: pixels of one image, read from its header before any pixel is decoded.
        messages: messages per request.
        text_chars: characters of all messages of a request together.
        answer_tokens: length of the longest answer; a request that asks for more gets these.
        default_answer_tokens: length of an answer where the request names no `max_tokens`.
        waiting: requests that may wait beside the one that is answered; one more is refused (429).
        seconds: time from the arrival of a request to the end of its answer.
    """

    body_bytes: int = 32_000_000
    images: int = 8
    image_bytes: int = 10_000_000
    image_pixels: int = 16_000_000
    messages: int = 64
    text_chars: int = 32_000
    answer_tokens: int = 1024
    default_answer_tokens: int = 256
    waiting: int = 16
    seconds: float = 120.0

    def __post_init__(self) -> None:
        for field in fields(self):
            least = 0 if field.name in ("waiting", "images") else 1
            if not getattr(self, field.name) >= least:
                raise ValueError(
                    f"limits.{field.name} is {getattr(self, field.name)}; it must be at least "
                    f"{least}"
                )
