"""Keeps the account of a build: what was delivered, dropped and set aside, and why."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from cloc_mllm.data.reasons import REASONS, SET_ASIDE

# A row is one of a conversation file, several of which make a record. A place stands for boxes or
# points that a chat mentions, a pair for a question with its answer.
Kind = Literal["record", "chat", "row", "region", "expression", "caption", "turn", "place", "pair"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_NUM_EXAMPLES = 3  # names shown with a note
_NUM_REASONS = 10  # reasons shown, each with an example

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 100
_repr.maxlist = _repr.maxdict = _repr.maxtuple = 8


class Drop(NamedTuple):
    """One dropped item.

    Attributes:
        item: its id, or where it stands in its file.
        reason: a key of `REASONS`, or a reader's own.
        found: what stood there; "" if the reason says it all.
    """

    kind: Kind
    item: str
    reason: str
    found: str = ""


class DropLog:
    """Counts delivered, dropped and set-aside items; each item read ends in exactly one of them.

    A dropped record takes its regions, expressions and captions along: each is counted under
    the record's reason, so `delivered + dropped + set aside == read` holds for every kind.

    Attributes:
        set_aside: kind -> reason -> number of items that a declared rule leaves out (crowds, other
            splits). They are no loss, and shares do not count them.
        watch: is given the file of each image that a reader delivers, and the boxes and phrases in
            it, before they are validated, for those who judge boxes as they are stated.
        notes: number of other remarks by text; `examples` holds some names for each.
    """

    def __init__(self) -> None:
        self.drops: list[Drop] = []
        self.counts: dict[str, dict[str, int]] = {}  # dropped: kind -> reason -> number
        self.delivered: Counter[Kind] = Counter()
        self.delivered_ids: set[str] = set()
        self.set_aside: dict[str, dict[str, int]] = {}
        self.notes: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.watch: Callable[[bytes, list[Any], list[Any]], object] | None = None
        self._noted: set[tuple[str, str]] = set()

    def add(self, kind: Kind, item: str, reason: str, found: Any = "", count: int = 1) -> None:
        """Drops one item, or `count` alike."""
        self.drops += [Drop(kind, str(item), reason, shown(found))] * count
        _count(self.counts, kind, reason, count)

    def put_aside(self, kind: Kind, reason: str, count: int = 1) -> None:
        """Leaves out items by a declared rule, a key of `SET_ASIDE`."""
        _count(self.set_aside, kind, reason, count)

    def note(self, what: str, count: int = 1, example: str = "") -> None:
        """Notes something that is no loss, with the name of an example; each name is shown once."""
        if count:
            self.notes[what] += count
            examples = self.examples.setdefault(what, [])
            if example and len(examples) < _NUM_EXAMPLES and shown(example) not in examples:
                examples.append(shown(example))

    def note_once(self, what: str, name: str) -> None:
        """Notes something about an image, once however often the image comes."""
        if (what, name) not in self._noted:
            self._noted.add((what, name))
            self.note(what, example=name)

    def deliver(self, item_id: str, kind: Kind = "record", **parts: int) -> None:
        """Counts one record or chat that is kept, and the numbers of its parts by kind."""
        self.delivered_ids.add(item_id)
        self.delivered[kind] += 1
        for part in KINDS:
            if part in parts:
                self.delivered[part] += parts[part]

    @property
    def entries(self) -> list[tuple[Kind, str, str]]:
        """Lists kind, item and reason of each drop."""
        return [(drop.kind, drop.item, drop.reason) for drop in self.drops]

    def num_dropped(self, kind: Kind) -> int:
        return sum(self.counts.get(kind, {}).values())

    def num_set_aside(self, kind: Kind) -> int:
        return sum(self.set_aside.get(kind, {}).values())

    def drop_share(self, kind: Kind = "record") -> float:
        """The dropped items as a share of dropped and delivered ones; 0 if nothing was read."""
        dropped = self.num_dropped(kind)
        return dropped / max(1, dropped + self.delivered[kind])

    def summary(self) -> str:
        """Writes a line for each kind, then what was set aside, the reasons and the notes."""
        lines = []
        whole = "chat" if self.delivered["chat"] or self.num_dropped("chat") else "record"
        for kind in KINDS:
            dropped, aside = self.num_dropped(kind), self.num_set_aside(kind)
            if dropped or aside or self.delivered[kind] or kind == whole:
                line = f"{kind + 's:':12} {self.delivered[kind]:>9,} kept {dropped:>9,} dropped"
                lines.append(line + _listed(self.counts.get(kind, {}), self.drop_share(kind)))
        lines += set_aside_lines(self.set_aside, self.delivered)
        lines += [
            note_line(what, count, self.examples.get(what, ()))
            for what, count in self.notes.items()
        ]
        return "\n".join(lines)

    def explained(self) -> str:
        """Explains the most frequent reasons: an example of each, and what would have been right.

        "" where nothing was dropped.
        """
        first: dict[tuple[str, str], Drop] = {}
        for drop in self.drops:
            first.setdefault((drop.kind, drop.reason), drop)
        whole_reasons = {**self.counts.get("record", {}), **self.counts.get("chat", {})}
        counted = [
            (count, first[kind, reason])
            for kind, reasons in self.counts.items()
            for reason, count in reasons.items()
            # parts go with their record or chat
            if kind in ("record", "chat") or reason not in whole_reasons
        ]
        counted.sort(key=lambda pair: -pair[0])
        lines = []
        for count, drop in counted[:_NUM_REASONS]:
            found = f": {drop.found}" if drop.found else ""
            lines.append(f"{count:>9,} {drop.kind}s, {drop.reason}; first {drop.item!r}{found}")
            if drop.reason in REASONS:
                lines.append(f"{'':>10}expected {REASONS[drop.reason]}")
        if len(counted) > _NUM_REASONS:
            lines.append(f"{'':>10}and {len(counted) - _NUM_REASONS} more reasons")
        return "\n".join(lines)

    def write(self, path: str | Path) -> None:
        """Writes JSON lines `{"kind", "id", "reason", "found"}`, one for each dropped item."""
        write_drops(self.drops, path)


def write_drops(drops: Iterable[Drop], path: str | Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for drop in drops:
            row = {"kind": drop.kind, "id": drop.item, "reason": drop.reason, "found": drop.found}
            file.write(json.dumps(row) + "\n")


def set_aside_lines(
    set_aside: Mapping[str, Mapping[str, int]], delivered: Mapping[Any, int]
) -> list[str]:
    return [
        f"{'set aside:':12} {count:>9,} {kind}s, {reason}: {SET_ASIDE.get(reason, '')}"
        f"{_beside(sum(reasons.values()), delivered.get(kind, 0))}"
        for kind, reasons in set_aside.items()
        for reason, count in reasons.items()
    ]


def _beside(num_aside: int, num_kept: int) -> str:
    return f" ({num_aside:,} of {num_aside + num_kept:,} not kept)" if num_kept else ""


def note_line(what: str, count: int, examples: Iterable[str] = ()) -> str:
    names = ", ".join(examples)
    more = ", ..." if names and count > _NUM_EXAMPLES else ""
    return f"{'note:':12} {count:>9,} {what}" + (f" ({names}{more})" if names else "")


def shown(value: Any) -> str:
    """Writes a value of a file for people: short, on one line, in printable characters."""
    text = value if isinstance(value, str) else _repr.repr(value)
    if len(text) > 300:
        text = f"{text[:200]}...{text[-80:]}"
    return "".join(c if c.isprintable() else " " for c in text)


def _listed(reasons: dict[str, int], share: float) -> str:
    by_count = sorted(reasons.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{reason} {count:,}" for reason, count in by_count)
    return f" ({listed}), {share:.1%}" if listed else ""


def _count(counts: dict[str, dict[str, int]], kind: str, reason: str, count: int) -> None:
    if count:
        reasons = counts.setdefault(kind, {})
        reasons[reason] = reasons.get(reason, 0) + count
