"""Two finished evaluations side by side."""

import json
import re
from dataclasses import replace

import pytest

from cloc_mllm.evaluation.compare import _config, _image_loader, compare, main
from cloc_mllm.evaluation.rows.files import write_rows
from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow
from cloc_mllm.evaluation.stats.bootstrap import Bootstrap
from cloc_mllm.evaluation.tasks.rejection import phrases_of_scenes

TRUE, WRONG = (0.1, 0.1, 0.5, 0.5), (0.6, 0.6, 0.9, 0.9)
EVIL = '<script>alert("1")</script>'
REFERENCES = [
    ReferenceRow(f"q{i}", f"i{i // 2}", "rec", boxes=[TRUE], labels=[EVIL], kind="ab"[i % 2])
    for i in range(40)
]


def rows(num_right, model):
    """Answers of which the first `num_right` are right."""
    return [
        PredictionRow(
            *(ref.id, ref.image_id, "rec", EVIL, EVIL),
            boxes=[TRUE if i < num_right else WRONG],
            model=model,
        )
        for i, ref in enumerate(REFERENCES)
    ]


def write(directory, predictions, references=REFERENCES):
    directory.mkdir()
    write_rows(predictions, directory / "predictions.jsonl")
    write_rows(references, directory / "references.jsonl")
    return str(directory)


@pytest.fixture
def directories(tmp_path):
    # rows of B in another order: they are merged by id
    b = write(tmp_path / "b", rows(16, "small"), REFERENCES[::-1])
    return write(tmp_path / "a", rows(30, "large")), b


def test_the_paired_difference_has_a_p_value(directories, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*directories, "--out", str(out), "--bootstrap_samples", "100"]) == 0
    comparison = json.loads((out / "metrics.json").read_text())
    entry = comparison["tasks"]["rec"]["acc_at_0_5"]
    assert (entry["a"]["value"], entry["b"]["value"]) == (30 / 40, 16 / 40)
    difference = entry["difference"]
    assert difference["value"] == pytest.approx(14 / 40)
    assert (difference["wins"], difference["losses"]) == (14, 0)
    # seven images of one sign: 2 / 2^7 by the exact test; 14 queries would give 2 / 2^14
    assert difference["p_value"] == pytest.approx(2 / 2**7, abs=0.004)
    assert difference["mcnemar_p"] == pytest.approx(2 / 2**14)
    assert list(comparison["breakdowns"]["rec"]["kind"]) == ["a", "b"]
    assert comparison["names"] == [["large"], ["small"]]
    table = (out / "table.md").read_text()
    assert "| **75.0 [" in table and "| +35.0 [" in table
    assert table in capsys.readouterr().out


def test_the_report_shows_where_answers_differ_without_pictures(directories, tmp_path):
    compare(directories, str(tmp_path / "out"), bootstrap=Bootstrap(20), num_examples=3)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page
    assert page.count("<figure") == page.count("picture not available") == 3
    assert "A is better" in page and "B is better" not in page
    assert "26 of 40 answers score the same." in page
    assert page.count("data:image/svg+xml") == 1  # accuracy at each IoU threshold
    for tag in ("section", "figure", "table", "tr", "td", "dl", "dd", "div", "svg", "g", "b"):
        assert len(re.findall(rf"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda refs: refs[1:], "rec: 1 queries are in only one of .*e.g. 'q0'"),
        (
            lambda refs: [replace(refs[0], boxes=[WRONG]), *refs[1:]],
            "query 'q0' has another image, box or label",
        ),
        (lambda refs: [replace(r, task="referring") for r in refs], "none in common"),
    ],
    ids=["missing", "other truth", "no common task"],
)
def test_other_queries_are_refused(directories, tmp_path, change, message):
    references = change(REFERENCES)
    known = {ref.id: ref.task for ref in references}
    answers = [replace(r, task=known[r.id]) for r in rows(5, "x") if r.id in known]
    other = write(tmp_path / "other", answers, references)
    with pytest.raises(ValueError, match=message):
        compare((directories[0], other), str(tmp_path / "out"))


def test_a_directory_without_rows_is_refused(directories, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"predictions.jsonl is missing; expected"):
        compare((directories[0], str(tmp_path)), str(tmp_path / "out"))


def test_a_task_that_only_one_has_is_named(directories, tmp_path):
    more = [ReferenceRow("r", "i0", "referring", labels=["crab"])]
    answers = [*rows(16, "x"), PredictionRow("r", "i0", "referring", raw_text="crab")]
    b = write(tmp_path / "c", answers, [*REFERENCES, *more])
    comparison = compare((directories[0], b), str(tmp_path / "out"), bootstrap=Bootstrap(20))
    assert comparison.only_in == [[], ["referring"]]
    assert list(comparison.tasks) == ["rec"]


