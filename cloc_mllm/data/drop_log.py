"""The account of a build: what was delivered, what was dropped and why. Nothing is lost."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Literal, get_args

Kind = Literal["record", "region", "expression", "caption"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class DropLog:
    """Counts delivered and dropped items; every input item ends in exactly one of the two.

    A dropped record takes its regions, expressions and captions along: each is counted under
    the record's reason, so `delivered + dropped == read` holds for every kind.
    """

    def __init__(self) -> None:
        self.entries: list[tuple[Kind, str, str]] = []  # kind, item id, reason
        self.delivered: Counter[Kind] = Counter()
        self.delivered_ids: set[str] = set()
        self.notes: Counter[str] = Counter()

    def add(self, kind: Kind, item_id: str, reason: str) -> None:
        """One item is dropped."""
        self.entries.append((kind, item_id, reason))

    def note(self, what: str, count: int = 1) -> None:
        """Something the source holds that is no item by design (a chain without a box)."""
        self.notes[what] += count

    def deliver(self, item_id: str, **parts: int) -> None:
        """One record, and so many `region`, `expression` and `caption` items of it, is kept."""
        self.delivered_ids.add(item_id)
        self.delivered["record"] += 1
        for kind in KINDS[1:]:
            self.delivered[kind] += parts.get(kind, 0)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Dropped items: kind -> reason -> number. Kinds without a drop are absent."""
        counts: dict[str, dict[str, int]] = {}
        for kind, _, reason in self.entries:
            of_kind = counts.setdefault(kind, {})
            of_kind[reason] = of_kind.get(reason, 0) + 1
        return counts

    def num_dropped(self, kind: Kind) -> int:
        return sum(self.counts.get(kind, {}).values())

    def drop_share(self, kind: Kind = "record") -> float:
        """Dropped over read, 0 when nothing was read."""
        dropped = self.num_dropped(kind)
        return dropped / max(1, dropped + self.delivered[kind])

    def summary(self) -> str:
        """A line a kind, then a line a note."""
        lines = []
        for kind in KINDS:
            reasons = sorted(self.counts.get(kind, {}).items(), key=lambda item: -item[1])
            listed = ", ".join(f"{reason} {count:,}" for reason, count in reasons)
            dropped = self.num_dropped(kind)
            if dropped or self.delivered[kind] or kind == "record":
                line = f"{kind + 's:':12} {self.delivered[kind]:>9,} kept {dropped:>9,} dropped"
                lines.append(line + (f" ({listed})" if listed else ""))
        lines += [f"{'not used:':12} {count:>9,} {what}" for what, count in self.notes.items()]
        return "\n".join(lines)

    def write(self, path: str | Path) -> None:
        """JSON lines `{"kind", "id", "reason"}`, one a dropped item."""
        with open(path, "w", encoding="utf-8") as file:
            for kind, item_id, reason in self.entries:
                row = {"kind": kind, "id": item_id, "reason": reason}
                file.write(json.dumps(row) + "\n")
