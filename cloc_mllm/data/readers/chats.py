"""Conversation files of every layout -> chats. Nothing is taken apart: turns and words are kept.

What tools write differs in the names of the keys alone, so one reader knows all the layouts:

| what | keys |
|---|---|
| turns | `conversations` or `messages` of `from` and `value`, or `role` and `content` |
| | `query`, `response`, `history` (ms-swift 2); `question`, `answer` (Shikra) |
| system | a first turn, or `system` |
| images | `image` or `images`, a name or a list; `<img>NAME</img>`; parts `image_url` |
| places | marks in the texts (`chat_texts`), Ferret's and ms-swift's lists beside them |

A box in a text is of the image that the chat named last before it (`chat_image_names`), else of the
last one shown before it; at the start, of the next one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloc_mllm.data.chats import Chat, ChatImage, Piece, Role, Turn, drop_chat, validate_chat, words
from cloc_mllm.data.drop_log import DropLog, shown
from cloc_mllm.data.readers.chat_image_names import ImageNames
from cloc_mllm.data.readers.chat_texts import (
    Frame,
    Match,
    TextFault,
    cut_at_images,
    find_brackets,
    find_json,
    find_marked,
    image_names_in,
    lift,
    num_brackets,
    place,
)
from cloc_mllm.data.readers.grounded_text import foreign_notation
from cloc_mllm.data.readers.photos import (
    DEFAULTS,
    Photo,
    Photos,
    ReadOptions,
    names_of,
    open_photos,
)
from cloc_mllm.data.reasons import NUMBERS_AS_WORDS
from cloc_mllm.data.texts import from_base64, read_rows
from cloc_mllm.data.values import as_dict, as_list, id_key

Row = dict[str, Any]
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
_SWIFT_FRAMES: dict[str, Frame] = {
    "real": "pixels",
    "norm1": "original",
    "norm1000": "thousandths",
}
_SWIFT = re.compile(r"<ref-object>(?:\s*<bbox>)*|<bbox>(?:\s*<bbox>)*")
_FERRET = re.compile(r"<bbox_location(\d{1,4})>")
_SHIKRA = re.compile(r"<ph_st>(.*?)<ph_ed>", re.DOTALL)
LAST_SHOWN = "boxes of chats with several images, taken for the image shown last before them"


@dataclass(frozen=True)
class Style:
    """What a source declares about the texts of its rows.

    Attributes:
        source: its name.
        frame: of boxes in brackets and in JSON answers; None where they have none.
        own_marks: the marks of places that it reads, see `_OTHER_NOTATIONS` of `grounded_text`.
            Chats with marks of others alone are of another layout.
    """

    source: str
    frame: Frame | None = None
    own_marks: tuple[str, ...] = ()

    @property
    def notation(self) -> str:
        return f"{self.source} {self.frame}" if self.frame else self.source


QWEN_MARKS = ("<box>", "<|box_start|>", "bbox_2d")
MARKS_OF = {
    "llava": (),
    "ferret": ("<bbox_location",),
    "shikra": (),
    "qwen-vl": QWEN_MARKS,
    "internvl": QWEN_MARKS,
    "llama-factory": QWEN_MARKS,
    "openai": QWEN_MARKS,
    "ms-swift": (*QWEN_MARKS, "<bbox>", "<ref-object>"),
}


def style_of(source: str, frame: Frame | None = None) -> Style:
    return Style(source, frame, MARKS_OF[source])


@dataclass
class _Told:
    """A row as read, its images not yet found.

    Attributes:
        names: of the images, in the order of their marks; the bytes of those inside the row.
        turns: (role as written, pieces cut at images).
        faults: number of a turn -> a key of `REASONS`, and what was found.
    """

    id: str
    row: Row
    names: list[str | bytes] = field(default_factory=list)
    turns: list[tuple[str, list[Piece]]] = field(default_factory=list)
    faults: dict[int, tuple[str, str]] = field(default_factory=dict)


def read_chats(
    rows: str | Path,
    images: str | Path | None,
    style: Style,
    *,
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Chat]:
    """Yields one chat per row, in the order of the file. Rows of one id are numbered: `7`, `7#2`.

    Args:
        rows: JSON list, JSON lines or CSV.
        images: folder, tar or zip; None for texts alone, and for images inside the rows.
        drop_log: beside the reasons of `validate_chat`, chats get `bad_row` (no object, or no
            turns), `other_layout` (places marked as other formats do), `other_media`,
            `image_count`; turns `unknown_role`, `unknown_annotation`, `undeclared_frame`; boxes
            that no mark stands for are places of `box_without_phrase`.
    """
    seen: dict[str, int] = {}
    with _photos(rows, images, options, drop_log) as photos:
        for item, row in read_rows(rows, options.encoding):
            if not isinstance(row, dict):
                drop_log.add("chat", item, "bad_row", f"no JSON object: {shown(row)}")
                continue
            stated = id_key(row.get("id")) or id_key(row.get("question_id")) or item
            seen[stated] = seen.get(stated, 0) + 1
            told = _Told(stated if seen[stated] == 1 else f"{stated}#{seen[stated]}", row)
            chat = _to_chat(told, photos, style, drop_log)
            if chat is not None and (valid := validate_chat(chat, drop_log, told.faults)):
                yield valid


def _photos(
    rows: str | Path, images: str | Path | None, options: ReadOptions, drop_log: DropLog
) -> AbstractContextManager[Photos | None]:
    if images is None:
        return nullcontext()

    def names() -> list[tuple[str, ...]]:
        told = (row for _, row in read_rows(rows, options.encoding) if isinstance(row, dict))
        found = (name for row in told for name in stated_images(row))
        return [names_of(name) for name in found if isinstance(name, str)]

    return open_photos(images, drop_log, options, names)


def _to_chat(told: _Told, photos: Photos | None, style: Style, drop_log: DropLog) -> Chat | None:
    """The chat of a row, with boxes that are not looked at yet; None for a dropped one."""
    fault = _read_turns(told, style)
    if fault is None:
        found = {name: _find(name, photos, drop_log) for name in dict.fromkeys(told.names)}
        of_images = [found[name] for name in told.names]
        fault = next(((photo.fault, photo.found) for photo in of_images if photo.fault), None)
    if fault is not None:
        turns = [Turn("user", tuple(pieces)) for _, pieces in told.turns]
        drop_chat(Chat(told.id, [], turns, style.source), *fault, drop_log)
        return None
    turns = _Lift(told, of_images, style, drop_log).turns()
    images = [ChatImage(photo.data, 0, 0, photo.name) for photo in of_images]
    return Chat(told.id, images, turns, style.source, style.notation)


def _read_turns(told: _Told, style: Style) -> tuple[str, str] | None:
    """Fills in turns and images, and returns the fault of a row that is no chat."""
    messages = messages_of(told.row)
    listed = _listed_images(told.row)
    inline: list[str | bytes] = []
    media = [f"{key} {shown(told.row[key])}" for key in _OTHER_MEDIA if told.row.get(key)]
    num_marks = 0
    cut = not _has_parts(messages)
    for number, (role, content) in enumerate(messages):
        try:
            pieces, names = _pieces_of(content, num_marks, cut=cut)
        except TextFault as error:
            media.append(error.found)
            pieces, names = [], []
        if not isinstance(content, (str, list)):
            told.faults[number] = "bad_text", f"a turn of {shown(content)}"
        num_marks += sum(piece.kind == "image" for piece in pieces)
        inline += names
        told.turns.append((role, pieces))
    if not messages:
        return "bad_row", f"no turns; the row has {', '.join(list(map(str, told.row))[:8])}"
    if media:
        return "other_media", media[0]
    texts = ["".join(piece.text for piece in pieces) for _, pieces in told.turns]
    if layout := foreign_notation(texts, style.own_marks):
        return "other_layout", layout
    told.names = inline or listed
    if not inline and listed and not num_marks:
        _put_images_first(told)
        num_marks = len(listed)
    if num_marks != len(told.names):
        return "image_count", f"{num_marks} marks of images and {len(told.names)} images"
    return None


def _put_images_first(told: _Told) -> None:
    """Shows images that no mark stands for at the start of the first question."""
    marks = [Piece("image", "", index) for index in range(len(told.names))]
    for number, (role, pieces) in enumerate(told.turns):
        if _ROLES.get(role) == "user":
            told.turns[number] = (role, marks + pieces)
            return
    told.turns[0] = (told.turns[0][0], marks + told.turns[0][1])


def has_turns(row: Row) -> bool:
    return bool(messages_of(row))


def messages_of(row: Row) -> list[tuple[str, Any]]:
    """Lists (role, content) of the turns of a row, whatever its layout calls them."""
    listed = _of_json(row.get("conversations", row.get("messages", row.get("conversation"))))
    found: list[tuple[str, Any]] = []
    if isinstance(listed, list):
        for message in listed:
            of = as_dict(message)
            role = of.get("from", of.get("role"))
            found.append((str(role).strip().lower(), of.get("value", of.get("content"))))
    elif "query" in row or "response" in row:
        for pair in as_list(_of_json(row.get("history"))):
            both = [*as_list(pair), None, None][:2]
            found += [("user", both[0]), ("assistant", both[1])]
        found += [("user", row.get("query")), ("assistant", row.get("response"))]
    elif "question" in row and ("answer" in row or "cot_with_ans" in row):
        answer = row.get("cot_with_ans", row.get("answer"))
        found += [("user", row["question"]), ("assistant", answer)]
    system = row.get("system")
    if isinstance(system, str) and system and found and found[0][0] != "system":
        found.insert(0, ("system", system))
    return found


def _of_json(value: Any) -> Any:
    """The list that a text holds as JSON, as the cell of a CSV does; other values as they are."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass
    return value


