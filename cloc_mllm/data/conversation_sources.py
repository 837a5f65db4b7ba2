"""The conversation formats that `cloc-mllm data build` reads, as chats or as regions."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from cloc_mllm.data.chats import Chat
from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.data.readers import ReadOptions
from cloc_mllm.data.readers.chat_texts import Frame
from cloc_mllm.data.readers.chats import has_turns, read_chats, style_of
from cloc_mllm.data.readers.ferret import read_ferret
from cloc_mllm.data.readers.llava import read_llava
from cloc_mllm.data.readers.ms_swift import read_ms_swift
from cloc_mllm.data.readers.qwen_vl import read_qwen_vl
from cloc_mllm.data.readers.shikra import read_shikra
from cloc_mllm.data.records import Record
from cloc_mllm.data.texts import read_rows
from cloc_mllm.data.values import as_dict

ConversationKind = Literal["chats", "regions"]
CHATS_ALONE = ("internvl", "llama-factory", "openai")  # formats that are not read as regions
CONVERSATIONS = ("llava", "ferret", "qwen-vl", "ms-swift", "shikra", *CHATS_ALONE)
Add = Callable[..., argparse.ArgumentParser]


def add_conversations(sources: Any, add: Add) -> None:
    """Adds the formats of conversations, read as chats or, where they can be, as regions.

    Args:
        add: adds a source that reads files: `add(sources, name, summary, read, **paths)`.
    """
    for name, summary, read, frames in (
        ("llava", "LLaVA's conversations with [x1, y1, x2, y2] in the text", read_llava, True),
        ("ferret", "Ferret's conversations with <bbox_location0>", read_ferret, False),
        ("qwen-vl", "Qwen-VL's conversations, or referring lines", read_qwen_vl, True),
        ("ms-swift", "ms-swift's messages with <bbox> and objects", read_ms_swift, True),
        ("shikra", "Shikra's questions and answers, or referring lines", read_shikra, False),
        ("internvl", "InternVL's conversations with <box>[[...]]</box>", None, True),
        ("llama-factory", "LLaMA-Factory's ShareGPT or OpenAI messages", None, True),
        ("openai", "OpenAI's chat JSON lines, with image parts or texts alone", None, True),
    ):
        parser = add(
            sources,
            name,
            summary,
            _read_conversations(name, read),
            rows="JSON list, JSON lines or CSV",
        )
        parser.add_argument(
            "--images", metavar="PATH", type=Path, help="folder, tar or zip; none for texts alone"
        )
        if frames:
            _add_frame(parser, name)
        kinds = ("chats", "regions") if read is not None else ("chats",)
        parser.add_argument(
            "--as",
            dest="kind",
            choices=kinds,
            default="",
            help="`chats` keeps every turn (default); `regions` makes records of the boxes and "
            "what is said of them, and counts what is not kept"
            if read is not None
            else "every turn is kept",
        )


def add_kind(parser: argparse.ArgumentParser) -> None:
    """Adds `args.conversations_as`: what `build auto` and `doctor` read conversations as."""
    parser.add_argument(
        "--as",
        dest="conversations_as",
        choices=get_args(ConversationKind),
        default="",
        help="read conversations as chats (default) or as records of the boxes in them; other "
        "files are records always",
    )


def _add_frame(parser: argparse.ArgumentParser, name: str) -> None:
    is_llava = name == "llava"
    parser.add_argument(
        "--frame",
        choices=get_args(Frame),
        required=is_llava,
        help="what numbers in brackets and in JSON answers (bbox_2d) are of: 0..1 of the image "
        "padded to a square (LLaVA-1.5's mix), 0..1 of the original image, pixels, or hundredths "
        "or thousandths of width and height; `cloc-mllm data doctor` shows which"
        + ("" if is_llava else ". Without it brackets are words. Marks need none"),
    )


def _read_conversations(name: str, read_regions: Any) -> Any:
    def read(
        args: argparse.Namespace, options: ReadOptions, drop_log: DropLog
    ) -> Iterator[Record] | Iterator[Chat]:
        args.kind = args.kind or _kind_of(args.rows, args.encoding)
        frame = vars(args).get("frame")
        if args.kind == "chats":
            if options.max_side:
                raise ValueError("--max_side is for records; chats keep their images as they are")
            style = style_of(name, frame)
            return read_chats(args.rows, args.images, style, options=options, drop_log=drop_log)
        if args.images is None:
            raise ValueError("regions need --images, the folder, tar or zip of the photos")
        more = {"frame": frame} if name == "llava" else {}
        return read_regions(args.rows, args.images, **more, options=options, drop_log=drop_log)

    return read


def _kind_of(rows: Path, encoding: str) -> str:
    """Files whose first row is a text with boxes and holds no turns have nothing but regions."""
    _, first = next(read_rows(rows, encoding), ("", None))
    first = as_dict(first)
    is_line = bool({"bbox", "sentence", "text"} & first.keys()) and not has_turns(first)
    return "regions" if is_line else "chats"
