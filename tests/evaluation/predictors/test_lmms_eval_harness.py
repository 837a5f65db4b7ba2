"""Our model in the real lmms-eval, by its own command, where all that it imports is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
pytest.importorskip("sacrebleu", reason="lmms-eval lacks sacrebleu")
pytest.importorskip("pytablewriter", reason="lmms-eval lacks pytablewriter")
pytest.importorskip("tenacity", reason="lmms-eval lacks tenacity")

from cloc_mllm.evaluation.predictors.lmms_eval import answer_text, content_of
from cloc_mllm.inference.chat import Chat, Sampling, answer_chat
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.shipped import find_model
from tests.evaluation.predictors.lmms_eval_rows import MIXED_TASK, TASK, main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both local tasks of three scenes, answered in batches of eight, every answer logged."""
    out = tmp_path_factory.mktemp("lmms")
    assert main(["--limit", "3", "--output_dir", str(out)]) == 0
    command = [sys.executable, "-m", "lmms_eval", "eval", "--model", "cloc_mllm"]
    command += ["--model_args", "device=cpu", "--batch_size", "8", "--log_samples"]
    command += ["--tasks", f"{TASK},{MIXED_TASK}", "--include_path", str(out)]
    done = subprocess.run(
        [*command, "--output_path", str(out / "results")], capture_output=True, text=True
    )
    assert done.returncode == 0 and "refcoco_ACC@0.5" in done.stdout, done.stderr[-3000:]
    return out


def samples(run: Path, task: str) -> list[dict[str, Any]]:
    [file] = (run / "results").rglob(f"*_samples_{task}.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda row: int(row["doc_id"]))


def test_answers_about_none_one_and_several_images_are_the_models(run: Path) -> None:
    predictor = GroundingPredictor.from_pretrained(find_model("mllm"), device="cpu")
    file, cache = str(run / "mixed" / "test.parquet"), str(run / "cache")
    docs = datasets.Dataset.from_parquet(file, cache_dir=cache)
    answered = samples(run, MIXED_TASK)
    assert {len(doc["images"]) for doc in docs} == {0, 1, 2}
    for doc, sample in zip(docs, answered, strict=True):
        content = content_of(doc["question"], len(doc["images"]))
        chat = Chat([{"role": "user", "content": content}], list(doc["images"]))
        expected = answer_chat(predictor, chat, Sampling(max_new_tokens=16), lambda _: None)
        assert sample["filtered_resps"] == answer_text(expected)
        assert ("exact" in sample) == bool(doc["answer"])


def test_the_rec_task_reads_our_boxes(run: Path) -> None:
    boxes = [sample["refcoco_IoU"]["pred"] for sample in samples(run, TASK)]
    assert len(boxes) > 10 and all(0 <= value <= 1 for box in boxes for value in box)
    assert sum(map(any, boxes)) > 0.8 * len(boxes)  # the task writes zeros for no box