def _has_parts(messages: Sequence[tuple[str, Any]]) -> bool:
    """Whether images are parts of their own; a mark in a text is a word then."""
    return any(isinstance(content, list) for _, content in messages)


def _pieces_of(content: Any, num_marks: int, *, cut: bool) -> tuple[list[Piece], list[str | bytes]]:
    """Cuts the content of a turn where images stand: the pieces, and images named inside.

    Args:
        cut: images stand as marks in the text.

    Raises:
        TextFault: a part that is neither a text nor an image.
    """
    if not isinstance(content, list):
        text = content if isinstance(content, str) else ""
        if not cut:
            return [words(text)], []
        names: list[str | bytes] = [*image_names_in(text)]
        return cut_at_images(text, num_marks, named=bool(names)), names
    pieces: list[Piece] = []
    names = []
    for part in content:
        of = as_dict(part)
        kind = str(of.get("type", "text" if isinstance(part, str) else ""))
        if kind in ("text", "input_text", "output_text"):
            said = part if isinstance(part, str) else of.get("text")
            pieces.append(words(said if isinstance(said, str) else ""))
        elif kind in ("image_url", "image", "input_image"):
            index = num_marks + sum(piece.kind == "image" for piece in pieces)
            pieces.append(Piece("image", "", index))
            names += _image_of_part(of)
        else:
            raise TextFault("other_media", f"a part {shown(part)}")
    return pieces, names


