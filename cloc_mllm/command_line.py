"""Command lines: settings that are the fields of a dataclass, and options of one spelling."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

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
    """Reads the settings of a job and one switch of its command, see `parse_options`.

    Args:
        flag: name and help of the switch.

    Returns:
        the settings, and whether the switch was given.
    """
    name, help_text = flag
    config, options = parse_options(
        config_class, argv, prog=prog, description=description, options={name: (False, help_text)}
    )
    return config, options[name]


def parse_options(
    config_class: type[Config],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    options: dict[str, tuple[Any, str]],
) -> tuple[Config, dict[str, Any]]:
    """Reads `--config x.yaml --optim.lr 1e-4 --print_config` and options of the command.

    `--local_rank`, which the `deepspeed` launcher adds, is accepted and ignored.

    Args:
        config_class: a dataclass; its docstrings are the help.
        argv: the arguments; None takes those of the process.
        options: default and help by name; one whose default is False is a switch.

    Returns:
        the settings, and the value of each option.

    Raises:
        ValueError: an argument or a line of the file is wrong; one line that says what was
            expected, and for an unknown setting names the closest one that exists.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(
        prog=prog, description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file; later arguments override it")
    for name, (default, help_text) in options.items():
        if default is False:
            parser.add_argument(f"--{name}", action="store_true", help=help_text)
        else:
            parser.add_argument(f"--{name}", type=type(default), default=default, help=help_text)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_class_arguments(config_class)
    try:
        parsed = parser.parse_args(argv)
    except ArgumentError as error:
        known = parser.get_defaults().keys()
        raise ValueError(f"{prog}: {_one_line(str(error), known)}") from error
    values = parser.instantiate(parsed).as_dict()
    fields = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    config = config_class(**{field: values[field] for field in fields})
    return config, {name: values[name] for name in options}


def _one_line(message: str, known: Iterable[str]) -> str:
    for pattern in _UNKNOWN:
        if match := pattern.match(message):
            parts = match.groupdict()
            name = f"{parts['group']}.{parts['name']}" if "group" in parts else parts["name"]
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
            hint = f"; did you mean {close[0]}?" if close else ""
            return f"there is no setting {name}{hint} (--help lists all)"
    return " ".join(message.split())


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose options have underscores in their names and may be typed with hyphens."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_known_args(
            with_underscores(sys.argv[1:] if args is None else args), namespace
        )


def with_underscores(arguments: Iterable[str]) -> list[str]:
    """Rewrites the names of options: `--max_drop_share=0.1` -> `--max_drop_share=0.1`.

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
