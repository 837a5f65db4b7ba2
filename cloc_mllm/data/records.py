"""The record, one image with texts and regions, and the rules that decide what may become one."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from cloc_mllm.box import Box, clip_box
from cloc_mllm.data.drop_log import DropLog, Kind, shown
from cloc_mllm.data.images import ImageError, change_of, open_image, reduced, storable

__all__ = ["SCHEMA_VERSION", "DropLog", "Record", "Region", "check_box", "validate_record"]

SCHEMA_VERSION = 1
MAX_TEXT_CHARACTERS = 2_000
MIN_BOX_SIDE_PX = 1.0
MIN_INSIDE_SHARE = 0.5


@dataclass
class Region:
    """A box of the image and what is in it.

    Attributes:
        box: xyxy, normalised to the original image.
        phrase: what is in the box.
        score: the confidence of the model that made the region; 1 for people's annotations.
        expressions: referring expressions whose answer is this box.
        category: the class of the region; "" if the source has none.
        group: equal for regions that one phrase names together; "" for a region on its own.
        found: the box as its source states it, for messages; not stored on disk.
    """

    box: Box
    phrase: str
    score: float = 1.0
    expressions: list[str] = field(default_factory=list)
    category: str = ""
    group: str = ""
    found: Any = field(default=None, compare=False, repr=False)

    def stored(self) -> dict[str, Any]:
        """The fields that a record on disk holds."""
        return {name: value for name, value in vars(self).items() if name != "found"}


@dataclass
class Record:
    """One image. `image` is the encoded file; `width` and `height` are those of `load_image`."""

    id: str
    image: bytes
    width: int
    height: int
    captions: list[str]
    regions: list[Region]
    source: str

    def load_image(self, wanted_side: int | None = None) -> Image.Image:
        """Opens the image with `open_image`; an `ImageError` names this record's id.

        With `wanted_side` it may be smaller than `width` x `height`.
        """
        return open_image(self.image, name=self.id, wanted_side=wanted_side)


def validate_record(record: Record, drop_log: DropLog, max_side: int = 0) -> Record | None:
    """Takes everything unusable out of a record and counts each drop by its reason.

    Nothing else decides this. Width and height become those of the upright image; an image file of
    another format than records hold is converted (`images.storable`) and noted.

    | kind | reason | rule |
    |---|---|---|
    | record | `missing_id` | the id is empty or no text |
    | record | `duplicate_id` | a record of this id was delivered before |
    | record | `missing_image` | no image bytes |
    | record | `not_an_image` | none of `images.FILE_FORMATS` |
    | record | `broken_image` | it does not decode to the end |
    | record | `image_too_large` | more than `images.MAX_IMAGE_PIXELS` pixels |
    | region | `not_finite` | a coordinate is NaN, infinite or no number |
    | region | `inverted`, `zero_area` | x2 < x1 or y2 < y1; a side of length 0 |
    | region | `outside`, `mostly_outside` | none, or less than half, of it is in the image |
    | region | `too_small` | a side is under one pixel after clipping |
    | region | `bad_score` | the score is NaN, infinite or no number |
    | any text | `empty_text` | nothing but white space and control characters |
    | any text | `bad_text` | no text, or not encodable as UTF-8 (a lone surrogate) |
    | any text | `text_too_long` | more than `MAX_TEXT_CHARACTERS` |

    Other boxes that stick out are clipped to the image. White space in texts is collapsed. A region
    whose phrase is refused is dropped; an unusable category or group becomes "". The parts of a
    dropped record or region are dropped and counted with it.

    Args:
        max_side: a larger image is reduced to this long side, in pixels; 0 keeps all.

    Returns:
        the record, or None if it cannot be used.
    """
    if fault := _id_fault(record.id, drop_log):
        drop_record(record, fault, record.id, drop_log)
        return None
    try:
        data, image = _stored_image(record, drop_log, max_side)
    except ImageError as error:
        drop_record(record, error.reason, error.detail, drop_log)
        return None
    valid = replace(
        record,
        image=data,
        width=image.width,
        height=image.height,
        captions=_checked_texts(record.captions, "caption", record.id, drop_log),
        regions=[
            checked
            for index, region in enumerate(record.regions)
            if (checked := _checked_region(region, f"{record.id}/{index}", image.size, drop_log))
        ],
    )
    drop_log.deliver(
        valid.id,
        region=len(valid.regions),
        expression=sum(len(region.expressions) for region in valid.regions),
        caption=len(valid.captions),
    )
    return valid


def _stored_image(record: Record, drop_log: DropLog, max_side: int) -> tuple[bytes, Image.Image]:
    """The file that a record holds, and its picture; notes what was changed."""
    data, old_format = storable(record.image, name=record.id)
    image = open_image(data, name=record.id)
    if change := change_of(data, old_format):
        drop_log.note(change, example=record.id)
    if 0 < max_side < max(image.size):
        data, image = reduced(image, max_side)
        drop_log.note(f"photos reduced to {max_side} pixels (--max_side)", example=record.id)
    return data, image


def drop_record(record: Record, reason: str, found: Any, drop_log: DropLog) -> None:
    """Counts a record and its parts as dropped."""
    drop_log.add("record", str(record.id), reason, found)
    drop_log.add("caption", str(record.id), reason, count=len(record.captions))
    for index, region in enumerate(record.regions):
        _drop_region(region, f"{record.id}/{index}", reason, "", drop_log)


def _id_fault(record_id: Any, drop_log: DropLog) -> str | None:
    if clean_text(record_id)[0] is None:
        return "missing_id"
    return "duplicate_id" if record_id in drop_log.delivered_ids else None


def _drop_region(region: Region, item_id: str, reason: str, found: Any, drop_log: DropLog) -> None:
    drop_log.add("region", item_id, reason, found)
    drop_log.add("expression", item_id, reason, found, count=len(region.expressions))


def _checked_region(
    region: Region, item_id: str, image_wh: tuple[int, int], drop_log: DropLog
) -> Region | None:
    box, fault = check_box(region.box, image_wh)
    phrase, text_fault = clean_text(region.phrase)
    score_fault = None if _is_finite(region.score) else "bad_score"
    if box is None or phrase is None or score_fault:
        found = {text_fault: region.phrase, score_fault: region.score}
        if fault:
            stated = region.box if region.found is None else region.found
            found[fault] = f"{shown(stated)} in a picture of {image_wh[0]} x {image_wh[1]}"
        reason = str(fault or text_fault or score_fault)
        _drop_region(region, item_id, reason, found[reason], drop_log)
        return None
    return replace(
        region,
        box=box,
        phrase=phrase,
        expressions=_checked_texts(region.expressions, "expression", item_id, drop_log),
        category=clean_text(region.category)[0] or "",
        group=clean_text(region.group)[0] or "",
        found=None,
    )


def check_box(box: Box, image_wh: tuple[int, int]) -> tuple[Box | None, str | None]:
    """Clips a normalised box: (box, None), or (None, a reason of `validate_record`)."""
    if len(box) != 4 or not all(_is_finite(value) for value in box):
        return None, "not_finite"
    clipped, fault = clip_box(box, 1.0, 1.0, min_size_px=0.0)
    if clipped is None:
        return None, fault
    width, height = clipped[2] - clipped[0], clipped[3] - clipped[1]
    # one side at a time, so that no product of huge coordinates overflows
    if (width / (box[2] - box[0])) * (height / (box[3] - box[1])) < MIN_INSIDE_SHARE:
        return None, "mostly_outside"
    if width * image_wh[0] < MIN_BOX_SIDE_PX or height * image_wh[1] < MIN_BOX_SIDE_PX:
        return None, "too_small"
    x1, y1, x2, y2 = clipped
    return (x1 + 0.0, y1 + 0.0, x2, y2), None  # -0.0 becomes 0.0


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def _checked_texts(texts: Sequence[str], kind: Kind, item_id: str, drop_log: DropLog) -> list[str]:
    checked = []
    for raw in texts:
        text, fault = clean_text(raw)
        if text is None:
            drop_log.add(kind, item_id, str(fault), raw)
        else:
            checked.append(text)
    return checked


def clean_text(text: Any) -> tuple[str | None, str | None]:
    """Collapses white space and control characters: (text, None), or (None, reason)."""
    if not isinstance(text, str):
        return None, "bad_text"
    if len(text) > MAX_TEXT_CHARACTERS:
        return None, "text_too_long"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return None, "bad_text"
    # a byte order mark inside a text is left over from files that were joined
    text = text.replace("\ufeff", "")
    words = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text).split()
    return (" ".join(words), None) if words else (None, "empty_text")
