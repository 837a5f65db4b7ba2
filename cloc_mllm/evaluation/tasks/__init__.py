"""One module per task: what is asked, how answers are scored, what counts as a failure.

A module of this folder is found by its name. It has `SCORERS`, which maps the `task` of its rows to
how they are scored (reading rows needs neither a model nor torch), and one subclass of `Task`,
whose fields are the task's options. To add a task, add a file here; a file elsewhere works too,
named by its path (`cloc-mllm eval --tasks '[my_task.py]'`).
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from cloc_mllm.evaluation.queries import QuerySet
from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow, ScoredPair
from cloc_mllm.evaluation.stats.bootstrap import QueryScores

if TYPE_CHECKING:
    from cloc_mllm.data.records import Record
    from cloc_mllm.evaluation.record_index import RecordIndex

Floors = Callable[[Sequence[ReferenceRow]], dict[str, float]]
_OWN_TASKS: dict[str, ModuleType] = {}  # modules given by a path, by the path


@dataclass(frozen=True)
class Scorer:
    """The scoring of one task's rows, from rows alone.

    Args:
        title: name of the task for people.
        protocol: what is asked and what counts as right, for the report.
        main_metric: the one number to quote.
        score: pairs -> metric -> the score of each query; {} if nothing can be scored.
        chance: references -> metric -> what guessing scores; needs no model.
        whole_image: the same for always answering with the box of the whole image.
        is_failure: whether an answer could not be read; such answers are wrong and counted.
        one_box: an answer is one box, the first, scored by IoU: it gets average precision,
            breakdowns and calibration, and its texts may be read in a declared format.
        example_metric: by which the report calls examples best and worst; "" shows none.
        drawn: what the report draws on an example: the true boxes beside the `answer`, the boxes
            that were `asked` about, or `nothing`.
    """

    title: str
    protocol: str
    main_metric: str
    score: Callable[[Sequence[ScoredPair]], dict[str, QueryScores]]
    chance: Floors | None = None
    whole_image: Floors | None = None
    is_failure: Callable[[ScoredPair], bool] | None = None
    one_box: bool = False
    example_metric: str = ""
    drawn: Literal["answer", "asked", "nothing"] = "answer"


class EvalData:
    """The records that are scored on, read when the first task asks for them.

    Args:
        load: gives the records.
        captions_per_image: uses the first so many captions of each record; 0 uses all.
    """

    def __init__(self, load: Callable[[], Sequence[Record]], captions_per_image: int = 0) -> None:
        self._load = load
        self._captions_per_image = captions_per_image

    @cached_property
    def records(self) -> Sequence[Record]:
        return self._load()

    @cached_property
    def index(self) -> RecordIndex:
        from cloc_mllm.evaluation.record_index import RecordIndex

        return RecordIndex(self.records, self._captions_per_image)


class Task:
    """A task with its options, which are the fields of the dataclass that derives from this.

    Attributes:
        reads_records: whether it asks about the records of `--data`; others have their own files.
    """

    reads_records = True

    def query_sets(self, data: EvalData) -> list[QuerySet]:
        """Makes the queries, one set per `task` of the rows.

        Raises:
            ValueError: the options or files cannot be used; says what was expected.
        """
        raise NotImplementedError

    def review(
        self, asked: QuerySet, rows: list[PredictionRow], directory: Path
    ) -> list[PredictionRow] | None:
        """Prepares the answers for scoring; a judge, for instance, rates them first.

        None leaves the answers unscored.
        """
        return rows

    def more_scores(
        self, pairs: Sequence[ScoredPair]
    ) -> tuple[dict[str, QueryScores], dict[str, Any]]:
        """Scores that only these options ask for, and what else the report says of the answers."""
        return {}, {}


def build_task(entry: str | Mapping[str, Mapping[str, Any]]) -> Task:
    """Makes a task from its name, or from `{NAME: {OPTION: VALUE}}`.

    Raises:
        ValueError: an unknown task or option, an option that is missing or of another type.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    name = task_name(entry)
    options = {} if isinstance(entry, str) else entry[name]
    cls = task_class(name)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls)
    try:
        values = parser.parse_object(dict(options))
    except ArgumentError as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"task {name}: {problem}; see cloc-mllm eval {name} --help") from error
    return cls(**values.as_dict())


def task_name(entry: str | Mapping[str, Any]) -> str:
    """The name of one item of `--tasks`, which stands alone or before its options."""
    names = [entry] if isinstance(entry, str) else list(entry)
    if len(names) != 1:
        raise ValueError(f"expected one task per list item, got {', '.join(names) or 'none'}")
    return names[0]


def task_names() -> list[str]:
    """All tasks of this folder."""
    return [module.name for module in pkgutil.iter_modules(__path__)]


def task_class(name: str) -> type[Task]:
    """The class of a task, by its name or by the path of a Python file.

    Raises:
        ValueError: there is no such task; the message lists all names.
    """
    module = _module(name)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Task)
        and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise ValueError(f"{name}: expected one subclass of Task, found {len(found)}")
    return found[0]


def scorers_of(name: str) -> Mapping[str, Scorer]:
    """The scorers of a task, by the `task` of the rows."""
    return _module(name).SCORERS


def row_task(name: str) -> str:
    """The `task` of rows that a user names: itself, or the one that a Python file scores.

    Raises:
        ValueError: there is no such file, or it scores rows of several tasks.
    """
    if not name.endswith(".py"):
        return name
    scored = list(scorers_of(name))
    if len(scored) != 1:
        raise ValueError(f"{name}: expected one task of the rows, found {', '.join(scored)}")
    return scored[0]


def all_scorers() -> dict[str, Scorer]:
    """Collects all known scorers, by the `task` of the rows."""
    scorers: dict[str, Scorer] = {}
    for module in [*map(_module, task_names()), *_OWN_TASKS.values()]:
        scorers |= module.SCORERS
    return scorers


def _module(name: str) -> ModuleType:
    if name in task_names():
        return importlib.import_module(f"{__name__}.{name}")
    if name.endswith(".py") and Path(name).is_file():
        return _module_of_file(str(Path(name).resolve()))
    raise ValueError(
        f"unknown task {name!r}; expected one of: {', '.join(task_names())}, or the path of a "
        "Python file with a task"
    )


@cache
def _module_of_file(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"cloc_mllm_task_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up the types of their fields
    spec.loader.exec_module(module)
    _OWN_TASKS[path] = module
    return module
