"""Describes a data set with numbers, as plain text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cloc_mllm.data.chats import Chat
from cloc_mllm.data.drop_log import note_line, set_aside_lines
from cloc_mllm.data.records import Record

_AREA_EDGES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
_ASPECT_EDGES = (0.0, 0.67, 0.9, 1.1, 1.5, float("inf"))
_NUM_TOP_PHRASES = 10


def describe_records(records: Iterable[Record]) -> str:
    """Writes a table of counts and distributions; reads each record once, decodes no image."""
    totals: Counter[str] = Counter()
    regions_per_image: list[int] = []
    phrase_words: list[int] = []
    areas: list[float] = []
    aspects: list[float] = []
    phrases: Counter[str] = Counter()
    for record in records:
        totals["records"] += 1
        totals["captions"] += len(record.captions)
        totals["without captions"] += not record.captions
        totals["without regions"] += not record.regions
        totals["expressions"] += sum(len(region.expressions) for region in record.regions)
        regions_per_image.append(len(record.regions))
        aspects.append(record.width / record.height)
        for region in record.regions:
            x1, y1, x2, y2 = region.box
            areas.append((x2 - x1) * (y2 - y1))
            phrase_words.append(len(region.phrase.split()))
            phrases[region.phrase.lower()] += 1
    totals["regions"] = len(areas)
    totals["distinct phrases"] = len(phrases)
    sections = [
        _counts("", list(totals.items())),
        _counts(
            "",
            [
                ("regions per image", _spread(regions_per_image)),
                ("words per phrase", _spread(phrase_words)),
            ],
        ),
        _counts("box area, share of the image", _histogram(areas, _AREA_EDGES)),
        _counts("image width / height", _histogram(aspects, _ASPECT_EDGES)),
        _counts("most frequent phrases", phrases.most_common(_NUM_TOP_PHRASES)),
    ]
    return "\n\n".join(section for section in sections if section)


def describe_chats(chats: Iterable[Chat]) -> str:
    """The same for chats."""
    totals: Counter[str] = Counter({"chats": 0})
    turns_per_chat: list[int] = []
    images_per_chat: list[int] = []
    words: dict[str, list[int]] = {"user": [], "assistant": []}
    areas: list[float] = []
    phrases: Counter[str] = Counter()
    for chat in chats:
        places = list(chat.places)
        totals["chats"] += 1
        totals["without images"] += not chat.images
        totals["without places"] += not places
        totals["turns"] += len(chat.turns)
        totals["of the system"] += sum(turn.role == "system" for turn in chat.turns)
        totals["boxes"] += sum(len(piece.boxes) for piece in places)
        totals["points"] += sum(len(piece.points) for piece in places)
        turns_per_chat.append(len(chat.turns))
        images_per_chat.append(len(chat.images))
        for turn in chat.turns:
            words.setdefault(turn.role, []).append(len(turn.text.split()))
        phrases.update(piece.phrase.lower() for piece in places if piece.phrase)
        areas += [(x2 - x1) * (y2 - y1) for piece in places for x1, y1, x2, y2 in piece.boxes]
    spreads = [
        ("turns per chat", _spread(turns_per_chat)),
        ("images per chat", _spread(images_per_chat)),
        ("words per question", _spread(words["user"])),
        ("words per answer", _spread(words["assistant"])),
    ]
    sections = [_counts("", list(totals.items())), _counts("", spreads)]
    if areas:
        sections.append(_counts("box area, share of the image", _histogram(areas, _AREA_EDGES)))
    if phrases:
        sections.append(_counts("most frequent phrases", phrases.most_common(_NUM_TOP_PHRASES)))
    return "\n\n".join(sections)


def describe_build(manifest: dict[str, Any]) -> str:
    """Says what the build of a data set dropped (with shares), set aside and noted."""
    lines = ["when it was built"]
    delivered = manifest.get("delivered", {})
    for kind, reasons in manifest["dropped"].items():
        dropped = sum(reasons.values())
        listed = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
        read = dropped + delivered.get(kind, 0)
        of = f" of {read:,}, {dropped / read:.1%}" if kind in delivered else ""
        lines.append(f"{'dropped:':12} {dropped:>9,} {kind}s{of} ({listed})")
    lines += set_aside_lines(manifest.get("set_aside", {}), delivered)
    lines += [note_line(what, count) for what, count in manifest["notes"].items()]
    return "\n".join(lines) if len(lines) > 1 else "nothing was dropped when it was built"


def _spread(values: Sequence[int]) -> str:
    if not values:
        return "none"
    low, median, high = np.percentile(values, (0, 50, 100))
    return f"mean {np.mean(values):.1f}, median {median:.0f}, {low:.0f} to {high:.0f}"


def _histogram(values: Sequence[float], edges: Sequence[float]) -> list[tuple[str, str]]:
    counts, _ = np.histogram(values, edges)
    return [
        (f"{low:g} to {high:g}", f"{count:>9,}  {count / max(1, len(values)):6.1%}")
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]


def _counts(title: str, rows: Sequence[tuple[str, int | str]]) -> str:
    lines = [title] if title else []
    for name, value in rows:
        lines.append(f"{name:24} {value:>9,}" if isinstance(value, int) else f"{name:24} {value}")
    return "\n".join(lines)
