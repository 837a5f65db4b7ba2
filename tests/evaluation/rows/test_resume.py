"""A run that is killed goes on where it was, and ends with what an undisturbed run writes."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from cloc_mllm.data.parquet import write_records
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.evaluation.config import EvalConfig
from cloc_mllm.evaluation.predictors.mllm import MllmRows
from cloc_mllm.evaluation.record_index import records_to_score
from cloc_mllm.evaluation.rows.files import read_predictions, write_rows
from cloc_mllm.evaluation.rows.resume import model_identity, resume_predictions
from cloc_mllm.evaluation.rows.rows import PredictionRow
from cloc_mllm.evaluation.run import evaluate
from cloc_mllm.evaluation.tasks.text_to_box import TextToBox
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from tests.evaluation.helpers import query_sets

SETTINGS = {"mllm": {"name": "m", "files": "1"}, "precision": "fp32"}


def row(row_id):
    return PredictionRow(row_id, "i", "rec", raw_text="é")


@pytest.fixture
def config(cloc_dir, mllm_dir, tmp_path):
    write_records(generate_scenes(8, split="test", long_side=64), tmp_path / "data")
    return EvalConfig(
        cloc=str(cloc_dir),
        mllm=str(mllm_dir),
        data=str(tmp_path / "data"),
        tasks=["text_to_box", "rec", "referring"],
        output_dir=str(tmp_path / "killed"),
        batch_size=1,
        device="cpu",
        bootstrap_samples=10,
        num_examples=0,
    )


def command(config):
    given = {
        name: getattr(config, name)
        for name in ("cloc", "mllm", "data", "output_dir", "batch_size", "device")
    }
    arguments = [f"--{name}={value}" for name, value in given.items()]
    return [sys.executable, "-m", "cloc_mllm.cli", "eval", *arguments, f"--tasks={config.tasks}"]


def kill_when_it_has_written(config, path, num_rows):
    """SIGKILL, as the kernel does when memory runs out."""
    process = subprocess.Popen(command(config), stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not path.is_file() or path.read_bytes().count(b"\n") < num_rows:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < until, "the run wrote nothing for two minutes"
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL


def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(config, tmp_path, monkeypatch):
    path = tmp_path / "killed" / "predictions.jsonl"
    (boxes,) = query_sets(TextToBox(), records_to_score(config.data))
    num_boxes = len(boxes.queries)
    kill_when_it_has_written(config, path, num_boxes + 5)
    with path.open("ab") as file:  # what a kill in the middle of a write leaves
        file.write(b'{"id": "rec/half')
    there = path.read_bytes().count(b"\n")
    made = []
    predict = MllmRows.rows
    monkeypatch.setattr(
        MllmRows, "rows", lambda *args: (made.append(r.id) or r for r in predict(*args))
    )

    resumed = evaluate(config)
    num_made = len(made)
    whole = evaluate(replace(config, output_dir=str(tmp_path / "whole")))

    rows = read_predictions(path)
    assert len(rows) == len({r.id for r in rows}) == there + num_made
    assert num_made < len(made) - num_made  # the second run made all of the MLLM's rows
    expected = {r.id: r for r in read_predictions(tmp_path / "whole" / "predictions.jsonl")}
    for actual in rows:
        confidence = expected[actual.id].confidence
        assert actual == replace(expected[actual.id], confidence=actual.confidence)
        assert actual.confidence == pytest.approx(confidence, abs=1e-5)
    assert resumed.tasks == whole.tasks


def test_a_finished_run_is_only_scored_again(config, monkeypatch):
    config = replace(config, tasks=["referring"], limit=1)
    first = evaluate(config)
    monkeypatch.setattr(GroundingPredictor, "from_pretrained", None)

    again = evaluate(replace(config, bootstrap_samples=20, batch_size=7))

    found = [e.tasks["referring"].metrics["word_f1"].n for e in (first, again)]
    assert found[0] == found[1] > 0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("limit", 2, "queries: there"),
        ("tasks", ["rec"], "queries: there"),
        ("precision", "bf16", "precision: there fp32, now bf16"),
        ("data", "", "data: there .*data, now "),
    ],
)
def test_other_settings_are_refused_and_nothing_is_lost(config, tmp_path, name, value, message):
    config = replace(config, tasks=["text_to_box"], limit=1)
    evaluate(config)
    files = {path.name: path.read_bytes() for path in (tmp_path / "killed").iterdir()}

    with pytest.raises(ValueError, match=f"{message}.*--overwrite true"):
        evaluate(replace(config, **{name: value}))

    assert files == {path.name: path.read_bytes() for path in (tmp_path / "killed").iterdir()}
    evaluate(replace(config, overwrite=True, limit=2, tasks=["text_to_box"]))
    assert len(read_predictions(tmp_path / "killed" / "predictions.jsonl")) > len(
        files["predictions.jsonl"].splitlines()
    )


def test_answers_of_another_mllm_are_not_mixed_in(config, mllm_dir, tmp_path):
    config = replace(config, tasks=["referring"], limit=1)
    evaluate(config)
    other = replace(config, mllm=str(shutil.copytree(mllm_dir, tmp_path / "other")))
    with pytest.raises(ValueError, match=r"made with other settings \(mllm: there"):
        evaluate(other)
    assert evaluate(replace(other, overwrite=True)).tasks["referring"].failures.n > 0


def test_a_missing_or_doubled_row_stops_the_scoring(config, tmp_path):
    config = replace(config, tasks=["text_to_box"], limit=2)
    evaluate(config)
    path = tmp_path / "killed" / "predictions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[0]]))

    with pytest.raises(ValueError, match="1 ids are there more than once in the predictions"):
        evaluate(config)


def test_rows_are_on_disk_before_the_next_is_made(tmp_path):
    path = tmp_path / "p.jsonl"
    assert resume_predictions(path, SETTINGS) == set()

    def rows():
        for number in range(3):
            assert len(path.read_text().splitlines()) == number
            yield row(f"q{number}")

    assert write_rows(rows(), path, append=True) == 3
    assert resume_predictions(path, SETTINGS) == {"q0", "q1", "q2"}


@pytest.mark.parametrize(
    "tail", ['{"id": "q1"', '{"id": "q1", "image_id": "i", "task": "rec"}', "é"]
)
def test_a_last_line_without_its_end_is_made_again(tmp_path, tail):
    path = tmp_path / "p.jsonl"
    resume_predictions(path, SETTINGS)
    write_rows([row("q0")], path, append=True)
    with path.open("ab") as file:
        file.write(tail.encode()[:-1] if tail == "é" else tail.encode())

    assert resume_predictions(path, SETTINGS) == {"q0"}
    write_rows([row("q1")], path, append=True)
    assert [r.id for r in read_predictions(path)] == ["q0", "q1"]


def test_what_cannot_be_continued_says_why(tmp_path):
    path = tmp_path / "p.jsonl"
    write_rows([row("q0")], path, append=True)
    with pytest.raises(ValueError, match=r"p\.settings\.json, which says how .* is missing"):
        resume_predictions(path, SETTINGS)
    resume_predictions(path, SETTINGS, overwrite=True)
    write_rows([row("q0")], path, append=True)
    changed = {**SETTINGS, "mllm": {"name": "m", "files": "2"}}
    with pytest.raises(ValueError, match=r"mllm: there .*'files': '1'.*, now .*'files': '2'"):
        resume_predictions(path, changed)
    path.write_text(f"nonsense\n{json.dumps({'id': 'q'})}\n")
    with pytest.raises(ValueError, match=r"p\.jsonl line 1: expected one JSON object"):
        resume_predictions(path, SETTINGS)


def test_a_retrained_model_is_told_apart(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = model_identity(tmp_path)
    assert model_identity(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"another")
    assert model_identity(tmp_path) != first
    assert model_identity("org/name") == model_identity("org/name")
