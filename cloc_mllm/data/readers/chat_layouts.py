"""Finds whose layout the rows of conversations have, and which frames their boxes may be in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cloc_mllm.data.readers.chat_texts import Frame, stated_numbers
from cloc_mllm.data.readers.chats import messages_of, stated_images
from cloc_mllm.data.readers.places import Place, Reading, Row
from cloc_mllm.data.values import as_dict

# of `data build --frame`: what `checks.frames` calls them
FRAME_NAMES: dict[Frame, str] = {
    "padded": "0..1 padded",
    "original": "0..1",
    "pixels": "pixels",
    "hundredths": "0..100",
    "thousandths": "0..1000",
}
_SHARES: tuple[Frame, ...] = ("padded", "original")
_NUMBERS: tuple[Frame, ...] = ("pixels", "thousandths")
_LARGEST_SHARE = 1.5  # a box never reaches beyond its image by half of it
_SWIFT_FRAMES = {"real": "pixels", "norm1": "0..1", "norm1000": "0..1000"}
_SWIFT_MARKS = ("<bbox>", "<ref-object>")
_QWEN_MARKS = ("<img>", "bbox_2d", "point_2d", "<|box_start|>")
_THOUSANDTHS_MARKS = ("<box>", "<|box_start|>")  # boxes in 0..1000, whatever else is declared
_LISTS_OF_BOXES = ("objects", "box_x1y1x2y2")
_WHAT = {
    "llava": "LLaVA's conversations",
    "ferret": "conversations with box_x1y1x2y2",
    "qwen-vl": "Qwen-VL's conversations",
    "ms-swift": "ms-swift's turns",
    "shikra": "Shikra's questions with lists of boxes",
    "internvl": "InternVL's conversations with <box>",
    "llama-factory": "LLaMA-Factory's turns with lists of images",
    "openai": "OpenAI's messages",
}


def chat_layout(place: Place) -> str:
    """The source of `data build` that has the layout of these rows; "" for rows without turns.

    Where several have it and read the same out of it, one of them stands for all.
    """
    rows, said = place.rows, _Said(place)
    if place.has_rows_with("conversations", "box_x1y1x2y2"):
        return "ferret"
    if any(place.has_rows_with("question", f"{of}_boxes_seq") for of in ("question", "answer")):
        return "shikra"
    if place.has_rows_with("query", "response"):
        return "ms-swift"
    is_openai = place.has_rows_with("messages")
    if not is_openai and not place.has_rows_with("conversations"):
        return ""
    if any("objects" in row for row in rows) or said.any_of(_SWIFT_MARKS):
        return "ms-swift"
    if is_openai:
        has_lists = any(key in row for row in rows for key in ("images", "image"))
        return "openai" if said.in_parts or not has_lists else "llama-factory"
    if said.any_of(_QWEN_MARKS):
        return "qwen-vl"
    if said.any_of(("<box>",)):
        return "internvl"
    is_factory = any(key in row for row in rows for key in ("images", "system", "tools"))
    return "llama-factory" if is_factory else "llava"


def chat_readings(place: Place, source: str) -> Iterator[Reading]:
    """Yields the readings of a place by a source, one for each frame that its numbers may be in."""
    if chat_layout(place) != source:
        return
    said = _Said(place)
    why = f"{place.path.name} has {_WHAT[source]}"
    needs_images = any(isinstance(name, str) for row in place.rows for name in stated_images(row))
    options: dict[str, Any] = {"rows": place.path}
    known = _known_frame(source, place, said)
    if source == "ms-swift" and any("objects" in row for row in place.rows):
        why += f", bbox_type {' and '.join(_swift_kinds(place))}"
    numbers = [] if source in ("ferret", "shikra") else said.numbers
    if numbers:
        largest = max(max(map(abs, stated), default=0.0) for stated in numbers)
        why += f", the largest number of a box is {largest:g}"
        for frame in _frames_up_to(largest):
            yield Reading(
                why,
                {**options, "frame": frame},
                FRAME_NAMES[frame],
                needs_images=needs_images,
                is_declared=False,
            )
        if said.any_of(("bbox_2d", "point_2d")) or source == "llava":
            return
        why += ", in brackets that are kept as words"
    elif source == "llava":
        options["frame"] = "original"  # which it always wants to know
    yield Reading(why, options, known, needs_images=needs_images, is_general=bool(numbers))


def _frames_up_to(largest: float) -> tuple[Frame, ...]:
    """The frames that boxes may be in whose largest number this is."""
    if largest <= _LARGEST_SHARE:
        return _SHARES
    return (*_NUMBERS, "hundredths") if largest <= 100 * _LARGEST_SHARE else _NUMBERS


class _Said:
    """The texts of rows, and whether they come in parts."""

    def __init__(self, place: Place) -> None:
        contents = [content for row in place.rows for _, content in messages_of(row)]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        texts = [*contents, *(as_dict(part).get("text", part) for part in parts)]
        self.in_parts = any(isinstance(content, list) for content in contents)
        self.texts = [text for text in texts if isinstance(text, str)]

    def any_of(self, marks: tuple[str, ...]) -> bool:
        return any(mark in text for text in self.texts for mark in marks)

    @property
    def numbers(self) -> list[list[float]]:
        return [numbers for text in self.texts for numbers in stated_numbers(text)]


def _known_frame(source: str, place: Place, said: _Said) -> str:
    """The frame that the layout itself has; "" if no box stands in it."""
    if source in ("ferret", "shikra"):
        return "pixels"
    if source == "ms-swift" and any(map(_lists_boxes, place.rows)):
        kinds = _swift_kinds(place)
        return _SWIFT_FRAMES.get(kinds[0], "") if len(kinds) == 1 else ""
    return "0..1000" if said.any_of(_THOUSANDTHS_MARKS) else ""


def _lists_boxes(row: Row) -> bool:
    return any(row.get(key) for key in _LISTS_OF_BOXES)


def _swift_kinds(place: Place) -> list[str]:
    objects = [as_dict(row.get("objects")) for row in place.rows if _lists_boxes(row)]
    return sorted({str(of.get("bbox_type") or "real") for of in objects})
