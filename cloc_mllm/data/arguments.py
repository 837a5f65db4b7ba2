"""The command-line parser of `cloc-mllm data`, and the argument types that its commands share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose options have underscores in their names and may be typed with hyphens."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_known_args(
            with_underscores(sys.argv[1:] if args is None else args), namespace
        )


def with_underscores(arguments: Iterable[str]) -> list[str]:
    """Rewrites the names of options: `--max-drop-share=0.1` -> `--max_drop_share=0.1`.

    Values stay as they are, and so does everything behind a bare `--`.
    """
    rewritten: list[str] = []
    is_option_allowed = True
    for argument in arguments:
        is_option_allowed = is_option_allowed and argument != "--"
        if is_option_allowed and argument.startswith("--"):
            name, equals, value = argument.partition("=")
            argument = "--" + name[2:].replace("-", "_") + equals + value
        rewritten.append(argument)
    return rewritten


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {value}")
    return value
