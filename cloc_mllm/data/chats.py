"""The chat (turns about any number of images) and the rules that decide what may become one.

A turn is a list of pieces. Words are kept to the letter. A coordinate whose frame the source
declares is never a word: it is a place, in the frame of the upright image, beside the text that
the source wrote for it. So a chat can be written in any box format, and in the source's own again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

from PIL import Image

from cloc_mllm.box import Box
from cloc_mllm.data.drop_log import DropLog, shown
from cloc_mllm.data.images import ImageError, change_of, open_image, storable
from cloc_mllm.data.records import check_box

Role = Literal["system", "user", "assistant"]
PieceKind = Literal["words", "image", "place"]
Point = tuple[float, float]

IMAGE_MARK = "<image>"
REGION_MARK = "<region>"


@dataclass(frozen=True)
class Piece:
    """A part of a turn.

    Attributes:
        kind: `words`; `image`, where an image stands; `place`, a phrase, boxes or points of an
            image, or a phrase with its boxes.
        text: the piece as its source writes it, to the letter; "" for an image that the source
            only lists.
        image: which of the chat's images it is, or is of; -1 for words and for a phrase alone.
        phrase: the words that name a place where the source marks them; "" elsewhere.
        boxes: xyxy, normalised to the upright image.
        points: xy, normalised to the upright image.
    """

    kind: PieceKind
    text: str
    image: int = -1
    phrase: str = ""
    boxes: tuple[Box, ...] = ()
    points: tuple[Point, ...] = ()


def words(text: str) -> Piece:
    return Piece("words", text)


def image_mark(image: int, text: str = IMAGE_MARK) -> Piece:
    return Piece("image", text, image)


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: Role
    pieces: tuple[Piece, ...]

    @property
    def text(self) -> str:
        """The turn as its source writes it, to the letter."""
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True)
class ChatImage:
    """An image of a chat: the encoded file; `width` and `height` are those of `load_image`."""

    image: bytes
    width: int
    height: int
    name: str

    @property
    def id(self) -> str:
        return self.name

    def load_image(self) -> Image.Image:
        return open_image(self.image, name=self.name)


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        images: the n-th is the one that the n-th image piece of the turns shows.
        turns: at most one system turn, then user and assistant in turn.
        source: the format it came from.
        notation: how the texts of its places are written, such as `llava padded`; a writer of the
            same notation gives them back to the letter.
    """

    id: str
    images: list[ChatImage]
    turns: list[Turn]
    source: str
    notation: str = ""

    @property
    def places(self) -> Iterator[Piece]:
        """The pieces that have boxes or points."""
        pieces = (piece for turn in self.turns for piece in turn.pieces)
        return (piece for piece in pieces if piece.boxes or piece.points)


class PlaceText(Protocol):
    """`mllm.coordinates.BoxFormat`, as far as chats need it."""

    @property
    def separator(self) -> str: ...

    @property
    def answer_separator(self) -> str: ...

    def encode(self, box: Box) -> str: ...

    def answer(self, box: Box) -> str: ...

    def encode_point(self, point: Point) -> str: ...

    def linked(self, phrase: str, places: str) -> str: ...


class MentionedBox(NamedTuple):
    """A box that a turn mentions, of one of the chat's images."""

    image: int
    box: Box


def write_turn(turn: Turn, box_format: PlaceText, *, region_tokens: bool = False) -> str:
    """Writes a turn in a box format; `Turn.text` is the source's own.

    A phrase that the source marks is linked to its places, as in the grounded captions of records:
    `<p>two dogs</p>BOXES`. What merely stands before a box stays words. Points are written as two
    numbers of the format, also where boxes of answers come from a box head, each behind a blank:
    location tokens of two points in a row would be a box.

    Args:
        region_tokens: writes ` <region>` behind each box of a question; `mentioned_boxes` lists
            what they stand for.
    """
    is_answer = turn.role == "assistant"

    def written(piece: Piece) -> str:
        if piece.kind == "words":
            return piece.text
        if piece.kind == "image":
            return IMAGE_MARK
        separator = box_format.separator
        if is_answer:
            places = [box_format.answer(box) for box in piece.boxes]
            separator = box_format.answer_separator
        else:
            mark = f" {REGION_MARK} " if region_tokens else ""
            places = [box_format.encode(box) + mark for box in piece.boxes]
        points = [box_format.encode_point(point) for point in piece.points]
        text = " ".join(filter(None, [separator.join(places).rstrip(), *points]))
        return (
            box_format.linked(piece.phrase, text) if piece.phrase and text else piece.phrase + text
        )

    return "".join(map(written, turn.pieces))