def _image_of_part(part: Row) -> list[str | bytes]:
    stated = next((part[key] for key in ("image_url", "image", "url", "path") if part.get(key)), "")
    stated = stated.get("url", "") if isinstance(stated, dict) else stated
    return [_content_of(stated)] if isinstance(stated, str) and stated else []


def _listed_images(row: Row) -> list[str | bytes]:
    stated = row.get("images", row.get("image", row.get("img_path", row.get("image_id"))))
    stated = _of_json(stated)
    listed = stated if isinstance(stated, list) else [] if stated in (None, "") else [stated]
    named = [of.get("path") or of.get("bytes") if isinstance(of, dict) else of for of in listed]
    return [_content_of(id_key(name) or "") for name in named]


def stated_images(row: Row) -> list[str | bytes]:
    """Lists the names of the images of a row, and the bytes of those inside it."""
    names = _listed_images(row)
    messages = messages_of(row)
    cut = not _has_parts(messages)
    for _, content in messages:
        if isinstance(content, str) and "<img>" not in content:
            continue  # most of them: this goes over each row of a large file
        try:
            names += _pieces_of(content, 0, cut=cut)[1]
        except TextFault:  # dropped when its turn comes
            continue
    return names


def _content_of(name: str) -> str | bytes:
    """The bytes behind a data URL; a name stays."""
    head, comma, payload = name.partition(",")
    if not (name.startswith("data:") and comma and head.endswith(";base64")):
        return name
    return from_base64(payload)


def _find(name: str | bytes, photos: Photos | None, drop_log: DropLog) -> Photo:
    if isinstance(name, bytes):
        fault = "" if name else "broken_image"
        found = "" if name else "a data URL that is no base64"
        return Photo("data URL", name, fault, found, drop_log)
    if photos is None:
        return Photo(name, b"", "missing_image", f"{shown(name)}; no --images is given")
    return photos.find(name)


