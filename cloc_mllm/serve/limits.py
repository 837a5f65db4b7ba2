"""Limits how much one request, and all requests together, may take."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """The limits; each is an option `--limits.NAME` of `cloc-mllm serve`.

    Args:
        body_bytes: size of a request; images in it are base64, 4/3 of their size.
        bodies_bytes: size of all requests together that are arriving or wait to be read; one more
            is refused (503).
        body_seconds: time in which a body arrives, beside that of its bytes at `body_rate`.
        body_rate: bytes per second, below which a body is too slow (408).
        head_seconds: time from the start of a connection to the end of its request's head.
        waiting_connections: connections whose request has not arrived; one more closes the oldest
            of the address that has the most.
        images: images per request.
        image_bytes: size of one encoded image.
        image_pixels: pixels of all images of a request, read from their headers before any pixel is
            decoded.
        messages: messages per request.
        parts: texts and images of all messages of a request together.
        regions: boxes of all images of a request together.
        text_chars: characters of all messages of a request together.
        answer_tokens: length of the longest answer; a request that asks for more gets these.
        default_answer_tokens: length of an answer where the request names no `max_tokens`.
        together: requests that are answered at the same time.
        waiting: requests that may wait beside those that are answered; one more is refused (429).
            A request waits once its body is there.
        known_bytes: memory of the pictures of the last requests, and as much again of what the
            language model has read of them; with 0 each request is read from its first byte.
        stop_seconds: time that answers have to end in after SIGTERM or Ctrl-C.
        seconds: time from the arrival of a request to the end of its answer.
    """

    body_bytes: int = 20_000_000
    bodies_bytes: int = 80_000_000
    body_seconds: float = 10.0
    body_rate: int = 50_000
    head_seconds: float = 10.0
    waiting_connections: int = 128
    images: int = 8
    image_bytes: int = 10_000_000
    image_pixels: int = 24_000_000
    messages: int = 64
    parts: int = 256
    regions: int = 256
    text_chars: int = 32_000
    answer_tokens: int = 1024
    default_answer_tokens: int = 256
    together: int = 16
    waiting: int = 16
    known_bytes: int = 64_000_000
    stop_seconds: int = 30
    seconds: float = 120.0

    @property
    def marks(self) -> int:
        """The largest number of commas and opening brackets of a body within the other limits.

        Texts may be made of them, a message or part has fewer than 32, a box has 5, and the base64
        of images has none.
        """
        return self.text_chars + 32 * (self.messages + self.parts) + 8 * self.regions

    @property
    def text_bytes(self) -> int:
        """The largest size of a body within the other limits, without its pictures.

        A character takes up to 12 bytes (two escapes), the fields of a message, part or box fewer
        than 512; the rest is for fields that mean nothing here.
        """
        fields_bytes = 512 * (self.messages + self.parts + self.regions)
        return 12 * self.text_chars + fields_bytes + 65_536

    def __post_init__(self) -> None:
        for field in fields(self):
            least = 0 if field.name in ("waiting", "images", "regions", "known_bytes") else 1
            if not getattr(self, field.name) >= least:
                raise ValueError(
                    f"limits.{field.name} is {getattr(self, field.name)}; it must be at least "
                    f"{least}"
                )