def mentioned_boxes(turn: Turn) -> list[MentionedBox]:
    """Lists the boxes of a turn in the order in which it mentions them."""
    return [MentionedBox(piece.image, box) for piece in turn.pieces for box in piece.boxes]


def exchanges_of(chat: Chat) -> list[list[Turn]]:
    """Cuts a chat behind each answer; a system turn belongs to the first exchange."""
    exchanges: list[list[Turn]] = [[]]
    for turn in chat.turns:
        exchanges[-1].append(turn)
        if turn.role == "assistant":
            exchanges.append([])
    return [exchange for exchange in exchanges if exchange]


def validate_chat(
    chat: Chat, drop_log: DropLog, faults: Mapping[int, tuple[str, str]] | None = None
) -> Chat | None:
    """Takes everything unusable out of a chat and counts each drop by its reason.

    No other place decides. A chat is kept up to its first exchange (a question with its answer)
    that cannot be used; this one and what follows it are dropped. Without an exchange the chat is
    dropped, and its turns and places under the same reason.

    | kind | reason | rule |
    |---|---|---|
    | chat | `missing_id`, `duplicate_id` | the id is empty, or was delivered before |
    | chat | `missing_image`, `not_an_image`, ... | an image cannot be used, as for records |
    | turn | `role_order` | a system turn not at the start, or two turns of one side in a row |
    | turn | `no_answer` | the last question has none |
    | turn | `empty_text` | nothing but white space |
    | turn | `image_in_answer` | an answer shows an image |
    | turn | `bad_text` | not encodable as UTF-8 (a lone surrogate) |
    | turn | `not_finite`, `inverted`, `zero_area`, `outside`, `mostly_outside` | of a box, as for
      records; boxes of less than a pixel are kept |
    | turn | `not_finite`, `outside` | of a point |
    | turn | `unknown_image` | a place of an image that is not shown up to then |

    Boxes that stick out otherwise are clipped to their image. Images that only dropped turns show
    go with them.

    Args:
        faults: number of a turn -> a reason why its reader cannot use it, and what was found.

    Returns:
        the chat, or None if nothing of it can be used.
    """
    if not chat.id.strip() or chat.id in drop_log.delivered_ids:
        drop_chat(chat, "duplicate_id" if chat.id.strip() else "missing_id", chat.id, drop_log)
        return None
    _show_stated_boxes(chat, drop_log)
    try:
        images = [_checked_image(image, drop_log) for image in chat.images]
    except ImageError as error:
        drop_chat(chat, error.reason, error.detail, drop_log)
        return None
    kept, fault, found = _kept_turns(chat, images, faults or {})
    if not kept:
        drop_chat(chat, fault or "no_turns", found, drop_log)
        return None
    rest = replace(chat, turns=chat.turns[len(kept) :])
    _drop_parts(rest, fault, found, drop_log, first_turn=len(kept))
    valid = replace(chat, images=images[: sum(map(_num_shown, kept))], turns=kept)
    drop_log.deliver(chat.id, "chat", turn=len(kept), place=sum(1 for _ in valid.places))
    return valid


def _show_stated_boxes(chat: Chat, drop_log: DropLog) -> None:
    """Shows the boxes of each image, as they are stated, to who watches the reader."""
    if drop_log.watch is None:
        return
    stated: list[list[tuple[Box, str]]] = [[] for _ in chat.images]
    for piece in chat.places:
        if piece.image < len(stated):
            stated[piece.image] += [(box, piece.phrase) for box in piece.boxes]
    for image, of in zip(chat.images, stated, strict=True):
        drop_log.watch(image.image, [box for box, _ in of], [phrase for _, phrase in of])


