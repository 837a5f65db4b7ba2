"""Images that a chat of several gives a name: `Picture 1: <img>a.png</img>`, `Image-2: <image>`.

A box behind such a name is of that image, and so is one in an answer to a question that says one
name alone. Names that stand before no image mean nothing.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Callable, Sequence

from cloc_mllm.data.chats import Piece
from cloc_mllm.data.readers.chat_texts import Match

_NAME = re.compile(r"\b(picture|image|img|figure|photo|frame)[\s_-]?#?(\d{1,3})\b", re.IGNORECASE)
_DECLARED = re.compile(rf"{_NAME.pattern}\s*[:\uff1a.)]?\s*\Z", re.IGNORECASE)


class ImageNames:
    """The names that images of one chat have got so far."""

    def __init__(self) -> None:
        self._images: dict[tuple[str, int], int] = {}  # (word, number) -> image
        self.asked: int | None = None  # the image of the only name in the last question

    def read_turn(self, pieces: Sequence[Piece], *, is_question: bool) -> None:
        """Takes up the names before the images of a turn, and what a question asks about."""
        said: set[int] = set()
        for piece, after in zip(pieces, [*pieces[1:], None], strict=False):
            if piece.kind != "words":
                continue
            declared = _DECLARED.search(piece.text)
            if declared and after is not None and after.kind == "image":
                self._images[declared[1].lower(), int(declared[2])] = after.image
            else:
                said |= {image for _, image in self._mentions(piece.text)}
        if is_question:
            self.asked = said.pop() if len(said) == 1 else None

    def lifted(self, find: Callable[[str, int], list[Match]], text: str, image: int) -> list[Match]:
        """Finds the places in a text, each as of the image that was named last before it.

        Args:
            find: gives the matches in a text whose places are of one image.
            image: of the places before any name.
        """
        starts, images = [0], [image]
        for start, named in self._mentions(text):
            starts.append(start)
            images.append(named)
        found = [
            match
            for of in set(images)
            for match in find(text, of)
            if images[bisect(starts, match.start) - 1] == of
        ]
        return sorted(found, key=lambda match: match.start)

    def are_in(self, text: str) -> bool:
        """Whether a text says a name that an image has."""
        return bool(self._mentions(text))

    def _mentions(self, text: str) -> list[tuple[int, int]]:
        """(place in the text, image) of each name that an image has."""
        if not self._images:
            return []
        keys = ((m.start(), (m[1].lower(), int(m[2]))) for m in _NAME.finditer(text))
        return [(start, self._images[key]) for start, key in keys if key in self._images]
