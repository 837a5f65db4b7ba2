"""LLaVA's conversation JSON (Liu et al. 2023), and texts with boxes in its manner (Ferret-Bench).

`[{"id", "image": "coco/train2017/000000033471.jpg", "conversations": [{"from": "human", "value":
"<image>\\nProvide a short description for this region: [0.33, 0.26, 0.86, 0.75]"}, {"from": "gpt",
"value": "a man"}]}]`.

Frame: xyxy. LLaVA-1.5's own mix (`llava_v1_5_mix665k.json`) states 0..1 of the image *padded to a
square* (`frame="padded"`); others that took its layout state them of the image itself
(`frame="original"`), Ferret-Bench too, or write pixels, 0..100 (`hundredths`) or 0..1000
(`thousandths`). One box cannot tell; `cloc-mllm data doctor` can, by many.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cloc_mllm.box import Box
from cloc_mllm.data.drop_log import shown
from cloc_mllm.data.readers import (
    DEFAULTS,
    Photo,
    ReadOptions,
    as_dict,
    as_list,
    deliver,
    group_by_photo,
    open_photos,
    single,
)
from cloc_mllm.data.readers.chat_layouts import chat_readings
from cloc_mllm.data.readers.chat_texts import Frame, boxes_in
from cloc_mllm.data.readers.grounded_text import (
    BOX,
    Grounding,
    foreign_notation,
    ground_turns,
)
from cloc_mllm.data.readers.names import ids_of_names
from cloc_mllm.data.readers.places import Place, Reading
from cloc_mllm.data.records import DropLog, Record, Region
from cloc_mllm.data.texts import read_rows

SOURCE = "llava"
# nan and inf are boxes, too: bad ones, to be counted
_NUMBER = r"\s*-?(?:\d*\.?\d+(?:e[-+]?\d+)?|nan|inf)\s*"
_BOX_TEXT = re.compile(rf"\[({_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER})\]", re.IGNORECASE)
_IMAGE_MARK = "<image>"
Row = dict[str, Any]


def read_llava(
    rows: str | Path,
    images: str | Path,
    *,
    frame: Frame,
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per image, from all rows that name it.

    Boxes of the same numbers are one region: described (its phrase), referred to (`expressions`)
    or named in a text (its phrase, and further names are `expressions`).

    Args:
        rows: JSON list or JSON lines. Ferret-Bench's `{"image", "text"}` is a row of one turn.
        images: folder, tar or zip.
        frame: of the numbers, see above.
        drop_log: beside the reasons of `validate_record`, rows get `bad_row` and `other_layout`
            (no `conversations`, several images, boxes written otherwise); rows without an image are
            set aside, and so are questions and answers that give no region.
    """
    rows_of = group_by_photo(named_rows(rows, options, drop_log))
    ids = ids_of_names(rows_of)
    with open_photos(images, drop_log, options, single(rows_of)) as photos:
        for name, image_rows in rows_of.items():
            photo = photos.find(name)
            said = [_said_of_boxes(row, photo, frame) for row in image_rows]
            regions, pairs = regions_said(said, drop_log)
            num_rows = len(image_rows)
            yield from deliver(ids[name], photo, SOURCE, [], regions, drop_log, num_rows, pairs)


def named_rows(
    path: str | Path, options: ReadOptions, drop_log: DropLog, own_marks: Collection[str] = ()
) -> Iterator[tuple[str, Row]]:
    """Yields (image, row) of each row that has one image and a conversation.

    Args:
        own_marks: how this format marks boxes; rows with marks of others alone are of another
            layout.
    """
    for item, row in read_rows(path, options.encoding):
        if not isinstance(row, dict):
            drop_log.add("row", item, "bad_row", f"no JSON object: {shown(row)}")
            continue
        image, turns = image_of(row), turns_of(row)
        if image is None and "image" not in row and "images" not in row:
            drop_log.put_aside("row", "no_image")
        elif layout := _other_layout(row, image, turns, own_marks):
            drop_log.add("row", item, "other_layout", layout)
        else:
            yield str(image), row


