from dataclasses import replace

import pytest
from cloc_mllm.evaluation.scoring import compute_metrics, pairs_by_task

from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.evaluation.config import EvalConfig
from cloc_mllm.evaluation.queries import TASKS, build_benchmark, row_tasks
from cloc_mllm.evaluation.report.table import metric_title, render_table
from cloc_mllm.evaluation.rows.rows import PredictionRow


@pytest.fixture(scope="module")
def bench():
    return build_benchmark(list(generate_scenes(4, split="test")), TASKS)


def perfect(bench):
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
        for row in bench.references
    ]


def failed(rows, tasks):
    return [
        replace(row, boxes=[], labels=[], raw_text="?!", failure="not_a_box")
        if row.task in tasks
        else row
        for row in rows
    ]


def test_perfect_predictions_score_one(bench):
    metrics = compute_metrics(pairs_by_task(perfect(bench), bench.references), samples=20)
    assert list(metrics["tasks"]) == row_tasks(EvalConfig().tasks)
    for task, entries in metrics["tasks"].items():
        for metric, entry in entries.items():
            got = (entry["value"], entry["ci_low"], entry["ci_high"])
            assert got == (1.0, 1.0, 1.0), (task, metric)
            assert entry.get("chance", 0) <= 1
    assert metrics["failures"]["rec"] == {
        "count": 0,
        "n": metrics["tasks"]["rec"]["acc_at_0_5"]["n"],
        "rate": 0.0,
        "reasons": {},
    }


def test_unreadable_answers_are_wrong_and_counted(bench):
    rows = failed(perfect(bench), ["rec", "referring"])
    metrics = compute_metrics(pairs_by_task(rows, bench.references), samples=20)
    assert metrics["tasks"]["rec"]["acc_at_0_5"]["value"] == 0
    assert metrics["tasks"]["rec"]["mean_iou"]["value"] == 0
    assert metrics["tasks"]["referring"]["exact_match"]["value"] == 0
    assert metrics["tasks"]["text_to_box"]["mean_iou"]["value"] == 1
    for task in ("rec", "referring"):
        entry = metrics["failures"][task]
        assert entry["rate"] == 1 and entry["count"] == entry["n"] > 0
        assert entry["reasons"] == {"not_a_box": entry["n"]}


def test_a_baseline_stands_beside_with_its_paired_difference(bench):
    cloc = [row for row in perfect(bench) if row.task not in ("rec", "referring")]
    references = [row for row in bench.references if row.task not in ("rec", "referring")]
    ours = pairs_by_task(perfect(bench), bench.references)
    theirs = pairs_by_task(failed(cloc, ["region_classification"]), references)
    tasks = compute_metrics(ours, theirs, samples=20)["tasks"]
    entry = tasks["region_classification"]["macro_acc"]
    assert (entry["baseline"]["value"], entry["difference"]["value"]) == (0, 1)
    assert tasks["text_to_box"]["mean_iou"]["difference"]["value"] == 0
    assert "baseline" not in tasks["rec"]["acc_at_0_5"]


def test_unknown_row_task_is_refused(bench):
    rows = [replace(row, task="vqa") for row in perfect(bench)]
    references = [replace(row, task="vqa") for row in bench.references]
    with pytest.raises(ValueError, match=r"unknown tasks \['vqa'\]"):
        pairs_by_task(rows, references)


def test_the_table_is_aligned_and_says_what_it_shows(bench):
    rows = failed(perfect(bench), ["rec"])
    table = render_table(compute_metrics(pairs_by_task(rows, bench.references), samples=20))
    lines = table.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    assert "baseline model" not in rows[0]
    assert any("macro accuracy" in row and "100.0 [100.0, 100.0]" in row for row in rows)
    assert "(100.0 %), counted as wrong: not_a_box" in table


@pytest.mark.parametrize(
    ("metric", "title"),
    [
        ("acc_at_0_5/size", "Acc@0.5, size"),
        ("r_at_10", "R@10"),
        ("macro_acc", "macro accuracy"),
        ("new_metric", "new_metric"),
    ],
)
def test_metric_titles(metric, title):
    assert metric_title(metric) == title


def test_average_precision_of_answers_with_a_confidence(bench):
    pytest.importorskip("pycocotools")
    rows = [replace(row, confidence=0.5) if row.boxes else row for row in perfect(bench)]
    metrics = compute_metrics(pairs_by_task(rows, bench.references), samples=20)
    num_boxes = sum(len(row.boxes) for row in bench.references if row.task == "text_to_box")
    entry = metrics["average_precision"]["text_to_box"]
    assert entry["n_boxes"] == num_boxes and entry["ap"] == entry["ap_50"] > 0.5
    assert f"answers by confidence, {num_boxes} true boxes" in render_table(metrics)
    rows = [replace(row, confidence=None) if i % 2 else row for i, row in enumerate(rows)]
    metrics = compute_metrics(pairs_by_task(rows, bench.references), samples=20)
    assert "have no confidence" in metrics["average_precision"]["rec"]["left_out"]
    assert "rec: no average precision: " in render_table(metrics)
    rows = [replace(row, confidence=None) for row in rows]
    metrics = compute_metrics(pairs_by_task(rows, bench.references), samples=20)
    assert metrics["average_precision"] == {}
