"""Scores rows with `cloc-mllm eval score`, without a model, a GPU or torch.

Answers of any model are read in the format that is declared for them, strictly and leniently, and
on request as other projects' scorers read them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.data.drop_log import shown
from cloc_mllm.data.storage import write_whole
from cloc_mllm.evaluation.answers import FORMATS, AnswerFormat, answer_format
from cloc_mllm.evaluation.answers.formats import describe_formats
from cloc_mllm.evaluation.answers.rows import ResizedSize, is_unread, read_rows, reading_summary
from cloc_mllm.evaluation.compat import COMPATS, compat_scores
from cloc_mllm.evaluation.metrics import Evaluation, compute_metrics
from cloc_mllm.evaluation.report.table import percent, render_table
from cloc_mllm.evaluation.rows.files import predictions_of, read_table, references_of
from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow, ScoredPair, merge_by_id
from cloc_mllm.evaluation.rows.sources import RowReading, Rows, parse_columns, read_sources
from cloc_mllm.evaluation.stats.bootstrap import Bootstrap
from cloc_mllm.evaluation.tasks import all_scorers, row_task

MISSING = "missing"
FORMAT_HELP = (
    "how boxes are written in raw_text: "
    + ", ".join(FORMATS)
    + "; or a format of your own, as JSON or in a .json or .yaml file: "
    '{"order": "yxyx", "scale": 1000, "key": "box_2d"}; `eval score --format help` shows each with '
    "an example"
)
_MANY = 0.1  # share of answers without a box at which their format is doubted
_QWEN_RULE: Literal["qwen2.5-vl"] = "qwen2.5-vl"


@dataclass(frozen=True)
class ScoreOptions:
    """The options of scoring.

    Args:
        resized_size: width and height that resized pixels count in, for rows whose settings do
            not say it; `qwen2.5-vl` is that model's rule.
        reading: how files of rows are read.
        missing: a reference without a prediction is an error, or an answer that is `wrong`.
        bootstrap_samples: resamples of the images behind each interval.
        seed: of the bootstrap.
    """

    resized_size: ResizedSize = None
    reading: RowReading = field(default_factory=RowReading)
    missing: Literal["error", "wrong"] = "error"
    bootstrap_samples: int = 1000
    seed: int = 0


@dataclass
class Score(Evaluation):
    """An evaluation of one task's rows; `tasks` is of the strict reading.

    Args:
        lenient: the same of the lenient reading, where answers were read.
        answers: the format they were read in, and the rates of failures and of several boxes.
        compat: what other scorers make of the answers, by scorer.
    """

    lenient: Evaluation | None = None
    answers: dict[str, Any] | None = None
    compat: dict[str, Any] | None = None


def score(
    task: str,
    predictions: str | Path | Sequence[PredictionRow],
    references: str | Path | Sequence[ReferenceRow] = "",
    answer_format_name: str = "",
    compat: Sequence[str] = (),
    options: ScoreOptions | None = None,
) -> Score:
    """Scores rows as `cloc-mllm eval score` does: every reference id is in every denominator.

    Args:
        task: of the rows, one of `all_scorers`; or a Python file with a task of one's own.
        predictions: rows, or a JSONL, JSON, CSV or TSV file of them.
        references: likewise; "" if they are in the rows of the predictions' file.
        answer_format_name: how boxes are written in `raw_text`, one of `FORMATS` or a definition
            of one's own (`answer_format`); needed where rows hold no boxes.
        compat: names of `COMPATS`.

    Raises:
        ValueError: an unknown name, a wrong row, ids that are missing, unknown or there twice,
            or answers whose format or image size is not declared; names the rows.
    """
    options = options or ScoreOptions()
    task = row_task(task)
    declared = _checked(task, answer_format_name, compat)
    if isinstance(predictions, (str, Path)) and isinstance(references, (str, Path)):
        rows = read_sources(task, predictions, references, options.reading)
        where = f"{predictions} and {references}: " if references else f"{predictions}: "
    else:
        rows = _rows(task, predictions, references, options.reading)
        where = ""
    try:
        return _scored(task, rows, declared, compat, options)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error


def _rows(
    task: str,
    predictions: str | Path | Sequence[PredictionRow],
    references: str | Path | Sequence[ReferenceRow],
    reading: RowReading,
) -> Rows:
    """Rows of which one kind is made by a program, the other perhaps read from a file."""
    if references == "":
        raise ValueError("the predictions are rows of a program: give their references, too")
    if isinstance(references, (str, Path)):
        table = read_table(references, reading.encoding)
        references = references_of(table, task, reading.reference_columns, reading.coordinates)
    if isinstance(predictions, (str, Path)):
        table = read_table(predictions, reading.encoding)
        predictions = predictions_of(table, task, references, reading.columns)
    return Rows(predictions, references)


def _scored(
    task: str,
    rows: Rows,
    declared: AnswerFormat | None,
    compat: Sequence[str],
    options: ScoreOptions,
) -> Score:
    if not rows.references:
        raise ValueError(f"the references hold no row of task {task!r}; nothing to score")
    pairs, num_missing = merged(rows, options.missing)
    scored = _read_and_scored(task, pairs, declared, options)
    if compat:
        found = {name: compat_scores(name, pairs) for name in compat}
        scored.compat = {
            name: {"metrics": result.metrics, "n": len(pairs), "num_raised": result.num_raised}
            for name, result in found.items()
        }
    scored.about = {
        "task": task,
        "num_references": len(rows.references),
        "num_missing_predictions": num_missing,
        "unused_columns": rows.unused_columns,
        "options": asdict(options),
    }
    return scored


def merged(rows: Rows, missing: Literal["error", "wrong"]) -> tuple[list[ScoredPair], int]:
    """The pairs of all references, and how many of their predictions are missing.

    Raises:
        ValueError: ids that do not meet, or a reference without what its task is scored by.
    """
    for row in rows.references:
        lacking = [name for name in all_scorers()[row.task].truth if not getattr(row, name)]
        if lacking:
            raise ValueError(
                f"reference {row.id!r}: task {row.task!r} needs {' and '.join(lacking)}, this row "
                "has none"
            )
    answered = {row.id for row in rows.predictions}
    wrong = [
        PredictionRow(row.id, row.image_id, row.task, failure=MISSING)
        for row in rows.references
        if missing == "wrong" and row.id not in answered
    ]
    return merge_by_id([*rows.predictions, *wrong], rows.references), len(wrong)


def _checked(task: str, format_name: str, compat: Sequence[str]) -> AnswerFormat | None:
    """The declared format, None where none is."""
    scorers = all_scorers()
    if task not in scorers:
        raise ValueError(f"unknown task {task!r}; expected one of: {', '.join(scorers)}")
    unknown = [name for name in compat if name not in COMPATS]
    if unknown:
        raise ValueError(f"unknown compat {unknown}; expected some of: {', '.join(COMPATS)}")
    if (format_name and not scorers[task].reads_boxes) or (compat and not scorers[task].one_box):
        boxes = ", ".join(name for name, scorer in scorers.items() if scorer.reads_boxes)
        raise ValueError(
            f"answers of task {task!r} are not boxes ({boxes} are): leave out the format and compat"
        )
    return answer_format(format_name) if format_name else None


def _read_and_scored(
    task: str, pairs: list[ScoredPair], declared: AnswerFormat | None, options: ScoreOptions
) -> Score:
    bootstrap = Bootstrap(options.bootstrap_samples, options.seed)
    unread = unread_answers(task, pairs, declared)
    if declared is None or not unread:
        return Score(compute_metrics({task: pairs}, bootstrap=bootstrap).tasks)
    strict = read_rows(pairs, declared, options.resized_size)
    lenient = read_rows(pairs, declared, options.resized_size, lenient=True)
    return Score(
        compute_metrics({task: strict}, bootstrap=bootstrap).tasks,
        lenient=compute_metrics({task: lenient}, bootstrap=bootstrap),
        answers={
            "format": declared.name,
            "meaning": declared.meaning,
            "num_read": len(unread),
            "strict": reading_summary(strict),
            "lenient": reading_summary(lenient),
        },
    )


def unread_answers(
    task: str, pairs: Sequence[ScoredPair], declared: AnswerFormat | None
) -> list[str]:
    """Ids of the answers whose boxes are to be read from their text.

    Raises:
        ValueError: there are some, and no format is declared.
    """
    if not all_scorers()[task].reads_boxes:
        return []
    rows = (pair.prediction for pair in pairs)
    # without a format, a row that says why it has no box has been read before
    unread = [row.id for row in rows if is_unread(row) and (declared or row.failure is None)]
    if unread and declared is None:
        raise ValueError(
            f"{len(unread)} predictions have a raw_text and no boxes, the first is "
            f"{unread[0]!r}: declare how the model writes boxes (--format help lists the formats)"
        )
    return unread


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `cloc-mllm eval score`: scores two files, prints the tables, writes `--output`."""
    args = list(sys.argv[1:] if argv is None else argv)
    if "--format" in args and args[args.index("--format") + 1 :][:1] == ["help"]:
        print(describe_formats())
        return 0
    values = _parser().parse_args(args)
    options = options_of(values)
    compat = list(COMPATS) if "all" in values.compat else values.compat
    scored = score(
        values.task, values.predictions, values.references, values.format, compat, options
    )
    print(render_score(scored))
    if values.output:
        Path(values.output).parent.mkdir(parents=True, exist_ok=True)
        write_whole(values.output, json.dumps(scored.to_dict(), indent=2) + "\n")
        print(f"written: {values.output}")
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="cloc-mllm eval score",
        description="Score predictions against references; needs no model and no GPU.",
    )
    add = parser.add_argument
    known = ", ".join(all_scorers())
    add("--task", required=True, help=f"one of: {known}; or a Python file with one of your own")
    add("--predictions", required=True, help="rows in a .jsonl, .json, .csv or .tsv file")
    add("--references", default="", help="likewise; left out if they are in the predictions' rows")
    add(
        "--compat",
        nargs="+",
        default=[],
        metavar="NAME",
        help="numbers of other scorers too: " + ", ".join(COMPATS) + "; or all",
    )
    add_row_arguments(parser)
    add("--output", default="", help="gets all numbers as JSON")
    return parser


