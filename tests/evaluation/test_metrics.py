import json
from dataclasses import replace

import pytest

from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.evaluation.config import EvalConfig
from cloc_mllm.evaluation.metrics import Failures, compute_metrics, pairs_by_task
from cloc_mllm.evaluation.report.table import render_table
from cloc_mllm.evaluation.rows.rows import PredictionRow
from cloc_mllm.evaluation.stats.bootstrap import Bootstrap
from cloc_mllm.evaluation.tasks import EvalData, task_class

FEW = Bootstrap(20)


@pytest.fixture(scope="module")
def references():
    """Of all queries of the default tasks on four scenes."""
    scenes = list(generate_scenes(4, split="test"))
    data = EvalData(lambda: scenes)
    asked = [found for name in EvalConfig().tasks for found in task_class(name)().query_sets(data)]
    return [row for query_set in asked for row in query_set.references]


def perfect(references):
    """Rows that answer every query with its reference."""
    return [
        PredictionRow(
            id=row.id,
            image_id=row.image_id,
            task=row.task,
            boxes=row.boxes[:1],
            labels=row.labels[:1],
            raw_text=row.labels[0],
        )
        for row in references
    ]


def failed(rows, tasks):
    return [
        replace(row, boxes=[], labels=[], raw_text="?!", failure="not_a_box")
        if row.task in tasks
        else row
        for row in rows
    ]


def test_perfect_predictions_score_one(references):
    tasks = compute_metrics(pairs_by_task(perfect(references), references), bootstrap=FEW).tasks
    assert list(tasks) == [
        "region_classification",
        "region_to_text",
        "text_to_region",
        "image_to_text",
        "text_to_image",
        "text_to_box",
        "rec",
        "referring",
    ]
    for task, entry in tasks.items():
        assert entry.main_metric in entry.metrics
        for name, metric in entry.metrics.items():
            got = (metric.value, metric.ci_low, metric.ci_high)
            assert got == (1.0, 1.0, 1.0), (task, name)
            assert (metric.chance or 0) <= 1
    failures = tasks["rec"].failures
    assert failures == Failures(0, tasks["rec"].metrics["acc_at_0_5"].n, {})
    assert failures.rate == 0


def test_unreadable_answers_are_wrong_and_counted(references):
    rows = failed(perfect(references), ["rec", "referring"])
    tasks = compute_metrics(pairs_by_task(rows, references), bootstrap=FEW).tasks
    assert tasks["rec"].metrics["acc_at_0_5"].value == 0
    assert tasks["rec"].metrics["mean_iou"].value == 0
    assert tasks["referring"].metrics["exact_match"].value == 0
    assert tasks["text_to_box"].metrics["mean_iou"].value == 1
    for task in ("rec", "referring"):
        failures = tasks[task].failures
        assert failures.rate == 1 and failures.count == failures.n > 0
        assert failures.reasons == {"not_a_box": failures.n}


def test_a_baseline_stands_beside_with_its_paired_difference(references):
    cloc = [row for row in perfect(references) if row.task not in ("rec", "referring")]
    cloc_references = [row for row in references if row.task not in ("rec", "referring")]
    ours = pairs_by_task(perfect(references), references)
    theirs = pairs_by_task(failed(cloc, ["region_classification"]), cloc_references)
    tasks = compute_metrics(ours, theirs, bootstrap=FEW).tasks
    metric = tasks["region_classification"].metrics["macro_acc"]
    assert (metric.baseline.value, metric.difference.value) == (0, 1)
    assert tasks["text_to_box"].metrics["mean_iou"].difference.value == 0
    assert tasks["rec"].metrics["acc_at_0_5"].baseline is None


def test_unknown_row_task_is_refused(references):
    rows = [replace(row, task="vqa") for row in perfect(references)]
    others = [replace(row, task="vqa") for row in references]
    with pytest.raises(ValueError, match=r"unknown tasks \['vqa'\]"):
        pairs_by_task(rows, others)


def test_the_table_is_aligned_and_says_what_it_shows(references):
    rows = failed(perfect(references), ["rec"])
    table = render_table(compute_metrics(pairs_by_task(rows, references), bootstrap=FEW))
    lines = table.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    assert "baseline model" not in rows[0]
    assert any("macro accuracy" in row and "100.0 [100.0, 100.0]" in row for row in rows)
    assert "(100.0 %), counted as wrong: not_a_box" in table


def test_average_precision_of_answers_with_a_confidence(references):
    pytest.importorskip("pycocotools")
    rows = [replace(row, confidence=0.5) if row.boxes else row for row in perfect(references)]
    metrics = compute_metrics(pairs_by_task(rows, references), bootstrap=FEW)
    num_boxes = sum(len(row.boxes) for row in references if row.task == "text_to_box")
    found = metrics.tasks["text_to_box"].average_precision
    assert found.n_boxes == num_boxes and found.ap == found.ap_50 > 0.5
    assert f"answers by confidence, {num_boxes} true boxes" in render_table(metrics)
    rows = [replace(row, confidence=None) if i % 2 else row for i, row in enumerate(rows)]
    metrics = compute_metrics(pairs_by_task(rows, references), bootstrap=FEW)
    assert "have no confidence" in metrics.tasks["rec"].average_precision
    assert "rec: no average precision: " in render_table(metrics)
    rows = [replace(row, confidence=None) for row in rows]
    metrics = compute_metrics(pairs_by_task(rows, references), bootstrap=FEW)
    assert all(entry.average_precision is None for entry in metrics.tasks.values())
    assert "average precision" not in render_table(metrics)


def test_the_json_holds_every_number_under_its_task_and_leaves_out_what_there_is_not(references):
    rows = failed(perfect(references), ["rec"])
    evaluation = compute_metrics(pairs_by_task(rows, references), bootstrap=FEW)
    found = evaluation.to_dict()
    assert json.loads(json.dumps(found)) == found
    entry = found["tasks"]["rec"]["metrics"]["acc_at_0_5"]
    assert entry["value"] == 0 and entry["n"] > 0
    assert set(entry) == {"value", "ci_low", "ci_high", "n", "n_images", "chance", "whole_image"}
    assert found["tasks"]["rec"]["failures"]["reasons"] == {"not_a_box": entry["n"]}
    assert len(found["tasks"]["rec"]["details"]["iou_curve"]) == 19
    assert found["tasks"]["rec"]["main_metric"] == "acc_at_0_5"
    assert not {"failures", "details"} & set(found["tasks"]["image_to_text"])