def _kept_turns(
    chat: Chat, images: Sequence[ChatImage], faults: Mapping[int, tuple[str, str]]
) -> tuple[list[Turn], str, str]:
    """The turns of the exchanges up to the first fault, the fault, and what was found."""
    kept: list[Turn] = []
    waiting: list[Turn] = []  # an exchange whose answer has not come
    num_shown = 0
    for number, turn in enumerate(chat.turns):
        num_shown += _num_shown(turn)
        fault, found = faults.get(number) or _order_fault(turn, [*kept[-1:], *waiting])
        if not fault:
            checked, fault, found = _checked_turn(turn, images[:num_shown])
            waiting.append(checked)
        if fault:
            return kept, fault, found
        if turn.role == "assistant":
            kept += waiting
            waiting = []
    if waiting:
        return kept, "no_answer", f"{len(waiting)} turns behind the last answer"
    return kept, "", ""


def _num_shown(turn: Turn) -> int:
    return sum(piece.kind == "image" for piece in turn.pieces)


def drop_chat(chat: Chat, reason: str, found: object, drop_log: DropLog) -> None:
    """Counts a chat, its turns and its places as dropped."""
    drop_log.add("chat", chat.id, reason, found)
    _drop_parts(chat, reason, found, drop_log)


def _drop_parts(
    chat: Chat, reason: str, found: object, drop_log: DropLog, first_turn: int = 0
) -> None:
    for number, turn in enumerate(chat.turns, first_turn):
        drop_log.add("turn", f"{chat.id}/{number}", reason, found)
        num_places = sum(bool(piece.boxes or piece.points) for piece in turn.pieces)
        drop_log.add("place", f"{chat.id}/{number}", reason, found, num_places)


def _checked_image(image: ChatImage, drop_log: DropLog) -> ChatImage:
    data, old_format = storable(image.image, name=image.name)
    upright = open_image(data, name=image.name)
    if change := change_of(data, old_format):
        drop_log.note_once(change, image.name)
    return replace(image, image=data, width=upright.width, height=upright.height)


def _order_fault(turn: Turn, before: Sequence[Turn]) -> tuple[str, str]:
    last = before[-1].role if before else ""
    allowed: dict[str, tuple[str, ...]] = {
        "": ("system", "user"),
        "system": ("user",),
        "user": ("assistant",),
        "assistant": ("user",),
    }
    if turn.role in allowed[last]:
        return "", ""
    return "role_order", f"a turn of the {turn.role} {f'behind the {last}' if last else 'first'}"


def _checked_turn(turn: Turn, images: Sequence[ChatImage]) -> tuple[Turn, str, str]:
    """The turn with its boxes clipped, and the first fault with what was found."""
    if not turn.text.strip() and all(piece.kind == "words" for piece in turn.pieces):
        return turn, "empty_text", f"nothing said by the {turn.role}"
    if turn.role == "assistant" and any(piece.kind == "image" for piece in turn.pieces):
        return turn, "image_in_answer", shown(turn.text)
    try:
        "".join(piece.text + piece.phrase for piece in turn.pieces).encode()
    except UnicodeEncodeError:
        return turn, "bad_text", shown(turn.text)
    pieces = []
    for piece in turn.pieces:
        if piece.image >= len(images):
            found = f"{shown(piece.text)} of image {piece.image + 1}; {len(images)} are shown"
            return turn, "unknown_image", found
        boxes, fault = _checked_boxes(piece.boxes)
        if fault := fault or next(filter(None, map(_point_fault, piece.points)), ""):
            of = images[piece.image]
            found = f"{shown(piece.text)} in a picture of {of.width} x {of.height}"
            return turn, fault, found
        pieces.append(replace(piece, boxes=boxes))
    return replace(turn, pieces=tuple(pieces)), "", ""


# so large that no box has less than a pixel: what a chat mentions may be small
_ANY_SIZE = (1 << 40, 1 << 40)


def _checked_boxes(boxes: Sequence[Box]) -> tuple[tuple[Box, ...], str]:
    checked = []
    for box in boxes:
        clipped, fault = check_box(box, _ANY_SIZE)
        if clipped is None:
            return (), str(fault)
        checked.append(clipped)
    return tuple(checked), ""


def _point_fault(point: Point) -> str:
    if not all(map(math.isfinite, point)):
        return "not_finite"
    return "" if all(0 <= value <= 1 for value in point) else "outside"
