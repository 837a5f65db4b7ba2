"""Runs `cloc-mllm eval`: tasks on records, a task with its own options, or another part by name."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

from cloc_mllm.command_line import parse_settings, with_underscores
from cloc_mllm.evaluation.config import EvalConfig
from cloc_mllm.evaluation.tasks import task_class, task_names

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

# `cloc-mllm eval NAME ...` that are no tasks
SUBCOMMANDS = {
    "compare": "cloc_mllm.evaluation.compare",
    "perplexity": "cloc_mllm.evaluation.perplexity",
    "score": "cloc_mllm.evaluation.score",
}
_EPILOG = """\
cloc-mllm eval TASK --help     one task with its own options, such as refcoco or pope
cloc-mllm eval TASK TASK ...   several tasks on the same records, with the options below
cloc-mllm eval score --help    rows of any model to numbers; no model, no GPU
cloc-mllm eval compare A B     two finished evaluations side by side
cloc-mllm eval perplexity CHATS MODEL ...   how well models predict the answers of chats

tasks:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the part that the arguments name; only that part is loaded."""
    args = with_underscores(sys.argv[1:] if argv is None else argv)
    if args and args[0] in SUBCOMMANDS:
        command: Callable[[list[str]], int] = importlib.import_module(SUBCOMMANDS[args[0]]).main
        return command(args[1:])
    if "--list" in args:
        print("\n".join(task_names()))
        return 0
    names = list(takewhile(lambda arg: not arg.startswith("-"), args))
    if len(names) == 1:
        return _run(_one_task(names[0], args[1:]))
    return _run(_several_tasks(["--tasks", *args] if names else args))


def _several_tasks(args: list[str]) -> EvalConfig:
    epilog = _EPILOG + "\n".join(f"  {name}" for name in task_names())
    parser = _parser("cloc-mllm eval", "Predict, score and write a report.", epilog)
    parser.add_argument("--list", action="store_true", help="print the tasks, one per line")
    parser.add_class_arguments(EvalConfig)
    return _filled(EvalConfig, parse_settings(parser, normalised(args, EvalConfig)))


def _one_task(name: str, args: list[str]) -> EvalConfig:
    cls = task_class(name)
    parser = _parser(f"cloc-mllm eval {name}", (cls.__doc__ or "").partition("\n\n")[0])
    parser.add_class_arguments(cls)
    parser.add_class_arguments(EvalConfig, skip={"tasks"})
    values = parse_settings(parser, normalised(args, EvalConfig, cls))
    options = {item.name: values[item.name] for item in fields(cls)}  # type: ignore[arg-type]
    values.tasks = [{name: options}]
    if values.output_dir == EvalConfig.output_dir:
        values.output_dir = f"{values.output_dir}-{Path(name).stem}"
    return _filled(EvalConfig, values)


def _parser(prog: str, description: str, epilog: str = "") -> ArgumentParser:
    from argparse import RawDescriptionHelpFormatter

    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Keeps the lines of the epilog, and shows types and defaults."""

    parser = ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=Formatter,
        exit_on_error=False,
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file with any of these settings, or the name of a shipped one (quick)",
    )
    return parser


def _filled(cls: type[Any], values: Any) -> Any:
    return cls(**{item.name: values[item.name] for item in fields(cls)})


def normalised(args: Sequence[str], *classes: type[Any]) -> list[str]:
    """Arguments as jsonargparse wants them: `--flag` alone means true, and `--paths a b` a list.

    Args:
        classes: dataclasses whose fields are the options.
    """
    hints = {f"--{name}": h for cls in classes for name, h in get_type_hints(cls).items()}
    out: list[str] = []
    index = 0
    while index < len(args):
        option, index = args[index], index + 1
        stop = next((i for i in range(index, len(args)) if args[i].startswith("--")), len(args))
        out.append(option)
        if hints.get(option) is bool and stop == index:
            out.append("true")
        elif get_origin(hints.get(option)) is list and stop > index and args[index][0] != "[":
            out.append(json.dumps(args[index:stop]))
            index = stop
    return out


def _run(config: EvalConfig) -> int:
    """Evaluates, prints the table, says where the report is; status 1 if some are not judged."""
    from cloc_mllm.evaluation.report.table import note_texts, render_table
    from cloc_mllm.evaluation.run import evaluate

    evaluation = evaluate(config)
    if evaluation is None:
        return 0
    print(render_table(evaluation))
    if skipped := evaluation.about["skipped_tasks"]:
        print(f"left out, nothing to ask or nobody to answer: {', '.join(skipped)}")
    for task, text in note_texts(evaluation.about).items():
        print(f"{task}: {text}")
    print(f"report: {Path(config.output_dir) / 'report.html'}")
    notes = evaluation.about["tasks"].values()
    return int(any("not_judged" in note for note in notes))