class _Lift:
    """Lifts the places out of the texts of one row; see the notations of `chat_texts`."""

    def __init__(self, told: _Told, photos: list[Photo], style: Style, drop_log: DropLog) -> None:
        self.told = told
        self.photos = photos
        self.style = style
        self.drop_log = drop_log
        self.has_several = len({id(of) for of in photos}) > 1
        self.names = ImageNames()
        self.num_shown = 0  # images up to the turn that is read
        self.objects = _swift_objects(told.row) if style.source == "ms-swift" else {}
        self.refs = list(as_list(self.objects.get("ref")))
        self.boxes = list(enumerate(as_list(self.objects.get("bbox"))))

    def turns(self) -> list[Turn]:
        turns = []
        for number, (role, pieces) in enumerate(self.told.turns):
            lifted = pieces
            if role not in _ROLES:
                self.told.faults[number] = "unknown_role", f"{role!r}"
            try:
                lifted = self._turn(number, _ROLES.get(role, "user"), pieces)
            except TextFault as error:
                self.told.faults.setdefault(number, (error.reason, error.found))
            turns.append(Turn(_ROLES.get(role, "user"), tuple(lifted)))
            self.num_shown += sum(piece.kind == "image" for piece in pieces)
        self._drop_unused()
        return turns

    def _turn(self, number: int, role: Role, pieces: Sequence[Piece]) -> list[Piece]:
        last = self.num_shown - 1
        lifted: list[Piece] = []
        if self.has_several:
            self.names.read_turn(pieces, is_question=role == "user")
        for piece in pieces:
            if piece.kind == "image":
                last = piece.image
                lifted.append(piece)
                continue
            image = last if last >= 0 or not self.photos else 0
            lifted += self._words(piece, number, image, is_answer=role == "assistant")
        return lifted

    def _words(self, piece: Piece, number: int, image: int, *, is_answer: bool) -> list[Piece]:
        style, photo = self.style, self.photos[image] if self.photos else None
        pieces: list[Piece] = [piece]
        asked = self.names.asked if is_answer else None
        start = image if asked is None else asked

        def lift_of(find: Callable[[str, int, Photo | None], list[Match]]) -> list[Piece]:
            def found(text: str, of: int) -> list[Match]:
                return find(text, of, self.photos[of] if self.photos else None)

            return lift(pieces, lambda text: self.names.lifted(found, text, start))

        if style.source == "ms-swift":
            pieces = lift(pieces, self._find_swift)
        elif style.source == "ferret":
            pieces = lift_of(lambda text, of, _: self._find_ferret(text, number, of))
        elif style.source == "shikra":
            pieces = lift_of(lambda text, of, _: self._find_shikra(text, of, is_answer))
        if "<box>" in style.own_marks:
            pieces = lift_of(find_marked)
            pieces = lift_of(lambda text, of, photo: find_json(text, of, photo, style.frame))
        frame = style.frame
        if frame is not None and photo is not None:
            pieces = lift_of(
                lambda text, of, _: find_brackets(
                    text, of, self.photos[of], frame, is_answer=is_answer
                )
            )
        if photo is not None:
            left = sum(num_brackets(of.text) for of in pieces if of.kind == "words")
            self.drop_log.note(NUMBERS_AS_WORDS, left, example=self.told.id)
        if self.has_several and style.source != "ms-swift":
            is_named = asked is not None or self.names.are_in(pieces[0].text)
            num_boxes = 0 if is_named else sum(bool(of.boxes or of.points) for of in pieces)
            self.drop_log.note(LAST_SHOWN, num_boxes, example=self.told.id)
        return pieces

    def _find_swift(self, text: str) -> list[Match]:
        """Reads `<ref-object>` and `<bbox>`, which take the next of `objects` each."""
        kind = str(self.objects.get("bbox_type") or "real")
        matches = []
        for match in _SWIFT.finditer(text):
            phrase = ""
            if match.group().startswith("<ref-object>"):
                if not self.refs:
                    raise TextFault("unknown_annotation", f"{match.group()} without a ref")
                phrase = str(self.refs.pop(0))
            taken = [self._next_box() for _ in range(match.group().count("<bbox>"))]
            if kind not in _SWIFT_FRAMES:
                raise TextFault("undeclared_frame", f"bbox_type {kind!r}")
            for start, end, of_image, rows in _runs(match, taken):
                piece = Piece("place", text[start:end], phrase=phrase)
                if rows:
                    of = self._swift_place(text[start:end], of_image, rows, _SWIFT_FRAMES[kind])
                    piece = Piece("place", of.text, of_image, phrase, of.boxes, of.points)
                matches.append(Match(start, end, piece))
                phrase = ""
        return matches

    def _next_box(self) -> tuple[int, Any]:
        """(image, box) of the next `<bbox>`."""
        if not self.boxes:
            raise TextFault("unknown_annotation", "more <bbox> marks than boxes")
        index, row = self.boxes.pop(0)
        images = as_list(self.objects.get("image_id"))
        image = images[index] if index < len(images) else 0
        if type(image) is not int or not 0 <= image < len(self.photos):
            raise TextFault("unknown_image", f"image_id {image!r} of {len(self.photos)} images")
        return image, row

    def _swift_place(self, text: str, image: int, rows: list[Any], frame: Frame) -> Piece:
        flat = [row for of in rows for row in (of if _is_nested(of) else [of])]
        sizes = [as_list(self.objects.get(name)) for name in ("width", "height")]
        photo = self.photos[image]
        listed = [as_list(row) for row in flat]
        if frame == "pixels" and all(image < len(size) for size in sizes):
            of = photo.frame(sizes[0][image], sizes[1][image])
            boxes = of.from_xyxy([row for row in listed if len(row) != 2])
            points = of.from_xyxy([[*row, *row] for row in listed if len(row) == 2])
            at = tuple((x, y) for x, y, _, _ in points)
            return Piece("place", text, image, boxes=tuple(boxes), points=at)
        return place(text, image, photo, frame, listed)

    def _find_ferret(self, text: str, number: int, image: int) -> list[Match]:
        listed = as_list(self.told.row.get("box_x1y1x2y2"))
        boxes = as_list(listed[number]) if number < len(listed) else []
        matches = []
        for match in _FERRET.finditer(text):
            index = int(match[1])
            if index >= len(boxes) or not self.photos:
                raise TextFault("unknown_annotation", f"{match[0]}, of {len(boxes)} boxes")
            size = self.told.row.get("image_w"), self.told.row.get("image_h")
            found = tuple(self.photos[image].frame(*size).from_xyxy([boxes[index]]))
            matches.append(Match(*match.span(), Piece("place", match[0], image, boxes=found)))
        return matches

    def _find_shikra(self, text: str, image: int, is_answer: bool) -> list[Match]:
        key = "answer_boxes_seq" if is_answer else "question_boxes_seq"
        sequence = as_list(self.told.row.get(key, self.told.row.get("boxes_seq")))
        boxes = as_list(self.told.row.get("boxes"))
        matches = []
        for count, match in enumerate(_SHIKRA.finditer(text)):
            indices = as_list(sequence[count]) if count < len(sequence) else []
            if any(type(i) is not int or not 0 <= i < len(boxes) for i in indices):
                raise TextFault("unknown_annotation", f"boxes {indices} of {len(boxes)}")
            size = self.told.row.get("width"), self.told.row.get("height")
            found: Any = ()
            if indices and self.photos:
                found = self.photos[image].frame(*size).from_xyxy([boxes[i] for i in indices])
            at = image if found else -1
            matches.append(
                Match(*match.span(), Piece("place", match[0], at, match[1], tuple(found)))
            )
        return matches

    def _drop_unused(self) -> None:
        """Counts the boxes that no mark stands for."""
        unused = [row for _, row in self.boxes]
        if self.style.source == "ferret":
            unused = _unmarked_in(self.told)
        for row in unused:
            self.drop_log.add("place", self.told.id, "box_without_phrase", row)


