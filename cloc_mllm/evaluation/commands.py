"""`cloc-mllm eval`: several tasks on records, one task with its own options, or rows to numbers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

from cloc_mllm.evaluation.config import EvalConfig
from cloc_mllm.evaluation.tasks import Task, task_class, task_names

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

# `cloc-mllm eval NAME ...` that read rows and need no model
SUBCOMMANDS = {"compare": "cloc_mllm.evaluation.compare", "score": "cloc_mllm.evaluation.score"}
_EPILOG = """\
cloc-mllm eval TASK --help     one task with its own options, such as refcoco or pope
cloc-mllm eval score --help    rows of any model to numbers; no model, no GPU
cloc-mllm eval compare A B     two finished evaluations side by side
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the part that the arguments name; only that part is loaded."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args and args[0] in SUBCOMMANDS:
        command: Callable[[list[str]], int] = importlib.import_module(SUBCOMMANDS[args[0]]).main
        return command(args[1:])
    if "--list" in args:
        print("\n".join(task_names()))
        return 0
    if args and not args[0].startswith("-"):
        return _run(*_one_task(args[0], args[1:]))
    return _run(*_several_tasks(args))


def _several_tasks(args: list[str]) -> tuple[EvalConfig, list[Task]]:
    parser = _parser("cloc-mllm eval", "Predict, score and write a report.", epilog=_EPILOG)
    parser.add_argument("--list", action="store_true", help="print the tasks, one per line")
    parser.add_class_arguments(EvalConfig)
    values = parser.parse_args(normalised(EvalConfig, args))
    config = _filled(EvalConfig, values)
    return config, [build_task(entry) for entry in config.tasks]


def _one_task(name: str, args: list[str]) -> tuple[EvalConfig, list[Task]]:
    cls = task_class(name)
    parser = _parser(f"cloc-mllm eval {name}", (cls.__doc__ or "").partition("\n\n")[0])
    parser.add_class_arguments(cls)
    parser.add_class_arguments(EvalConfig, skip={"tasks"})
    args = normalised(cls, normalised(EvalConfig, args))
    values = parser.parse_args(args)
    values.tasks = [name]
    if values.output_dir == EvalConfig.output_dir:
        values.output_dir = f"{values.output_dir}-{name}"
    return _filled(EvalConfig, values), [_filled(cls, values)]


def _parser(prog: str, description: str, epilog: str | None = None) -> ArgumentParser:
    from argparse import RawDescriptionHelpFormatter

    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Keeps the lines of the epilog, and shows types and defaults."""

    parser = ArgumentParser(
        prog=prog, description=description, epilog=epilog, formatter_class=Formatter
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    return parser


def _filled(cls: type[Any], values: Any) -> Any:
    return cls(**{item.name: values[item.name] for item in fields(cls)})


def build_task(entry: str | dict[str, dict[str, Any]]) -> Task:
    """A task from its name, or from `{NAME: {OPTION: VALUE}}`.

    Raises:
        ValueError: an unknown task or option, an option that is missing or of another type.
    """
    name, options = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
    cls = task_class(name)
    unknown = sorted(set(options) - {item.name for item in fields(cls)})  # type: ignore[arg-type]
    missing = [
        item.name
        for item in fields(cls)  # type: ignore[arg-type]
        if item.default is MISSING and item.default_factory is MISSING and item.name not in options
    ]
    if unknown or missing:
        problem = f"unknown options {unknown}" if unknown else f"{', '.join(missing)} missing"
        raise ValueError(f"task {name}: {problem}; see cloc-mllm eval {name} --help")
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls)
    try:
        return _filled(cls, parser.parse_object(options))
    except ArgumentError as error:
        raise ValueError(f"task {name}: {error}") from error


def normalised(cls: type[Any], args: Sequence[str]) -> list[str]:
    """Arguments as jsonargparse wants them: `--flag` alone means true, and `--paths a b` a list."""
    hints = get_type_hints(cls)
    out: list[str] = []
    index = 0
    while index < len(args):
        argument = args[index]
        index += 1
        hint = hints.get(argument.removeprefix("--")) if argument.startswith("--") else None
        stop = next((i for i in range(index, len(args)) if args[i].startswith("--")), len(args))
        out.append(argument)
        if hint is bool and stop == index:
            out.append("true")
        elif get_origin(hint) is list and stop > index and not args[index].startswith("["):
            out.append("[" + ",".join(map(repr, args[index:stop])) + "]")
            index = stop
    return out


def _run(config: EvalConfig, tasks: list[Task]) -> int:
    """Evaluates, prints the table, says where the report is; status 1 if some are not judged."""
    from pathlib import Path

    from cloc_mllm.evaluation.report.table import render_table
    from cloc_mllm.evaluation.run import evaluate, note_lines

    evaluation = evaluate(config, tasks)
    if evaluation is None:
        return 0
    print(render_table(evaluation))
    if skipped := evaluation.about["skipped_tasks"]:
        print(f"left out, nothing to ask or nobody to answer: {', '.join(skipped)}")
    print("\n".join(note_lines(evaluation.about)))
    print(f"report: {Path(config.output_dir) / 'report.html'}")
    notes = evaluation.about["tasks"].values()
    return int(any("not_judged" in note for note in notes))
