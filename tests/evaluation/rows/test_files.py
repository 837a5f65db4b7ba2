from __future__ import annotations

import csv
import json

import pytest

from cloc_mllm.evaluation.rows.files import read_predictions, read_references
from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow

BOX = [0.1, 0.2, 0.3, 0.4]
REFERENCES = [
    {"id": "a", "image_id": "1", "boxes": [BOX], "width": 640, "height": 480},
    {"id": 7, "image_id": 2, "boxes": [BOX, BOX], "kind": "size"},
]
PREDICTIONS = [
    {"id": "a", "raw_text": 'two\nlines, and a "quote"', "settings": {"resized_width": 3}},
    {"id": 7, "raw_text": "", "confidence": 0.5},
]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        names = sorted({name for row in rows for name in row})
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            for row in rows:
                cells = (row.get(name, "") for name in names)
                writer.writerow([c if isinstance(c, str) else json.dumps(c) for c in cells])
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_the_same_rows_from_every_kind_of_file(tmp_path, suffix):
    references = read_references(write(tmp_path / f"r.{suffix}", REFERENCES), "rec")
    assert references == [
        ReferenceRow("a", "1", "rec", boxes=[BOX], width=640, height=480),
        ReferenceRow("7", "2", "rec", boxes=[BOX, BOX], kind="size"),
    ]
    path = write(tmp_path / f"p.{suffix}", PREDICTIONS)
    assert read_predictions(path, "rec", references) == [
        PredictionRow(
            "a", "1", "rec", raw_text=PREDICTIONS[0]["raw_text"], settings={"resized_width": 3}
        ),
        PredictionRow("7", "2", "rec", confidence=0.5),
    ]


def test_the_rows_of_a_log_stand_in_an_object(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"accuracy": 1, "n": [], "results": PREDICTIONS}))
    assert [row.id for row in read_predictions(tmp_path / "p.json", "rec")] == ["a", "7"]


def test_rows_of_other_tasks_are_left_to_other_runs(tmp_path):
    rows = [{**REFERENCES[0], "task": "rec"}, {**REFERENCES[1], "task": "text_to_box"}]
    path = write(tmp_path / "r.jsonl", rows)
    assert [row.id for row in read_references(path, "text_to_box")] == ["7"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"id": "a"}\nnope', "p.jsonl line 2: expected one JSON object per line"),
        ("p.jsonl", "[1]", r"p.jsonl line 1: expected an object, got '\[1\]'"),
        ("p.json", '{"id": "a"}', r"p.json: expected a JSON array of rows .* got \['id'\]"),
        ("p.json", '{"a": [{}], "b": [{}]}', r"or one in an object, got \['a', 'b'\]"),
        ("p.json", "[", "p.json: expected a JSON array"),
        ("p.json", "[3]", "p.json row 1: expected an object"),
        ("p.csv", "id,boxes\na,[[0.1]", "p.csv line 2: expected JSON in the column boxes"),
        ("p.csv", "id,raw_text\na", "p.csv line 2: expected one cell for each of id, raw_text"),
        ("p.csv", "id,raw_text\na,b,c", "p.csv line 2: expected one cell for each"),
        ("p.jsonl", '{"id": "a", "bbox": [1]}', "p.jsonl line 1: expected .*any of .*'boxes'"),
        ("p.jsonl", '{"raw_text": "x"}', "p.jsonl line 1: expected an object with id"),
        ("p.jsonl", '{"id": "a", "boxes": [[1, 2, 30, 40]]}', "line 1: prediction 'a': expected"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_file_and_row(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_predictions(path, "rec", [])


def test_an_unknown_id_is_left_to_the_merge(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"id": "x", "raw_text": "a"}])
    assert read_predictions(path, "rec", []) == [PredictionRow("x", "", "rec", raw_text="a")]
