"""`cloc-mllm eval` from its arguments to its files, with tiny random models."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cloc_mllm import cli
from cloc_mllm.evaluation.commands import main, normalised
from cloc_mllm.evaluation.rows.files import read_predictions, read_references
from cloc_mllm.extras import install_command
from tests.evaluation.helpers import write_lines
from tests.evaluation.predictors.test_judge import FakeJudge, fake

__all__ = ["fake"]


def run_task(name: str, out: Path, mllm: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    common = ["--mllm", str(mllm), "--output_dir", str(out), "--device", "cpu"]
    status = main([name, *common, "--bootstrap_samples", "10", *arguments])
    metrics = out / "metrics.json"
    return status, json.loads(metrics.read_text()) if metrics.exists() else {}


@dataclass
class Options:
    paths: list[Path] = field(default_factory=list)
    flag: bool = False
    name: str = ""
    number: int = 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--flag"], ["--flag", "true"]),
        (["--flag", "--name", "x"], ["--flag", "true", "--name", "x"]),
        (["--flag", "false"], ["--flag", "false"]),
        (["--flag=false"], ["--flag=false"]),
        (["--paths", "a"], ["--paths", '["a"]']),
        (["--paths", "a", "b", "--flag"], ["--paths", '["a", "b"]', "--flag", "true"]),
        (["--paths", "it's", 'a "b"', "c\\d"], ["--paths", '["it\'s", "a \\"b\\"", "c\\\\d"]']),
        (["--paths", "[a, b]"], ["--paths", "[a, b]"]),
        (["--name", "a", "--number", "-1"], ["--name", "a", "--number", "-1"]),
        (["--other", "a", "b"], ["--other", "a", "b"]),
        (["--paths"], ["--paths"]),
        ([], []),
    ],
    ids=str,
)
def test_flags_and_lists_are_written_out(given: list[str], expected: list[str]) -> None:
    assert normalised(given, Options) == expected


@pytest.fixture
def pope(tmp_path: Path, photos) -> list[str]:
    rows = [
        {"question_id": i, "image": "a.jpg", "text": "Is there a dog?", "label": label}
        for i, label in enumerate(("yes", "no"))
    ]
    rows.append({**rows[0], "question_id": 2, "image": "gone.jpg"})
    questions = write_lines(tmp_path / "pope_random.json", rows)
    return ["--questions", str(questions), "--images", str(photos("a.jpg"))]


def test_a_part_of_a_benchmark_is_asked_only_if_told(mllm_dir, pope, tmp_path, capsys) -> None:
    with pytest.raises(ValueError, match=r"POPE random: expected all 3 .*\(missing_image 1\); get"):
        run_task("pope", tmp_path / "o", mllm_dir, *pope)
    assert not (tmp_path / "o").exists()
    status, metrics = run_task("pope", tmp_path / "o", mllm_dir, *pope, "--allow_partial")
    assert status == 0
    assert metrics["about"]["tasks"]["pope"] == {
        "benchmark": "POPE random",
        "asked": "2 of 3 questions (missing_image 1)",
    }
    assert metrics["about"]["config"]["tasks"] == [
        {"pope": {"questions": [pope[1]], "images": pope[3], "suffix": ""}}
    ]
    assert metrics["tasks"]["pope"]["metrics"]["accuracy"]["n"] == 2
    assert "asked: 2 of 3 questions (missing_image 1)" in capsys.readouterr().out
    assert "POPE" in (tmp_path / "o" / "report.html").read_text()
    ids = [row.id for row in read_references(tmp_path / "o" / "references.jsonl")]
    rows = read_predictions(tmp_path / "o" / "predictions.jsonl")
    assert ids == [row.id for row in rows] == ["pope/random/0", "pope/random/1"]
    assert rows[0].model == str(mllm_dir)
    _, limited = run_task("pope", tmp_path / "l", mllm_dir, *pope, "--limit", "1")
    asked = limited["about"]["tasks"]["pope"]["asked"]
    assert asked == "1 of 3 questions (missing_image 1, over_limit 1)"


def test_tasks_with_options_stand_beside_others(mllm_dir, cloc_dir, pope, tmp_path) -> None:
    tasks = [
        "text_to_box",
        {"pope": {"questions": [pope[1]], "images": pope[3], "suffix": " Yes or no?"}},
        {"true_boxes": {"features": ["crop"]}},
    ]
    common = [f"--mllm={mllm_dir}", f"--cloc={cloc_dir}", "--device=cpu", "--num_examples=1"]
    common += [f"--output_dir={tmp_path / 'o'}", "--bootstrap_samples=5", "--limit=2"]
    assert main(["--tasks", json.dumps(tasks), *common]) == 0
    metrics = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert list(metrics["tasks"]) == ["text_to_box", "pope", "true_box_crop"]
    rows = read_predictions(tmp_path / "o" / "predictions.jsonl")
    assert {row.prompt for row in rows if row.task == "pope"} == {"Is there a dog? Yes or no?"}


def test_several_names_are_several_tasks(cloc_dir, tmp_path) -> None:
    common = [f"--cloc={cloc_dir}", "--mllm=none", "--device=cpu", "--num_examples=1"]
    common += [f"--output_dir={tmp_path}", "--bootstrap_samples=5", "--limit=2"]
    assert main(["text_to_box", "region_classification", *common]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics["tasks"]) == ["text_to_box", "region_classification"]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("[poppe]", "unknown task 'poppe'; expected one of: ferret_bench, .*, or the path of a Py"),
        ("[gone/my_task.py]", "unknown task 'gone/my_task.py'; expected one of"),
        ("[{true_boxes: {anotations: F}}]", "task true_boxes: .*'anotations'.*; see cloc-mllm ev"),
        ("[{true_boxes: {features: [crops]}}]", "task true_boxes: .*crops.*; see cloc-mllm eval t"),
        ("[pope]", "task pope: .*required: questions, images; see cloc-mllm eval pope --help"),
        ("[{rec: {}, pope: {}}]", "expected one task per list item, got rec, pope"),
        ("[rec, rec]", "two tasks of this run both give rows of 'rec'"),
    ],
)
def test_wrong_tasks_are_refused_in_one_line(tasks: str, message: str, tmp_path, capsys) -> None:
    arguments = ["--limit", "1", "--output_dir", str(tmp_path / "o")]
    with pytest.raises(ValueError, match=message) as caught:
        main(["--tasks", tasks, *arguments])
    assert "\n" not in str(caught.value)
    assert cli.main(["eval", "--tasks", tasks, *arguments]) == 2
    assert capsys.readouterr().err.startswith("cloc-mllm: error: ")
    assert not (tmp_path / "o").exists()


def test_rejection_by_both_models(mllm_dir, cloc_dir, tmp_path: Path) -> None:
    arguments = ["--num_scenes", "3"]
    _, by_mllm = run_task("rejection", tmp_path / "m", mllm_dir, *arguments)
    arguments += ["--by", "cloc", "--cloc", str(cloc_dir)]
    _, by_cloc = run_task("rejection", tmp_path / "c", mllm_dir, *arguments)
    found = by_mllm["tasks"]["rejection"]["metrics"]
    assert found["auroc"]["n"] == found["right"]["n"] > 6
    assert by_cloc["tasks"]["rejection"]["failures"]["count"] == 0
    rows = read_predictions(tmp_path / "c" / "predictions.jsonl")
    assert {row.model for row in rows} == {str(cloc_dir)}
    (threshold,) = {row.settings["threshold"] for row in rows}
    assert -1 <= threshold <= 1


def test_captioning(mllm_dir, tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap", reason="captioning needs the eval extra")
    _, metrics = run_task("region_captioning", tmp_path, mllm_dir, "--limit", "3")
    assert metrics["tasks"]["region_captioning"]["metrics"]["cider"]["n"] > 6
    assert metrics["about"]["num_records"] == 3


@pytest.fixture
def ferret(tmp_path: Path, photos) -> list[str]:
    row = {"question_id": 0, "image": "a.jpg", "category": "refer_desc"}
    texts = {"questions": "What is [0, 0, 0.5, 0.5]?", "contexts": "a dog", "answers": "A dog."}
    files = [
        (f"--{name}", str(write_lines(tmp_path / name, [{**row, "text": text}])))
        for name, text in texts.items()
    ]
    return [part for pair in files for part in pair] + ["--images", str(photos("a.jpg"))]


def test_ferret_bench_is_answered_then_judged(
    mllm_dir, ferret, fake: FakeJudge, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    out = tmp_path / "out"
    status, metrics = run_task("ferret_bench", out, mllm_dir, *ferret)
    assert (status, metrics) == (0, {}) and "1 answers in" in capsys.readouterr().out
    assert len(read_references(out / "references.jsonl")) == 1
    judge = ["--judge_url", fake.url, "--judge_model", "judge", "--judge_key_env", "MY_KEY"]
    fake.replies = ["I would rather not."]
    status, metrics = run_task("ferret_bench", out, mllm_dir, *ferret, *judge)
    assert status == 1
    assert metrics["about"]["tasks"]["ferret_bench"]["judged"] == "0 of 1 by judge"
    assert metrics["tasks"]["ferret_bench"]["metrics"] == {}
    assert "not judged: judge_no_scores; run again" in capsys.readouterr().out
    fake.replies = ["10 5"]
    status, metrics = run_task("ferret_bench", out, mllm_dir, *ferret, *judge)
    assert status == 0
    assert metrics["tasks"]["ferret_bench"]["metrics"]["relative_score"]["value"] == 0.5
    assert fake.requests[0][2] == "Bearer secret"
    assert not any("secret" in path.read_text() for path in out.iterdir())
    with pytest.raises(ValueError, match="--judge_url and --judge_model together"):
        run_task("ferret_bench", out, mllm_dir, *ferret, "--judge_model", "judge")


def test_answers_that_wait_for_a_judge_do_not_hold_up_other_tasks(
    mllm_dir, ferret, tmp_path: Path, capsys
) -> None:
    questions, contexts, answers, images = ferret[1::2]
    files = {"questions": [questions], "contexts": [contexts], "answers": [answers]}
    options = {**files, "images": images}
    tasks = json.dumps([{"ferret_bench": options}, "rec"])
    out = tmp_path / "out"
    arguments = ["--mllm", str(mllm_dir), "--device", "cpu", "--output_dir", str(out)]
    assert main(["--tasks", tasks, "--limit", "1", "--bootstrap_samples", "5", *arguments]) == 0
    assert "1 answers in" in capsys.readouterr().out
    assert list(json.loads((out / "metrics.json").read_text())["tasks"]) == ["rec"]
    assert {row.task for row in read_references(out / "references.jsonl")} == {
        "ferret_bench",
        "rec",
    }


def test_help_lists_the_tasks(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for name in ("refcoco", "pope", "ref_lvis", "ferret_bench", "rejection", "region_captioning"):
        assert f"  {name}\n" in shown
    with pytest.raises(SystemExit):
        main(["pope", "--help"])
    shown = capsys.readouterr().out
    assert "POPE: is there a THING in the image" in shown
    assert "--questions" in shown and "--allow_partial" in shown and "--tasks" not in shown


def test_without_the_plots_library_nothing_is_answered(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "o"
    arguments = ["--tasks", "[text_to_box]", "--limit", "1", "--output_dir", str(out)]
    assert cli.main(["eval", *arguments]) == 2
    assert capsys.readouterr().err == (
        f"cloc-mllm: error: matplotlib is not installed; run: {install_command('eval')}\n"
    )
    assert not out.exists()