def image_of(row: Row) -> str | None:
    """The image of a row: `image` or `images`, a name or a list of one; None for none or more."""
    stated = row.get("image", row.get("images"))
    if isinstance(stated, list) and len(stated) == 1:
        (stated,) = stated
    found = stated.get("path") if isinstance(stated, dict) else stated
    return found if isinstance(found, str) and found.strip() else None


def _other_layout(row: Row, image: str | None, turns: list[str], own_marks: Collection[str]) -> str:
    if image is None:
        return f"image {row.get('image', row.get('images'))!r}, not one name"
    if not turns:
        keys = ", ".join(list(map(str, row))[:8])
        return f"no `conversations`; the row has {keys}"
    return foreign_notation(turns, own_marks)


def turns_of(row: Row) -> list[str]:
    """Lists the texts of a conversation, without the image's mark."""
    values = [as_dict(turn).get("value") for turn in as_list(row.get("conversations"))]
    texts = ["" if not isinstance(value, str) else value for value in values]
    if not texts and isinstance(row.get("text"), str):
        texts = ["", row["text"]]
    return [text.replace(_IMAGE_MARK, "").strip() for text in texts]


class Said(NamedTuple):
    """What a row says of boxes.

    Attributes:
        num_turns: questions and answers in turn.
        of_boxes: (key of the box, box, what is said of it).
    """

    num_turns: int
    of_boxes: list[tuple[str, Box, Grounding]]


def regions_said(rows: Sequence[Said], drop_log: DropLog) -> tuple[list[Region], list[set[int]]]:
    """Makes a region per key of a box.

    A box that nothing names is set aside: it has no phrase to learn.

    Returns:
        the regions, and for each question with its answer which of them it names.
    """
    by_key: dict[str, list[tuple[Box, Grounding, set[int]]]] = {}
    pairs: list[set[int]] = []
    for num_turns, of_boxes in rows:
        of_row: list[set[int]] = [set() for _ in range(0, num_turns, 2)]
        for key, box, grounding in of_boxes:
            by_key.setdefault(key, []).append((box, grounding, of_row[grounding.pair]))
        pairs += of_row
    regions: list[Region] = []
    for key, same in by_key.items():
        names = [g.text for _, g, _ in same if g.kind != "expression" and g.text]
        expressions = [g.text for _, g, _ in same if g.kind == "expression" and g.text]
        if not names and not expressions:
            drop_log.put_aside("region", "unnamed")
            continue
        for _, grounding, pair in same:
            if grounding.text:
                pair.add(len(regions))
        phrase = (names or expressions)[0]
        others = names[1:] + expressions
        regions.append(Region(box=same[0][0], phrase=phrase, expressions=others, found=key))
    return regions, pairs


def _said_of_boxes(row: Row, photo: Photo, frame: Frame) -> Said:
    turns = turns_of(row)
    stated = [
        [float(number) for number in match.split(",")]
        for turn in turns
        for match in _BOX_TEXT.findall(turn)
    ]
    marked = [_BOX_TEXT.sub(BOX, turn.replace(BOX, "")) for turn in turns]
    boxes = boxes_in(photo, frame, stated)
    of_boxes = [
        (repr(stated[index]), boxes[index], grounding)
        for grounding in ground_turns(marked)
        for index in range(grounding.first, grounding.first + grounding.num_boxes)
    ]
    return Said(len(turns), of_boxes)


def looks_like_llava(place: Place) -> Iterator[Reading]:
    """Conversations, whose boxes state no frame; or the texts of Ferret-Bench, which has one."""
    name = place.path.name
    turns = [turn for row in place.rows for turn in turns_of(row)]
    stated = [numbers for turn in turns for numbers in _BOX_TEXT.findall(turn)]
    is_bench = place.has_rows_with("question_id", "image", "category", "text")
    if is_bench or (place.has_rows_with("image", "text") and stated):
        boxes = "with [x1, y1, x2, y2] in texts" if stated else "without a box"
        why = f"the rows of {name} have image and text as Ferret-Bench, {boxes}"
        yield Reading(why, {"rows": place.path, "frame": "original"}, "0..1" if stated else "")
        return
    yield from chat_readings(place, SOURCE)
