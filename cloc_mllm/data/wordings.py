"""The words that questions made from records are asked in: one wording per task, or a pool.

A model answers well only in words it was taught, so a processor holds its model's wordings, and
their hash is a part of its fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import yaml

from cloc_mllm.data.english import plural
from cloc_mllm.shipped import ASSETS

Task = Literal[
    "ground",
    "refer",
    "caption",
    "locate",
    "absent",
    "several",
    "all",
    "count",
    "exists",
    "grounded_caption",
    "region_caption",
    "point",
]
TASKS: tuple[Task, ...] = get_args(Task)
# What asks for something that is not there is asked in the words of what is.
_ASKED_AS: dict[Task, Task] = {"absent": "ground"}

IMAGE_TOKEN, REGION_TOKEN = "<image>", "<region>"  # what stands for a picture and for a region
PHRASE, PLURAL, BOX, REGION = "{phrase}", "{plural}", "{box}", REGION_TOKEN
# per task, the sets of placeholders that one of its wordings may have
_PHRASE = [{PHRASE}]
_KIND = [{PHRASE}, {PLURAL}]
_REGION = [{BOX, REGION}]
_PLACEHOLDERS: dict[Task, list[set[str]]] = {
    "ground": _PHRASE,
    "several": _PHRASE,
    "all": _KIND,
    "count": _KIND,
    "exists": _PHRASE,
    "point": _PHRASE,
    "refer": _REGION,
    "region_caption": _REGION,
    "locate": [{REGION}],
    "caption": [set()],
    "grounded_caption": [set()],
}

NOT_THERE = "not in the image"  # the answer where nothing is what was asked for
# all models whose fingerprint names no others were taught these tasks, in wordings of this hash
FIRST_WORDINGS = "62ed81b7a46d5d95"
FIRST_TASKS: tuple[Task, ...] = ("ground", "refer", "caption", "locate", "absent")


@dataclass(frozen=True)
class Wordings:
    """The words of each task's questions.

    Attributes:
        trained: wordings by task; the first is the one that predictors ask in.
        held_out: wordings by task that are never trained.
    """

    trained: Mapping[Task, tuple[str, ...]]
    held_out: Mapping[Task, tuple[str, ...]] = field(default_factory=dict)

    def of(self, task: Task) -> tuple[str, ...]:
        """Lists the trained wordings of a task."""
        return self.trained[_ASKED_AS.get(task, task)]

    def first(self, task: Task) -> str:
        """Returns the wording that predictors and evaluation ask in."""
        return self.of(task)[0]

    def longest(self, task: Task) -> str:
        """Returns the trained wording with the most characters."""
        return max(self.of(task), key=len)

    def draw(self, task: Task, rng: np.random.Generator, first_share: float = 0.0) -> str:
        """Draws a trained wording. A single one is not drawn, so it leaves `rng` as it was.

        Args:
            first_share: how often it is the first one; else it is drawn from all.
        """
        pool = self.of(task)
        if len(pool) > 1 and first_share and rng.random() < first_share:
            return pool[0]
        return pool[rng.integers(len(pool))] if len(pool) > 1 else pool[0]

    def held_out_of(self, task: Task) -> tuple[str, ...]:
        """Lists the wordings that no training uses; where it has none, those of the package."""
        task = _ASKED_AS.get(task, task)
        return self.held_out.get(task) or load_wordings("pools").held_out[task]

    def phrase_in(self, question: str) -> str | None:
        """Returns what a question looks for in the words of training; None for other questions."""
        question, found = question.strip(), ""
        for wording in (*self.of("ground"), *self.of("several")):
            before, after = wording.split(PHRASE)
            rest = question.removeprefix(before).removesuffix(after)
            if before + rest + after == question and before + after and rest.strip():
                found = min(found or rest, rest, key=len)
        return found.strip() or None

    def digest(self) -> str:
        """Returns a hash of all the words, and of the answer that nothing is there."""
        if self == SINGLE:
            words: list[Any] = [{task: self.first(task) for task in FIRST_TASKS}, NOT_THERE]
        else:
            words = [self.to_dict(), NOT_THERE]
        return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, dict[str, list[str]]]:
        """Returns what `from_dict` reads and a YAML file holds."""
        return {
            task: {"trained": list(pool), "held_out": list(self.held_out.get(task, ()))}
            for task, pool in self.trained.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Mapping[str, list[str]]]) -> Wordings:
        """Reads what `to_dict` returned."""
        parts: list[dict[Any, tuple[str, ...]]] = [
            {task: tuple(pool[part]) for task, pool in values.items() if pool.get(part)}
            for part in ("trained", "held_out")
        ]
        return cls(*parts)


SINGLE = Wordings(
    {
        "ground": ("Where is {phrase}?",),
        "refer": ("What is in {box} <region>?",),
        "caption": ("Describe the image.",),
        "locate": ("Where is <region>?",),
        "several": ("Where is {phrase}?",),
        "all": ("Where are all {plural}?",),
        "count": ("How many {plural} are there?",),
        "exists": ("Is there {phrase}?",),
        "grounded_caption": ("Describe the image with boxes.",),
        "region_caption": ("Describe {box} <region>.",),
        "point": ("Point to {phrase}.",),
    }
)


def asked(wording: str, *, phrase: str = "", box: str = "") -> str:
    """Writes a question: the placeholders of a wording filled in. Braces in a phrase are text."""
    several = plural(phrase) if PLURAL in wording else ""
    return wording.format(phrase=phrase, plural=several, box=box)


def load_wordings(source: str) -> Wordings:
    """Loads wordings.

    Args:
        source: `single` is one wording per task; `pools` are those of the package
            (`assets/wordings.yaml`); anything else is the path of a YAML file of the same layout.
            Tasks that a file leaves out are asked in their single wording.

    Raises:
        ValueError: the file cannot be used; names the file, the task and the line.
        FileNotFoundError: there is no such file.
    """
    if source == "single":
        return SINGLE
    path = ASSETS / "wordings.yaml" if source == "pools" else Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"conversations.wordings: no file {source}; expected `single`, `pools` or the path of "
            "a YAML file"
        )
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected YAML in UTF-8; {error}") from error
    trained = dict(SINGLE.trained)
    held_out: dict[Task, tuple[str, ...]] = {}
    for task, pools in _tasks(root, path):
        trained[task] = tuple(pools["trained"])
        held_out[task] = tuple(pools.get("held_out", ()))
    return Wordings(trained, {task: pool for task, pool in held_out.items() if pool})


def _tasks(root: Any, path: Path) -> Iterator[tuple[Task, dict[str, list[str]]]]:
    """Yields each task of a file with its wordings, checked."""
    seen = set()
    for key, node in _items(root, path, "tasks"):
        task, where = key.value, f"{path}, line {key.start_mark.line + 1}, task {key.value}"
        if task not in _PLACEHOLDERS:
            known = ", ".join(_PLACEHOLDERS)
            raise ValueError(f"{where}: there is no such task; expected one of {known}")
        if task in seen:
            raise ValueError(f"{where}: the task is there twice")
        seen.add(task)
        pools: dict[str, list[str]] = {}
        lines: dict[str, int] = {}
        for part, listed in _items(node, path, f"`trained` and `held_out` of task {task}"):
            if part.value not in ("trained", "held_out"):
                line = part.start_mark.line + 1
                raise ValueError(
                    f"{path}, line {line}, task {task}: expected `trained` or `held_out`, got "
                    f"{part.value!r}"
                )
            pools[part.value] = [_wording(item, task, path, lines) for item in _list(listed)]
        if not pools.get("trained"):
            raise ValueError(f"{where}: expected at least one wording under `trained`, found none")
        yield task, pools


def _items(node: Any, path: Path, expected: str) -> list[tuple[Any, Any]]:
    if isinstance(node, yaml.MappingNode):
        return node.value
    line = node.start_mark.line + 1 if node else 1
    raise ValueError(f"{path}, line {line}: expected a mapping with {expected}")


def _list(node: Any) -> list[Any]:
    return node.value if isinstance(node, yaml.SequenceNode) else [node]


def _wording(node: Any, task: Task, path: Path, lines: dict[str, int]) -> str:
    """Checks one wording; `lines` collects those of the task with their lines."""
    line = node.start_mark.line + 1
    where = f"{path}, line {line}, task {task}"
    if not isinstance(node, yaml.ScalarNode) or not node.value.strip():
        raise ValueError(f"{where}: expected a wording, which is a text; put it in quotes")
    text = str(node.value)
    if text in lines:
        raise ValueError(f"{where}: {text!r} stands in line {lines[text]}, too")
    lines[text] = line
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise ValueError(f"{where}: {text!r} has a lone brace; write {{{{ or }}}}") from error
    found = [f"{{{name}}}" for name in names] + [REGION] * text.count(REGION)
    allowed = _PLACEHOLDERS[task]
    if set(found) not in allowed or len(found) != len(set(found)):
        choices = " or ".join(" and ".join(sorted(names)) or "no placeholder" for names in allowed)
        raise ValueError(
            f"{where}: expected {choices}, each once, in {text!r}; found "
            f"{', '.join(found) or 'no placeholder'}"
        )
    return text
