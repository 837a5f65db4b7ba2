"""Every task module keeps the same promises, and adding a task touches one file."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from cloc_mllm import cli
from cloc_mllm.data.parquet import write_records
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.evaluation.commands import main
from cloc_mllm.evaluation.predictors.judge import SCORED
from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow, ScoredPair
from cloc_mllm.evaluation.tasks import (
    EvalData,
    all_scorers,
    build_task,
    scorers_of,
    task_class,
    task_names,
)
from cloc_mllm.evaluation.tasks.rejection import TASK as REJECTION

NAMES = task_names()


def test_each_task_is_a_module_of_the_folder() -> None:
    import cloc_mllm.evaluation.tasks as package

    folder = Path(package.__file__).parent
    expected = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    assert expected == NAMES and len(NAMES) == 16


@pytest.mark.parametrize("name", NAMES)
def test_a_module_says_what_its_task_is(name: str) -> None:
    module = importlib.import_module(f"cloc_mllm.evaluation.tasks.{name}")
    assert len(module.__doc__.split()) > 15  # the protocol: what is asked, what counts as right
    cls = task_class(name)
    assert cls.__doc__.partition("\n")[0].endswith((".", ","))
    for scorer in module.SCORERS.values():
        assert scorer.title and scorer.main_metric and len(scorer.protocol.split()) > 15


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_type_and_is_described(name: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = capsys.readouterr().out
    assert "Unvalidated" not in shown
    for option in fields(task_class(name)):
        assert f"--{option.name}" in shown
        described = shown.partition(f"--{option.name}")[2]
        assert described.strip()


@pytest.mark.parametrize("name", NAMES)
def test_its_scorers_are_known_by_the_task_of_their_rows(name: str) -> None:
    known = all_scorers()
    scorers = scorers_of(name)
    assert scorers
    for row_task, scorer in scorers.items():
        assert known[row_task] is scorer
        assert scorer.drawn in ("answer", "asked", "nothing")


def perfect(reference: ReferenceRow) -> PredictionRow:
    """The answer that its reference asks for, in every form that a scorer may read."""
    row = PredictionRow(
        reference.id,
        reference.image_id,
        reference.task,
        raw_text=reference.labels[0] if reference.labels else "",
        boxes=reference.boxes[:1],
        labels=[] if reference.choices else reference.labels[:1],
    )
    if reference.task == "ferret_bench":
        return PredictionRow(row.id, row.image_id, row.task, labels=SCORED, scores=[8.0, 8.0])
    return row


def references(row_task: str) -> list[ReferenceRow]:
    """Three queries on three images, as the task's own references look."""
    box = (0.1, 0.1, 0.5, 0.5)
    more: dict[str, dict[str, Any]] = {
        "pope": {"labels": ["yes"], "choices": ["yes", "no"], "boxes": []},
        "ref_lvis": {"choices": ["a red crab", "boat"]},
        REJECTION: {"labels": ["present"]},
    }
    return [
        ReferenceRow(
            f"{row_task}/{index}",
            f"i{index}",
            row_task,
            **{"boxes": [box], "labels": ["a red crab"], "num_candidates": 7}
            | more.get(row_task, {}),
        )
        for index in range(3)
    ]


@pytest.mark.parametrize("row_task", all_scorers())
def test_perfect_answers_have_the_best_main_metric(row_task: str) -> None:
    if row_task == "region_captioning":
        pytest.importorskip("pycocoevalcap", reason="captioning needs the eval extra")
    scorer = all_scorers()[row_task]
    pairs = [ScoredPair(perfect(row), row) for row in references(row_task)]
    scores = scorer.score(pairs)
    assert scorer.main_metric in scores
    assert not scorer.example_metric or scorer.example_metric in scores
    if row_task != "region_captioning":  # of three alike captions, no word tells any apart
        assert scores[scorer.main_metric].mean() == 1
    if scorer.is_failure is not None:
        assert not any(scorer.is_failure(pair) for pair in pairs)
    for floors in (scorer.chance, scorer.whole_image):
        if floors is not None:
            found = floors([pair.reference for pair in pairs])
            assert scorer.main_metric in found and all(0 <= x <= 1 for x in found.values())


@pytest.fixture(scope="module")
def record_index() -> EvalData:
    scenes = list(generate_scenes(3, split="test", long_side=64))
    return EvalData(lambda: scenes)


