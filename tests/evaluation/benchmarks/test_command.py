"""`cloc-mllm eval benchmark` from its arguments to its files, with a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cloc_mllm.evaluation.commands import main
from cloc_mllm.evaluation.rows.rows import read_predictions, read_references
from tests.evaluation.benchmarks.conftest import write_lines
from tests.evaluation.benchmarks.test_judge import FakeJudge, fake

__all__ = ["fake"]


def run_benchmark(name: str, out: Path, mllm: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    common = ["--mllm", str(mllm), "--output_dir", str(out), "--device", "cpu"]
    status = main(["benchmark", name, *common, "--bootstrap_samples", "10", *arguments])
    metrics = out / "metrics.json"
    return status, json.loads(metrics.read_text()) if metrics.exists() else {}


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
        run_benchmark("pope", tmp_path / "o", mllm_dir, *pope)
    assert not (tmp_path / "o").exists()
    status, metrics = run_benchmark("pope", tmp_path / "o", mllm_dir, *pope, "--allow_partial")
    assert status == 0
    assert metrics["about"]["asked"] == "2 of 3 questions (missing_image 1)"
    assert metrics["tasks"]["pope"]["accuracy"]["n"] == 2
    assert "POPE random: 2 of 3 questions" in capsys.readouterr().out
    assert "POPE" in (tmp_path / "o" / "report.html").read_text()
    ids = [row.id for row in read_references(tmp_path / "o" / "references.jsonl")]
    rows = read_predictions(tmp_path / "o" / "predictions.jsonl")
    assert ids == [row.id for row in rows] == ["pope/random/0", "pope/random/1"]
    assert rows[0].model == str(mllm_dir)
    _, limited = run_benchmark("pope", tmp_path / "l", mllm_dir, *pope, "--limit", "1")
    assert limited["about"]["asked"] == "1 of 3 questions (missing_image 1, over_limit 1)"


def test_rejection_by_both_models(mllm_dir, cloc_dir, tmp_path: Path) -> None:
    arguments = ["--scenes", "3"]
    _, by_mllm = run_benchmark("rejection", tmp_path / "m", mllm_dir, *arguments)
    arguments += ["--by", "cloc", "--cloc", str(cloc_dir)]
    _, by_cloc = run_benchmark("rejection", tmp_path / "c", mllm_dir, *arguments)
    assert (
        by_mllm["tasks"]["rejection"]["auroc"]["n"] == by_mllm["tasks"]["rejection"]["right"]["n"]
    )
    assert by_cloc["about"]["model"] == str(cloc_dir)
    assert by_cloc["failures"]["rejection"]["count"] == 0
    assert -1 <= by_cloc["about"]["settings"]["threshold"] <= 1


def test_captioning(mllm_dir, tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap", reason="captioning needs the eval extra")
    arguments = ["--scenes", "3", "--limit", "6"]
    _, metrics = run_benchmark("captioning", tmp_path, mllm_dir, *arguments)
    assert metrics["tasks"]["region_captioning"]["cider"]["n"] == 6


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
    status, metrics = run_benchmark("ferret-bench", out, mllm_dir, *ferret)
    assert (status, metrics) == (0, {}) and "1 answers in" in capsys.readouterr().out
    judge = ["--judge_url", fake.url, "--judge_model", "judge", "--judge_key_env", "MY_KEY"]
    fake.replies = ["I would rather not."]
    status, metrics = run_benchmark("ferret-bench", out, mllm_dir, *ferret, *judge)
    assert status == 1 and metrics["about"]["judged"] == "0 of 1 by judge"
    assert metrics["tasks"]["ferret_bench"] == {}
    assert "not judged: judge_no_scores; run again" in capsys.readouterr().out
    fake.replies = ["10 5"]
    status, metrics = run_benchmark("ferret-bench", out, mllm_dir, *ferret, *judge)
    assert status == 0 and metrics["tasks"]["ferret_bench"]["relative_score"]["value"] == 0.5
    assert fake.requests[0][2] == "Bearer secret"
    assert not any("secret" in path.read_text() for path in out.iterdir())
    with pytest.raises(ValueError, match="--judge_url and --judge_model together"):
        run_benchmark("ferret-bench", out, mllm_dir, *ferret, "--judge_model", "judge")


def test_help_lists_the_families(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["benchmark", "--help"])
    shown = capsys.readouterr().out
    for name in ("refcoco", "pope", "ref-lvis", "ferret-bench", "rejection", "captioning"):
        assert name in shown