def _unmarked_in(told: _Told) -> list[Any]:
    """Ferret's boxes that no mark of their turn stands for."""
    unused = []
    for number, boxes in enumerate(as_list(told.row.get("box_x1y1x2y2"))):
        pieces = told.turns[number][1] if number < len(told.turns) else []
        marked = {int(index) for piece in pieces for index in _FERRET.findall(piece.text)}
        unused += [box for index, box in enumerate(as_list(boxes)) if index not in marked]
    return unused


def _swift_objects(row: Row) -> Row:
    """ms-swift's `objects`; those of version 2 (a list, or its JSON) in the layout of today."""
    stated = row.get("objects")
    if isinstance(stated, str):
        try:
            stated = json.loads(stated)
        except ValueError:
            stated = None
    if isinstance(stated, list):
        listed = [as_dict(one) for one in stated]
        kinds = [str(one["bbox_type"]) for one in listed if one.get("bbox_type")]
        return {
            "ref": [one.get("caption", "") for one in listed],
            "bbox": [one.get("bbox") for one in listed],
            "image_id": [one.get("image", 0) for one in listed],
            "bbox_type": kinds[0] if len(set(kinds)) == 1 else kinds or None,
        }
    return as_dict(stated)


def _runs(
    match: re.Match[str], taken: Sequence[tuple[int, Any]]
) -> Iterator[tuple[int, int, int, list[Any]]]:
    """Parts marks where the image of their boxes changes: (start, end, image, boxes)."""
    start, end = match.span()
    if len({image for image, _ in taken}) <= 1:
        yield start, end, taken[0][0] if taken else -1, [row for _, row in taken]
        return
    text = match.group()
    for image, row in taken:
        stop = text.index("<bbox>", start - match.start()) + len("<bbox>") + match.start()
        yield start, stop, image, [row]
        start = stop


def _is_nested(row: Any) -> bool:
    return isinstance(row, list) and bool(row) and all(isinstance(one, list) for one in row)
