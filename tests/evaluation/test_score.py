"""The command and the function `score`, from files to numbers."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import numpy as np
import pytest

from cloc_mllm import cli
from cloc_mllm.evaluation.answers import answer_format
from cloc_mllm.evaluation.compat import COMPATS
from cloc_mllm.evaluation.rows.files import write_rows
from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow
from cloc_mllm.evaluation.rows.sources import RowReading
from cloc_mllm.evaluation.score import ScoreOptions, main, render_score, score
from cloc_mllm.evaluation.tasks import all_scorers

BOX = (0.2, 0.2, 0.5, 0.75)
TEXTS = {
    "right": "[200, 200, 500, 750]",
    "wrong": "[0, 0, 100, 100]",
    "in words": "it is at (200, 200, 500, 750)",
    "several": "[200, 200, 500, 750], [0, 0, 100, 100]",
    "none": "there is no crab",
}


def references(names=tuple(TEXTS)):
    return [
        ReferenceRow(name, f"i{i % 3}", "rec", boxes=[BOX], width=640, height=480)
        for i, name in enumerate(names)
    ]


def predictions(names=tuple(TEXTS), **values):
    return [
        PredictionRow(name, f"i{i % 3}", "rec", raw_text=TEXTS[name], **values)
        for i, name in enumerate(names)
    ]


def accuracy(metrics):
    return metrics.tasks["rec"].metrics["acc_at_0_5"].value


def test_strict_and_lenient_columns_with_their_rates():
    metrics = score("rec", predictions(), references(), "0-1000")
    assert accuracy(metrics) == pytest.approx(2 / 5)
    assert accuracy(metrics.lenient) == pytest.approx(3 / 5)
    assert metrics.tasks["rec"].failures.reasons == {"not_a_box": 2}
    answers = metrics.answers
    assert answers["num_read"] == 5 and answers["format"] == "0-1000"
    strict, lenient = answers["strict"], answers["lenient"]
    assert (strict["parse_failure_rate"], strict["multi_box_rate"]) == (0.4, 0.2)
    assert (lenient["parse_failure_rate"], lenient["multi_box_rate"]) == (0.2, 0.2)
    assert metrics.tasks["rec"].metrics["acc_at_0_5"].n == 5


def test_rows_with_boxes_need_no_format_and_keep_their_boxes():
    rows = [PredictionRow("right", "i0", "rec", raw_text="[0, 0, 1, 1]", boxes=[BOX])]
    for declared in ("", "0-1000"):
        metrics = score("rec", rows, references(["right"]), declared)
        assert accuracy(metrics) == 1 and metrics.answers is None


def test_a_row_that_says_it_failed_stays_wrong_strictly():
    rows = predictions(["right"], failure="too_long")
    assert accuracy(score("rec", rows, references(["right"]))) == 0
    metrics = score("rec", rows, references(["right"]), "0-1000")
    assert (accuracy(metrics), accuracy(metrics.lenient)) == (0, 1)
    assert metrics.tasks["rec"].failures.reasons == {"too_long": 1}


def test_missing_predictions_are_an_error_or_wrong():
    rows = predictions(["right", "several"])
    with pytest.raises(ValueError, match="2 ids have a reference but no prediction: 'in words', '"):
        score("rec", rows, references(["right", "several", "in words", "none"]), "0-1000")
    options = ScoreOptions(missing="wrong")
    names = ["right", "several", "in words", "none"]
    metrics = score("rec", rows, references(names), "0-1000", ["internvl"], options)
    assert accuracy(metrics) == accuracy(metrics.lenient) == 0.5
    assert metrics.tasks["rec"].failures.reasons == {"missing": 2}
    assert metrics.compat["internvl"]["metrics"]["Precision @ 1"] == 0.5
    assert metrics.about["num_missing_predictions"] == 2


def test_all_other_scorers_read_the_same_file():
    metrics = score("rec", predictions(), references(), "0-1000", list(COMPATS))
    values = {name: result["metrics"] for name, result in metrics.compat.items()}
    assert values["lmms-eval"]["ACC@0.5"] == 0
    assert values["lmms-eval-grounding"]["ACC@0.5"] == 0.6
    assert values["vlmevalkit"]["Precision@1"] == 0.6
    assert values["internvl"]["Precision @ 1"] == 0.4
    assert values["ferret"]["Precision @ 1"] == 0.4


@pytest.mark.parametrize(
    ("settings", "options", "expected"),
    [
        ({"resized_width": 320, "resized_height": 240}, None, 1),
        ({}, ScoreOptions(resized_size=(320, 240)), 1),
        ({}, ScoreOptions(resized_size="qwen2.5-vl"), 0),  # it saw 644 x 476, so this is too small
    ],
    ids=["settings", "flag", "rule"],
)
def test_resized_pixels_count_in_the_size_the_model_saw(settings, options, expected):
    text = '{"bbox_2d": [64, 48, 160, 180]}'
    rows = [PredictionRow("q", "i", "rec", raw_text=text, settings=settings)]
    truth = [ReferenceRow("q", "i", "rec", boxes=[BOX], width=640, height=480)]
    assert accuracy(score("rec", rows, truth, "qwen2.5-vl", options=options)) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("grounding", "0-1000"), "unknown task 'grounding'; expected one of: .*rec"),
        (("rec", "0-100"), "unknown format '0-100'.*expected one of: 0-1,"),
        (("rec", ""), "5 predictions have a raw_text and no boxes, the first is 'right': declare"),
        (("rec", "resized-pixels"), "format resized-pixels needs the size the model saw.*'right'"),
        (("rec", "0-1", ["lmms"]), r"unknown compat \['lmms'\]; expected some of: lmms-eval,"),
        (("referring", "0-1"), "answers of task 'referring' are not boxes"),
        (("text_to_box", "0-1"), "hold no row of task 'text_to_box'"),
    ],
)
def test_wrong_use_is_refused(tmp_path, arguments, message):
    task, *rest = arguments
    if task != "text_to_box":
        with pytest.raises(ValueError, match=message):
            score(task, predictions(), references(), *rest)
        return
    write_rows(references(), tmp_path / "r.jsonl")
    with pytest.raises(ValueError, match=message):
        score(task, predictions(), tmp_path / "r.jsonl", *rest)


def test_unknown_image_size_and_wrong_settings_name_the_row():
    truth = [ReferenceRow("q5", "i", "rec", boxes=[BOX])]
    rows = [PredictionRow("q5", "i", "rec", raw_text="[1, 2, 3, 4]")]
    with pytest.raises(ValueError, match=r"format pixels needs width and height.*missing for 'q5'"):
        score("rec", rows, truth, "pixels")
    settings = {"resized_width": "wide", "resized_height": 3}
    rows = [PredictionRow("q5", "i", "rec", raw_text="[1, 2, 3, 4]", settings=settings)]
    with pytest.raises(ValueError, match=r"prediction 'q5': expected resized_width .* got 'wide'"):
        score("rec", rows, truth, "resized-pixels")


def test_other_tasks_are_scored_too():
    rows = [PredictionRow("q", "i", "referring", raw_text="a red crab")]
    truth = [ReferenceRow("q", "i", "referring", labels=["red crab"])]
    metrics = score("referring", rows, truth)
    assert metrics.tasks["referring"].metrics["exact_match"].value == 1


def files(tmp_path):
    write_rows(predictions(), tmp_path / "p.jsonl")
    write_rows(references(), tmp_path / "r.jsonl")
    paths = ["--predictions", str(tmp_path / "p.jsonl"), "--references", str(tmp_path / "r.jsonl")]
    return ["eval", "score", "--task", "rec", *paths]


def test_command(tmp_path, capsys):
    out = tmp_path / "new" / "metrics.json"
    arguments = ["--format", "0-1000", "--compat", "all", "--out", str(out)]
    assert cli.main([*files(tmp_path), *arguments]) == 0
    assert json.loads(out.read_text()) == json.loads(
        json.dumps(score("rec", predictions(), references(), "0-1000", list(COMPATS)).to_dict())
    )
    printed = capsys.readouterr().out
    for text in (
        "strict reading, format 0-1000",
        "lenient reading, same frame",
        "strict: 40.0 % of answers without a readable box, 20.0 % with several",
        "as internvl scores these 5 answers: Precision @ 1 40.0",
        f"written: {out}",
    ):
        assert text in printed


@pytest.mark.parametrize(("form", "is_doubted"), [("0-1", True), ("0-1000", False)])
def test_numbers_beyond_the_format_doubt_it(form, is_doubted, tmp_path, capsys):
    reference = {"id": "1", "image_id": "a", "task": "rec", "boxes": [[0.1, 0.3, 0.4, 0.7]]}
    answer = {"id": "1", "raw_text": "[100, 300, 400, 700]"}
    for name, row in (("p.jsonl", answer), ("r.jsonl", reference)):
        (tmp_path / name).write_text(json.dumps(row))
    paths = ["--predictions", tmp_path / "p.jsonl", "--references", tmp_path / "r.jsonl"]
    assert cli.main(["eval", "score", "--task", "rec", "--format", form, *map(str, paths)]) == 0
    said = "many numbers lie beyond 0-1: is that their --format?"
    assert (said in capsys.readouterr().out) == is_doubted


def test_command_says_what_is_wrong_in_one_line(tmp_path, capsys):
    assert cli.main(files(tmp_path)) == 2
    assert "declare how the model writes boxes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*files(tmp_path)[2:], "--resized_size", "huge"])
    assert "expected WIDTHxHEIGHT or qwen2.5-vl, got 'huge'" in capsys.readouterr().err


def test_format_help_lists_the_formats(capsys):
    assert cli.main(["eval", "score", "--format", "help"]) == 0
    assert "paligemma\n    1024 bins a side, y first" in capsys.readouterr().out


def test_scoring_loads_no_torch(tmp_path, project_root):
    code = (
        "import sys\nfrom cloc_mllm import cli\n"
        f"cli.main({[*files(tmp_path), '--format', '0-1000', '--compat', 'all']!r})\n"
        "print(sorted({'torch', 'transformers', 'pandas', 'PIL'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=project_root, capture_output=True, text=True, check=True
    )
    assert result.stdout.endswith("\n[]\n")


def test_ten_thousand_rows_have_every_id_in_the_denominator():
    rng = np.random.default_rng(0)
    corners = np.sort(rng.integers(0, 1000, (10_000, 2, 2)), axis=1).reshape(-1, 4)
    corners[:, 2:] += 1
    texts = [str(row) if i % 10 else "nothing" for i, row in enumerate(corners.tolist())]
    truth = [
        ReferenceRow(str(i), str(i // 8), "rec", boxes=[tuple(row / 1000)])
        for i, row in enumerate(corners)
    ]
    rows = [
        PredictionRow(str(i), str(i // 8), "rec", raw_text=text) for i, text in enumerate(texts)
    ]
    options = ScoreOptions(bootstrap_samples=20)
    metrics = score("rec", rows, truth, "0-1000", ["lmms-eval"], options)
    entry = metrics.tasks["rec"].metrics["acc_at_0_9"]
    assert entry.value == pytest.approx(0.9) and entry.n == 10_000
    assert metrics.compat["lmms-eval"]["n"] == 10_000


@pytest.mark.parametrize(
    "declared",
    [
        "0-1", "0-1000", "pixels", "qwen3-vl", "gemini", "internvl", "qwen2-vl",
        '{"order": "cxcywh", "scale": 1}', '{"order": "xywh", "scale": "pixels", "key": "box"}',
    ],
)  # fmt: skip
def test_a_table_of_another_tool_scores_as_pycocotools_does(tmp_path, declared):
    """COCO's boxes as truth, answers in the model's own format, in one CSV file."""
    from pycocotools import mask

    rng = np.random.default_rng(1)
    corners = np.sort(rng.integers(0, 250, (200, 2, 2, 2)), axis=2) * 4  # exact in each format
    corners[:, :, 1] += 4
    corners = np.minimum(corners, 1000)
    (x1, y1), (x2, y2) = np.moveaxis(corners, (2, 3), (0, 1))
    corners[:, 1] = np.where(rng.random((200, 1, 1)) < 0.5, corners[:, 0], corners[:, 1])
    xywh = np.stack([x1, y1, x2 - x1, y2 - y1], axis=-1)
    truth, answer = xywh[:, 0], xywh[:, 1]
    expected = [mask.iou(a[None], t[None], [0])[0, 0] for a, t in zip(answer, truth, strict=True)]
    written = answer_format(declared)
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "prediction", "bbox", "w", "h"])
        for (a, b, c, d), box in zip(answer.tolist(), truth.tolist(), strict=True):
            share = [a / 1000, b / 1000, (a + c) / 1000, (b + d) / 1000]
            writer.writerow(["photo", written.write(share, (1000, 1000)), box, 1000, 1000])
    columns = {"image_id": "image", "raw_text": "prediction", "boxes": "bbox"}
    columns |= {"width": "w", "height": "h"}
    frame = '{"order": "xywh", "scale": "pixels"}'
    options = ScoreOptions(reading=RowReading(columns, reference_format=frame))
    scored = score("rec", tmp_path / "rows.csv", answer_format_name=declared, options=options)
    metrics = scored.tasks["rec"].metrics
    assert metrics["mean_iou"].value == pytest.approx(np.mean(expected), abs=1e-9)
    assert metrics["acc_at_0_5"].value == np.mean(np.array(expected) >= 0.5)
    assert scored.tasks["rec"].failures.count == 0


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("rec", {"labels": ["crab"]}, "reference 'q': task 'rec' needs boxes, this row has none"),
        ("text_to_box", {"labels": ["crab"]}, "task 'text_to_box' needs boxes"),
        ("pope", {"boxes": [BOX]}, "task 'pope' needs labels"),
        ("ref_lvis", {"boxes": [BOX]}, "task 'ref_lvis' needs labels and choices"),
        ("rejection", {"labels": ["present"]}, "expected the label 'absent', or 'present' with"),
    ],
)
def test_a_reference_without_what_its_task_needs_is_named(task, row, message):
    truth = [ReferenceRow("q", "i", task, **row)]
    with pytest.raises(ValueError, match=message):
        score(task, [PredictionRow("q", "i", task, raw_text="no")], truth)


ODD = [None, "", [], "crab", ["yes"], ["a", "b"], 5, [""], {"a": 1}, [[0.1, 0.1, 0.5, 0.5]], -1]
ANSWER = {"raw_text": "yes", "labels": ["yes"], "boxes": [BOX], "confidence": 1, "failure": None}
TRUTH = {"image_id": "i", "labels": ["yes"], "boxes": [BOX], "choices": ["yes"], "kind": "k"}
TRUTH |= {"num_candidates": 2, "width": 640}


@pytest.mark.parametrize("task", all_scorers())
def test_no_task_stumbles_over_the_rows_it_takes(task, tmp_path):
    """Three rows, of which each has one odd field, are scored or refused with the file."""
    rng = np.random.default_rng(0)
    declared = "0-1" if all_scorers()[task].one_box else ""
    paths = tmp_path / "p.json", tmp_path / "r.json"
    for _ in range(60):
        for path, good in zip(paths, (ANSWER, TRUTH), strict=True):
            rows = [
                {**good, "id": i, str(rng.choice(list(good))): ODD[rng.integers(len(ODD))]}
                for i in range(3)
            ]
            path.write_text(json.dumps(rows))
        try:
            scored = score(task, *paths, declared, options=ScoreOptions(bootstrap_samples=2))
            assert render_score(scored)
        except ValueError as error:
            assert "p.json" in str(error) or "r.json" in str(error)