def add_row_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `options_of` reads: how rows are read and numbers made of them."""
    add = parser.add_argument
    add("--format", default="", help=FORMAT_HELP)
    add(
        "--columns",
        type=columns_argument,
        default={},
        help="where fields are called otherwise: id=question_id,raw_text=pred, or JSON",
    )
    add(
        "--reference_columns",
        type=columns_argument,
        default={},
        help="likewise, of references alone",
    )
    add(
        "--reference_format",
        default="",
        help="what the numbers of the references' boxes mean: a format, as in --format; by default "
        "fractions of the original image",
    )
    add("--encoding", default="", help="of the files, where it is not UTF-8: cp1252, gbk, ...")
    add(
        "--resized_size",
        type=_resized_size,
        help="WIDTHxHEIGHT that resized pixels count in, or qwen2.5-vl for its rule",
    )
    add(
        "--missing",
        choices=["error", "wrong"],
        default="error",
        help="a reference without a prediction is an error, or counts as a wrong answer",
    )
    add("--bootstrap_samples", type=int, default=1000)
    add("--seed", type=int, default=0)


def options_of(values: argparse.Namespace) -> ScoreOptions:
    reading = RowReading(
        values.columns, values.reference_columns, values.reference_format, values.encoding
    )
    return ScoreOptions(
        values.resized_size, reading, values.missing, values.bootstrap_samples, values.seed
    )


def columns_argument(text: str) -> dict[str, str]:
    try:
        return parse_columns(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _resized_size(text: str) -> ResizedSize:
    if text == _QWEN_RULE:
        return _QWEN_RULE
    size = re.fullmatch("([1-9][0-9]*)x([1-9][0-9]*)", text)
    if size is None:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT or {_QWEN_RULE}, got {text!r}")
    return float(size[1]), float(size[2])


def render_score(scored: Score) -> str:
    """The tables of a score as text: strict, lenient, other scorers."""
    parts = [render_table(scored)]
    if scored.answers is not None and scored.lenient is not None:
        answers = scored.answers
        parts[0] = f"strict reading, format {answers['format']}\n\n{parts[0]}"
        parts.append("lenient reading, same frame\n\n" + render_table(scored.lenient))
        rates = [
            f"{name}: {percent(answers[name]['parse_failure_rate'])} % of answers without a "
            f"readable box, {percent(answers[name]['multi_box_rate'])} % with several"
            for name in ("strict", "lenient")
        ]
        lenient = answers["lenient"]
        if lenient["parse_failure_rate"] > _MANY and "out_of_range" in lenient["failures"]:
            rates.append(
                f"many numbers lie beyond {answers['format']}: is that their --format? `cloc-mllm "
                "data doctor PREDICTIONS` weighs the frames"
            )
        parts.append("\n".join(rates))
    parts += [_compat_lines(name, result) for name, result in (scored.compat or {}).items()]
    if missing := scored.about["num_missing_predictions"]:
        parts.append(f"{missing} references have no prediction; they count as wrong.")
    parts += [
        f"not read in {path}: the columns {', '.join(map(shown, names))}"
        for path, names in scored.about["unused_columns"].items()
    ]
    return "\n\n".join(parts)


def _compat_lines(name: str, result: dict[str, Any]) -> str:
    numbers = ", ".join(f"{key} {percent(value)}" for key, value in result["metrics"].items())
    raised = f"; it would stop at {result['num_raised']} of them" if result["num_raised"] else ""
    return f"as {name} scores these {result['n']} answers: {numbers}{raised}"
