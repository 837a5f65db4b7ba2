"""What the Parquet columns of records and chats are, as Hugging Face `datasets` features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

from cloc_mllm.box import Box
from cloc_mllm.data.chats import Chat, ChatImage, Piece, Turn
from cloc_mllm.data.records import Record, Region

if TYPE_CHECKING:
    from datasets import Features

SetKind = Literal["records", "chats"]


def features_of(kind: SetKind) -> Features:
    return record_features() if kind == "records" else chat_features()


def record_features() -> Features:
    """The `datasets` features of a record: what the Parquet columns are."""
    from datasets import Features, Image, List, Value

    text = Value("string")
    region = {
        "box": List(Value("float64"), length=4),
        "phrase": text,
        "score": Value("float64"),
        "expressions": List(text),
        "category": text,
        "group": text,
    }
    return Features(
        {
            "id": text,
            "image": Image(),
            "width": Value("int32"),
            "height": Value("int32"),
            "captions": List(text),
            "regions": List(region),
            "source": text,
        }
    )


def chat_features() -> Features:
    """The `datasets` features of a chat."""
    from datasets import Features, Image, List, Value

    text = Value("string")
    image = {"image": Image(), "width": Value("int32"), "height": Value("int32"), "name": text}
    piece = {
        "kind": text,
        "text": text,
        "image": Value("int32"),
        "phrase": text,
        "boxes": List(List(Value("float64"), length=4)),
        "points": List(List(Value("float64"), length=2)),
    }
    return Features(
        {
            "id": text,
            "images": List(image),
            "turns": List({"role": text, "pieces": List(piece)}),
            "source": text,
            "notation": text,
        }
    )


def image_bytes_column(kind: SetKind) -> str:
    """The column that holds the image files, as Parquet names it."""
    return "image.bytes" if kind == "records" else "images.list.element.image.bytes"


def columns_without_images(kind: SetKind) -> list[str]:
    """The columns to read where nobody looks at the images."""
    names = [name for name in features_of(kind) if name not in ("image", "images")]
    fields = ("width", "height", "name") if kind == "chats" else ()
    return names + [f"images.list.element.{name}" for name in fields]


def to_row(item: Record | Chat) -> dict[str, Any]:
    row = dict(vars(item))
    if isinstance(item, Record):
        row["image"] = _stored_image(item.image)
        row["regions"] = [region.stored() for region in item.regions]
        return row
    row["images"] = [{**vars(of), "image": _stored_image(of.image)} for of in item.images]
    row["turns"] = [
        {"role": turn.role, "pieces": [vars(piece) for piece in turn.pieces]} for turn in item.turns
    ]
    return row


def from_row(kind: SetKind, row: dict[str, Any]) -> Record | Chat:
    """The record or chat of a row; an image that was not read is b""."""
    return _to_record(row) if kind == "records" else _to_chat(row)


def _stored_image(data: bytes) -> dict[str, Any]:
    return {"bytes": data, "path": None}


def _bytes_of(image: dict[str, Any] | None) -> bytes:
    return image["bytes"] if image else b""


def _to_record(row: dict[str, Any]) -> Record:
    regions = [Region(**{**region, "box": tuple(region["box"])}) for region in row["regions"]]
    return Record(**{**row, "image": _bytes_of(row.get("image")), "regions": regions})


def _to_chat(row: dict[str, Any]) -> Chat:
    images = [
        ChatImage(**{**image, "image": _bytes_of(image.get("image"))}) for image in row["images"]
    ]
    turns = [Turn(turn["role"], tuple(map(_to_piece, turn["pieces"]))) for turn in row["turns"]]
    return Chat(row["id"], images, turns, row["source"], row["notation"])


def _to_piece(row: dict[str, Any]) -> Piece:
    boxes = tuple(cast(Box, tuple(box)) for box in row["boxes"])
    points = tuple((x, y) for x, y in row["points"])
    return Piece(row["kind"], row["text"], row["image"], row["phrase"], boxes, points)
