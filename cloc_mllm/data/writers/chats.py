"""Chats to the layouts of LLaVA, ms-swift and OpenAI's messages; words are kept to the letter.

Places of chats that came in the target's own notation are written as they came. Others are written
anew from their boxes, so their texts change and nothing else does.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, TextIO

from cloc_mllm.box import Box
from cloc_mllm.data.chats import IMAGE_MARK, Chat, ChatImage, Piece, Turn
from cloc_mllm.data.storage import new_directory
from cloc_mllm.data.writers import write_images
from cloc_mllm.data.writers.llava import box_text, to_padded

Frame = Literal["padded", "original"]
_LLAVA_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}
_PIXEL_DECIMALS = 4


def write_llava_chats(
    chats: Iterable[Chat], directory: str | Path, *, frame: Frame, decimals: int = 3
) -> Counter[str]:
    """Writes `llava.json` and `images/`, one row per chat.

    Args:
        frame, decimals: of boxes that are written anew, as for `write_llava`.

    Returns:
        counts of `chats`, `turns` and `places` written, and of points, which LLaVA's layout has no
        notation for: they are written as `[x, y]`.
    """

    def row(chat: Chat, names: list[str]) -> dict[str, Any]:
        own = chat.notation == f"llava {frame}"
        turns = [
            {
                "from": _LLAVA_ROLES[turn.role],
                "value": _text(turn, lambda piece: _bracketed(piece, chat, own, frame, decimals)),
            }
            for turn in chat.turns
        ]
        image = {"image": names[0] if len(names) == 1 else names} if names else {}
        return {"id": chat.id, **image, "conversations": turns}

    return _write(chats, directory, "llava.json", row, is_list=True)


def write_ms_swift_chats(chats: Iterable[Chat], directory: str | Path) -> Counter[str]:
    """Writes `rows.jsonl` and `images/`. Frame: `bbox_type` is `real`, pixels of the image."""

    def row(chat: Chat, names: list[str]) -> dict[str, Any]:
        objects: dict[str, Any] = {"ref": [], "bbox": [], "image_id": []}

        def marked(piece: Piece) -> str:
            is_own, num_marks = chat.source == "ms-swift", _num_marks(piece.text)
            if is_own and not num_marks:  # written into the text, as Qwen's models answer
                return piece.text
            rows = _pixels(piece, chat.images[piece.image]) if piece.image >= 0 else []
            marks = "<bbox>" * len(rows)
            if piece.phrase:
                objects["ref"].append(piece.phrase)
                marks = "<ref-object>" + marks
            objects["bbox"] += rows
            objects["image_id"] += [piece.image] * len(rows)
            return piece.text if is_own and num_marks == _num_marks(marks) else marks

        messages = [{"role": turn.role, "content": _text(turn, marked)} for turn in chat.turns]
        told = {"objects": {**objects, "bbox_type": "real"}} if any(objects.values()) else {}
        images = {"images": [f"images/{name}" for name in names]} if names else {}
        return {"id": chat.id, "messages": messages, **images, **told}

    return _write(chats, directory, "rows.jsonl", row)


def write_openai_chats(
    chats: Iterable[Chat], directory: str | Path, *, decimals: int = 3
) -> Counter[str]:
    """Writes `messages.jsonl` and `images/`; images are parts whose url is the file's path.

    Places of notations that are texts of their own (brackets, Qwen's and InternVL's marks) stay as
    they are; those that need a list beside the text (Ferret, ms-swift, Shikra) become
    `[x1, y1, x2, y2]` in 0..1 of the original image.
    """

    def row(chat: Chat, names: list[str]) -> dict[str, Any]:
        listed = chat.notation.split(" ")[0] in ("ferret", "ms-swift", "shikra")

        def written(piece: Piece) -> str:
            own = not listed or _num_marks(piece.text) + piece.text.count("<ph_st>") == 0
            own = own and "<bbox_location" not in piece.text
            return _bracketed(piece, chat, own, "original", decimals)

        messages = [
            {"role": turn.role, "content": _content(turn, names, written)} for turn in chat.turns
        ]
        return {"id": chat.id, "messages": messages}

    return _write(chats, directory, "messages.jsonl", row)


def _write(
    chats: Iterable[Chat],
    directory: str | Path,
    name: str,
    row: Callable[[Chat, list[str]], dict[str, Any]],
    *,
    is_list: bool = False,
) -> Counter[str]:
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        folder = stack.enter_context(new_directory(directory))
        file: TextIO = stack.enter_context((folder / name).open("w", encoding="utf-8"))
        file.write("[" if is_list else "")
        for chat in chats:
            written = row(chat, write_images(chat, folder / "images"))
            before = (",\n" if counts["chats"] else "\n") if is_list else ""
            text = json.dumps(written, ensure_ascii=False)
            file.write(before + text + ("" if is_list else "\n"))
            counts["chats"] += 1
            counts["turns"] += len(chat.turns)
            for piece in chat.places:
                counts["places"] += 1
                counts["points"] += len(piece.points)
        file.write("\n]\n" if is_list else "")
    return counts


def _text(turn: Turn, write_place: Callable[[Piece], str]) -> str:
    """The text of a turn; an image that its source only listed gets no mark."""
    texts = {"words": lambda piece: piece.text, "place": write_place, "image": _image_text}
    return "".join(texts[piece.kind](piece) for piece in turn.pieces)


def _image_text(piece: Piece) -> str:
    return IMAGE_MARK if piece.text else ""


def _content(
    turn: Turn, names: list[str], write_place: Callable[[Piece], str]
) -> str | list[dict[str, Any]]:
    if all(piece.kind != "image" for piece in turn.pieces):
        return _text(turn, write_place)
    parts: list[dict[str, Any]] = []
    for piece in turn.pieces:
        if piece.kind == "image":
            url = f"images/{names[piece.image]}"
            parts.append({"type": "image_url", "image_url": {"url": url}})
            continue
        text = piece.text if piece.kind == "words" else write_place(piece)
        if parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += text
        else:
            parts.append({"type": "text", "text": text})
    return parts


def _bracketed(piece: Piece, chat: Chat, own: bool, frame: Frame, decimals: int) -> str:
    if own:
        return piece.text
    texts = [piece.phrase] if piece.phrase else []
    for box in piece.boxes:
        texts.append(box_text(_in_frame(box, chat.images[piece.image], frame), decimals))
    for x, y in piece.points:
        at = _in_frame((x, y, x, y), chat.images[piece.image], frame)
        texts.append(box_text(at[:2], decimals))
    return " ".join(texts)


def _in_frame(box: Box, image: ChatImage, frame: Frame) -> Box:
    return box if frame == "original" else to_padded(box, image.width, image.height)


def _pixels(piece: Piece, image: ChatImage) -> list[list[float]]:
    size = (image.width, image.height) * 2
    return [
        [round(value * side, _PIXEL_DECIMALS) for value, side in zip(row, size, strict=False)]
        for row in (*piece.boxes, *piece.points)
    ]


def _num_marks(text: str) -> int:
    return text.count("<bbox>") + text.count("<ref-object>")
