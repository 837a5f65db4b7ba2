"""Every reason that the package counts under says what would have been right."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import cloc_mllm.data
from cloc_mllm.data.drop_log import KINDS
from cloc_mllm.data.reasons import REASONS, SET_ASIDE

SOURCES = sorted(Path(cloc_mllm.data.__file__).parent.rglob("*.py"))


def calls() -> Iterator[ast.Call]:
    for path in SOURCES:
        yield from (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))


def texts(nodes: list[ast.expr]) -> list[str | None]:
    return [
        n.value if isinstance(n, ast.Constant) and isinstance(n.value, str) else None for n in nodes
    ]


def name_of(call: ast.Call) -> str:
    return getattr(call.func, "attr", "") or getattr(call.func, "id", "")


def test_every_reason_says_what_would_have_been_right() -> None:
    used = set()
    for call in calls():
        arguments = texts(call.args)
        if name_of(call) == "add" and len(arguments) >= 3 and arguments[0] in KINDS:
            used.add(arguments[2])
        if name_of(call) == "ImageError" and len(arguments) > 1:
            used.add(arguments[1])
        used |= {texts([k.value])[0] for k in call.keywords if k.arg == "fault"}
    used -= {None, ""}
    assert len(used) > 12
    assert used <= REASONS.keys()


def test_every_rule_says_what_keeps_the_item() -> None:
    used = {
        argument
        for call in calls()
        if name_of(call) == "put_aside"
        for argument in texts(call.args[1:2])
    }
    assert used == SET_ASIDE.keys()
    assert all(text and not text.endswith(".") for text in (*REASONS.values(), *SET_ASIDE.values()))