@pytest.mark.parametrize("name", [n for n in NAMES if task_class(n).reads_records])
def test_what_is_asked_of_records_is_scored_by_the_same_module(name: str, record_index) -> None:
    if name == "phrase_grounding":
        pytest.skip("needs annotations of its own, see test_phrase_grounding.py")
    asked = build_task(name).query_sets(record_index)
    assert {query_set.task for query_set in asked} == set(scorers_of(name))
    for query_set in asked:
        assert query_set.answered_by in ("cloc", "mllm")
        assert query_set.image_ids == record_index.index.image_ids


def documented_task() -> str:
    """The example of docs/how-to/add_your_own.md: counting the regions of each image."""
    docs = Path(__file__).resolve().parents[3] / "docs" / "how-to" / "add_your_own.md"
    chapter = docs.read_text(encoding="utf-8").partition("## A task of your own")[2]
    return chapter.partition("```python\n")[2].partition("```")[0]


COUNTING = documented_task()


@pytest.fixture
def counting(tmp_path: Path) -> Path:
    path = tmp_path / "counting.py"
    path.write_text(COUNTING)
    return path


def test_a_task_of_ones_own_is_one_file(counting: Path, mllm_dir, tmp_path, capsys) -> None:
    write_records(generate_scenes(4, split="test", long_side=64), tmp_path / "data")
    out = tmp_path / "out"
    models = ["--mllm", str(mllm_dir), "--device", "cpu", "--data", str(tmp_path / "data")]
    common = [*models, "--bootstrap_samples", "10", "--num_examples", "1"]
    tasks = json.dumps([{str(counting): {"thing": "things"}}, "referring"])
    assert cli.main(["eval", "--tasks", tasks, *common, "--output_dir", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics["tasks"]) == ["counting", "referring"]
    entry = metrics["tasks"]["counting"]
    assert entry["metrics"]["acc"]["n"] == entry["failures"]["n"] == 4
    page = (out / "report.html").read_text()
    assert "Counting (MLLM)" in page and "The first number of the answer counts." in page
    assert "How many things are there?" in page
    assert "| counting " in capsys.readouterr().out

    rows = ["--predictions", str(out / "predictions.jsonl")]
    rows += ["--references", str(out / "references.jsonl")]
    assert cli.main(["eval", "score", "--task", "counting", *rows]) == 0
    assert "counting" in capsys.readouterr().out


def test_it_has_options_and_a_folder_of_its_own(
    counting: Path, mllm_dir, tmp_path, monkeypatch
) -> None:
    """A fresh interpreter: nothing of another run is known."""
    write_records(generate_scenes(2, split="test", long_side=64), tmp_path / "data")
    command = [sys.executable, "-m", "cloc_mllm.cli", "eval"]
    arguments = [str(counting), "--thing", "dots", "--mllm", str(mllm_dir), "--device", "cpu"]
    arguments += ["--data", str(tmp_path / "data"), "--bootstrap_samples", "10"]
    subprocess.run([*command, *arguments], cwd=tmp_path, check=True, capture_output=True)
    out = tmp_path / "runs" / "eval-counting"
    first = json.loads((out / "predictions.jsonl").read_text().splitlines()[0])
    assert first["prompt"] == "How many dots are there?"

    rows = ["--predictions", str(out / "predictions.jsonl")]
    rows += ["--references", str(out / "references.jsonl"), "--task"]
    scored = subprocess.run(
        [*command, "score", *rows, str(counting)], cwd=tmp_path, capture_output=True, text=True
    )
    assert scored.returncode == 0 and "counting" in scored.stdout, scored.stderr
    unknown = subprocess.run(
        [*command, "score", *rows, "counting"], cwd=tmp_path, capture_output=True, text=True
    )
    assert unknown.returncode == 2 and "unknown task 'counting'; expected" in unknown.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("SCORERS = {}\n", "expected one subclass of Task, found 0"),
        (f"{COUNTING}\n\nclass Other(Task):\n    pass\n", "expected one subclass of Task, found 2"),
    ],
    ids=["none", "two"],
)
def test_a_file_holds_one_task(tmp_path: Path, source: str, message: str) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(source)
    with pytest.raises(ValueError, match=message):
        task_class(str(path))
