"""Writes reference/commands.md when the site is built: what every command says for `--help`."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any

from mkdocs.structure.files import File

from cloc_mllm import cli

_OF_DATA = (
    *("build", "validate", "stats", "inspect", "split", "merge", "export"),
    *("leak-check", "doctor"),
)


def on_files(files: Any, config: Any) -> Any:
    pages = ["# Commands", "What each command says for `--help`; written when the site is built."]
    for name, subcommand in cli.SUBCOMMANDS.items():
        pages += [f"## cloc-mllm {name}", subcommand.help, _help([name])]
        if name == "data":
            for part in _OF_DATA:
                pages += [f"### cloc-mllm data {part}", _help([name, part])]
    content = "\n\n".join(pages) + "\n"
    files.append(File.generated(config, "reference/commands.md", content=content))
    return files


def _help(arguments: list[str]) -> str:
    """The help of a command as a code block; without its extra, what it needs."""
    os.environ["COLUMNS"] = "100"
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = cli.main([*arguments, "--help"])
        except SystemExit as end:
            status = int(end.code or 0)
    text = said.getvalue().strip()
    if status and "is not installed" not in text:
        raise RuntimeError(f"cloc-mllm {' '.join(arguments)} --help ended with {status}: {text}")
    return f"```text\n{text}\n```"
