"""What is kept of chats that have left, and for how long."""

from __future__ import annotations

import torch

from cloc_mllm.inference.known_starts import KnownStarts, Start


def start(num_tokens: int) -> Start:
    """A start of 8 bytes per token."""
    part = torch.zeros(1, 1, num_tokens, 1)
    return Start([(part, part)])


def test_the_one_that_was_not_used_for_longest_goes_first() -> None:
    known, one, other, third = KnownStarts(num_bytes=24), start(1), start(1), start(2)
    known.add("one", one)
    known.add("other", other)
    assert known.get("one") is one
    known.add("third", third)
    assert known.get("other") is None
    assert known.get("one") is one
    assert known.get("third") is third


def test_what_is_larger_than_the_room_is_not_kept() -> None:
    known = KnownStarts(num_bytes=16)
    known.add("one", start(3))
    assert known.get("one") is None
    known.add("other", other := start(2))
    assert known.get("other") is other