def test_pictures_are_those_that_were_asked_about(directories, tmp_path):
    """Also for a task with images of its own."""
    scenes = phrases_of_scenes("mllm", 3)
    pictured = []
    for name, answer in (("c", TRUE), ("d", WRONG)):
        answers = [
            PredictionRow(row.id, row.image_id, row.task, boxes=[answer]) for row in scenes.queries
        ]
        pictured.append(write(tmp_path / name, answers, scenes.references))
    about = {"config": {"data": "", "limit": 0, "tasks": [{"rejection": {"num_scenes": 3}}]}}
    (tmp_path / "c" / "metrics.json").write_text(json.dumps({"about": about}))
    loader = _image_loader(_config(pictured[0]))
    record = scenes.records[0]
    assert loader("rejection", record.id).size == (record.width, record.height)
    assert loader("rejection", "gone") is None and loader("rec", record.id) is None
    assert _config(directories[0]) == {}
    assert _image_loader({})("rejection", record.id) is None


def test_tasks_of_ones_own_are_known_by_their_files(tmp_path):
    task = tmp_path / "naming.py"
    task.write_text(
        "from cloc_mllm.evaluation.tasks import Task, referring\n\n"
        "SCORERS = {'naming': referring.SCORERS['referring']}\n\n\n"
        "class Naming(Task):\n    def query_sets(self, data):\n        return []\n"
    )
    references = [ReferenceRow("q", "i", "naming", labels=["crab"])]
    about = {"config": {"data": "", "limit": 0, "tasks": [str(task)]}}
    runs = []
    for name, text in (("c", "crab"), ("d", "dog")):
        answers = [PredictionRow("q", "i", "naming", raw_text=text)]
        runs.append(write(tmp_path / name, answers, references))
        (tmp_path / name / "metrics.json").write_text(json.dumps({"about": about}))
    comparison = compare(
        tuple(runs), str(tmp_path / "out"), bootstrap=Bootstrap(20), num_examples=0
    )
    assert comparison.tasks["naming"]["exact_match"].difference.value == 1


ANSWERS = {TRUE: "[100, 100, 500, 500]", WRONG: "[600, 600, 900, 900]"}


def unread(num_right, model):
    return [
        replace(row, boxes=[], raw_text=ANSWERS[row.boxes[0]], settings={"resized_width": 9})
        for row in rows(num_right, model)
    ]


def accuracies(comparison):
    found = comparison.tasks["rec"]["acc_at_0_5"]
    return found.a.value, found.b.value


def test_answers_are_read_in_the_format_of_the_evaluation(directories, tmp_path):
    """An evaluation of another model keeps its raw answers, and the format it was declared with."""
    other = write(tmp_path / "c", unread(10, "other"))
    runs, out = (directories[0], other), str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"c: 40 predictions have a raw_text and no boxes"):
        compare(runs, out)
    declared = compare(runs, out, formats=("", "0-1000"), bootstrap=Bootstrap(20))
    config = {"config": {"format": "0-1000"}}
    (tmp_path / "c" / "metrics.json").write_text(json.dumps({"about": config}))
    assert accuracies(declared) == (30 / 40, 10 / 40)
    assert accuracies(compare(runs, out, bootstrap=Bootstrap(20))) == (30 / 40, 10 / 40)


def test_files_of_any_tool_are_compared(tmp_path, capsys):
    lines = ["qid,pred"]
    lines += [f'{row.id},"{row.raw_text}"' for row in unread(16, "")]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    table = [{"id": row.id, "raw_text": [row.raw_text]} for row in unread(30, "")][::-1]
    (tmp_path / "b.json").write_text(json.dumps(table))
    write_rows(REFERENCES, tmp_path / "r.jsonl")
    files = [str(tmp_path / "a.csv"), str(tmp_path / "b.json"), "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"a\.csv is a file of predictions: say .*--task rec"):
        main(files)
    options = ["--task", "rec", "--references", str(tmp_path / "r.jsonl"), "--format", "0-1000"]
    options += ["--format_b", '{"scale": "1000"}', "--columns_b", "id=id"]
    columns = ["--columns", "id=qid,raw_text=pred", "--bootstrap_samples", "20"]
    assert main([*files, *options, *columns]) == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["tasks"]["rec"]
    assert found["acc_at_0_5"]["a"]["value"] == 16 / 40
    assert found["acc_at_0_5"]["b"]["value"] == 30 / 40
    assert "a.csv" in capsys.readouterr().out
