"""A command line whose settings are the fields of a dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

Config = TypeVar("Config")

# how jsonargparse reports a setting that does not exist, on the command line or in a file
_UNKNOWN = (
    re.compile(r"^unrecognized arguments: --(?P<name>[\w.]+)"),
    re.compile(r"^Group '(?P<group>[\w.]+)' does not accept option '(?P<name>[\w.]+)'"),
    re.compile(r"^Option '(?P<name>[\w.]+)' is not accepted"),
)


def parse_job(
    config_class: type[Config],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    flag: tuple[str, str] = ("dry_run", "print the settings and what would be done, then stop"),
) -> tuple[Config, bool]:
    """Reads `--config x.yaml --optim.lr 1e-4 --print_config` and one switch of the command.

    `--local_rank`, which the `deepspeed` launcher adds, is accepted and ignored.

    Args:
        config_class: a dataclass; its docstrings are the help.
        argv: the arguments; None takes those of the process.
        flag: name and help of the switch.

    Returns:
        the settings, and whether the switch was given.

    Raises:
        ValueError: an argument or a line of the file is wrong; one line that says what was
            expected, and for an unknown setting names the closest one that exists.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    name, help_text = flag
    parser = ArgumentParser(
        prog=prog, description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file; later arguments override it")
    parser.add_argument(f"--{name}", action="store_true", help=help_text)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_class_arguments(config_class)
    try:
        parsed = parser.parse_args(argv)
    except ArgumentError as error:
        known = parser.get_defaults().keys()
        raise ValueError(f"{prog}: {_one_line(str(error), known)}") from error
    values = parser.instantiate(parsed).as_dict()
    fields = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    return config_class(**{field: values[field] for field in fields}), bool(values[name])


def _one_line(message: str, known: Iterable[str]) -> str:
    for pattern in _UNKNOWN:
        if match := pattern.match(message):
            parts = match.groupdict()
            name = f"{parts['group']}.{parts['name']}" if "group" in parts else parts["name"]
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
            hint = f"; did you mean {close[0]}?" if close else ""
            return f"there is no setting {name}{hint} (--help lists all)"
    return " ".join(message.split())
