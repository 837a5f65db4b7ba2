"""Reads command lines: settings as the fields of a dataclass, and options in one spelling."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from cloc_mllm.shipped import UnknownConfigError, find_config

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
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=prog, description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file, or the name of a shipped one; later arguments override it",
    )
    for name, (default, help_text) in options.items():
        if default is False:
            parser.add_argument(f"--{name}", action="store_true", help=help_text)
        else:
            parser.add_argument(f"--{name}", type=type(default), default=default, help=help_text)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_class_arguments(config_class)
    parsed = parse_settings(parser, argv)
    values = parser.instantiate(parsed).as_dict()
    fields = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    config = config_class(**{field: values[field] for field in fields})
    return config, {name: values[name] for name in options}


def parse_settings(parser: Any, argv: Sequence[str] | None) -> Any:
    """Parses with a parser of jsonargparse that has `exit_on_error=False`.

    Options may be typed with hyphens, and `--config` takes the bare name of a shipped one.

    Raises:
        ValueError: what is wrong, in one line.
    """
    from jsonargparse import ArgumentError

    known = list(parser.get_defaults().keys())
    typed = list(sys.argv[1:] if argv is None else argv)
    arguments = [  # `--data.mixture.my-set 1` names a key of the user's, which stays as it is
        new if new.partition("=")[0].removeprefix("--") in known else old
        for old, new in zip(typed, with_underscores(typed), strict=True)
    ]
    try:
        return parser.parse_args(_with_found_configs(arguments))
    except (ArgumentError, UnknownConfigError) as error:
        raise ValueError(f"{parser.prog}: {_one_line(str(error), known)}") from error


def _with_found_configs(arguments: Sequence[str]) -> list[str]:
    """Puts the path of the file in the place of each name behind `--config`."""
    found: list[str] = []
    for argument in arguments:
        if found and found[-1] == "--config":
            argument = find_config(argument)
        elif argument.startswith("--config="):
            argument = f"--config={find_config(argument.removeprefix('--config='))}"
        found.append(argument)
    return found


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
