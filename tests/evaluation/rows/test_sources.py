"""Files of other tools: their columns, and references in the rows of the predictions."""

from __future__ import annotations

import json

import pytest

from cloc_mllm import cli
from cloc_mllm.evaluation.rows.files import read_table
from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow
from cloc_mllm.evaluation.rows.sources import RowReading, parse_columns, read_sources
from cloc_mllm.evaluation.score import ScoreOptions, score

BOX = (0.2, 0.2, 0.5, 0.75)
ANSWER = "[200, 200, 500, 750]"
PREDICTION = PredictionRow("7", "photo", "rec", raw_text=ANSWER)
REFERENCE = ReferenceRow("7", "photo", "rec", boxes=[BOX], width=640, height=480)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def references(tmp_path):
    row = {"id": 7, "image_id": "photo", "boxes": BOX, "width": "640", "height": 480.0}
    return write(tmp_path / "r.jsonl", row)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", f'question_id,pred,latency\n7.0,"{ANSWER}",3\n'),
        ("P.CSV", f'\ufeffquestion_id,pred\r\n7,"{ANSWER}"\r\n'),
        ("p.csv", f"question_id;pred\n7;{ANSWER}\n"),
        ("p.Tsv", f"question_id\tpred\n7\t{ANSWER}\n"),
        ("p.json", json.dumps([{"question_id": 7, "pred": [ANSWER]}])),
        ("p.json", json.dumps({"question_id": 7.0, "pred": ANSWER}) + "\n" * 2),
        ("p.jsonl", "\ufeff" + json.dumps([{"question_id": "7", "pred": ANSWER}])),
        ("p.txt", json.dumps({"question_id": "7", "pred": ANSWER})),
    ],
)
def test_rows_of_any_file_with_their_columns_named(tmp_path, references, name, text):
    if name == "p.json" and not text.startswith("["):
        text *= 2  # JSON lines, whatever the file is called
        text = text.replace("7.0", "8", 1)
        write(references, *[{**json.loads(references.read_text()), "id": i} for i in (8, 7)])
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    reading = RowReading({"id": "question_id", "raw_text": "pred"})
    rows = read_sources("rec", tmp_path / name, references, reading)
    assert rows.predictions[-1] == PREDICTION
    assert rows.references[-1] == REFERENCE


def test_columns_that_are_not_read_are_stated(tmp_path, references, capsys):
    row = {"qid": 7, "out": {"text": ANSWER, "tokens": 9}, "latency": 3, "image": "photo"}
    path = write(tmp_path / "p.jsonl", row)
    arguments = ["--predictions", str(path), "--references", str(references), "--format", "0-1000"]
    columns = ["--columns", "id=qid, raw_text=out.text"]
    assert cli.main(["eval", "score", "--task", "rec", *arguments, *columns]) == 0
    assert f"not read in {path}: the columns latency, image" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": "question_id"}, "p.jsonl line 1: no column 'question_id' for id; there are"),
        ({"answer": "pred"}, r"columns: expected some of \['box_frame', .*, got \['answer'\]"),
        ({}, "p.jsonl line 1: expected an object with id and any of .*--columns raw_text=COLUMN"),
    ],
)
def test_a_wrong_mapping_is_refused_in_one_line(tmp_path, references, columns, message):
    path = write(tmp_path / "p.jsonl", {"id": 7, "pred": ANSWER})
    with pytest.raises(ValueError, match=message):
        read_sources("rec", path, references, RowReading(columns))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("id=question_id, raw_text=doc.pred", {"id": "question_id", "raw_text": "doc.pred"}),
        ('{"id": "question id", "raw_text": "a,b=c"}', {"id": "question id", "raw_text": "a,b=c"}),
        ("raw_text=a=b", {"raw_text": "a=b"}),
    ],
)
def test_mappings_are_written_in_two_ways(text, expected):
    assert parse_columns(text) == expected


@pytest.mark.parametrize("text", ["id", "id=", "{", '{"id": 3}', '{"id": null}'])
def test_other_mappings_are_refused(text):
    with pytest.raises(ValueError, match=r"columns.*JSON"):
        parse_columns(text)


@pytest.mark.parametrize(
    ("row", "reading"),
    [
        ({"raw_text": ANSWER, "boxes": BOX}, RowReading()),
        ({"pred": ANSWER, "bbox": BOX}, RowReading({"raw_text": "pred", "boxes": "bbox"})),
        (
            {"boxes": BOX, "doc": {"truth": BOX}},
            RowReading({"boxes": "boxes"}, {"boxes": "doc.truth"}),
        ),
        (
            {"raw_text": ANSWER, "bbox": [128, 96, 192, 264], "width": 640, "height": 480},
            RowReading({"boxes": "bbox"}, {}, '{"order": "xywh", "scale": "pixels"}'),
        ),
        (
            {"raw_text": ANSWER, "bbox": [128, 96, 321, 360], "width": 640, "height": 480},
            RowReading({"boxes": "bbox"}, {}, "pixels"),
        ),
    ],
    ids=["own names", "columns", "boxes on both sides", "xywh in pixels", "pixels"],
)
def test_predictions_and_references_in_one_row(tmp_path, row, reading):
    row = {"image_id": "photo", **row}
    path = write(tmp_path / "rows.jsonl", row, {**row, "image_id": "other"})
    options = ScoreOptions(reading=reading, bootstrap_samples=2)
    for references in ("", path):
        scored = score("rec", path, references, "0-1000", options=options)
        assert scored.tasks["rec"].metrics["acc_at_0_9"].value == 1
        assert scored.tasks["rec"].metrics["acc_at_0_9"].n == 2
        assert not scored.about["unused_columns"]


def test_one_column_of_ids_names_both_files(tmp_path):
    answers = write(tmp_path / "p.jsonl", {"qid": 7, "pred": ANSWER})
    truth = {"qid": "7", "image_id": "photo", "pred": "dropped", "boxes": [BOX]}
    rows = read_sources(
        "rec",
        answers,
        write(tmp_path / "r.jsonl", truth),
        RowReading({"id": "qid", "raw_text": "pred"}),
    )
    assert (rows.predictions[0].id, rows.references[0].id) == ("7", "7")
    assert rows.unused_columns == {str(tmp_path / "r.jsonl"): ["pred"]}


@pytest.mark.parametrize(
    ("row", "frame", "message"),
    [
        ({"boxes": [128, 96, 192, 264]}, "pixels", "boxes in pixels need a width and a height"),
        ({"boxes": [0, 0, 700, 480], "width": 640, "height": 480}, "pixels", "within its image"),
        ({"boxes": [128, 96, 320, 360]}, "", "four numbers 0..1 .*--reference_format"),
        ({"boxes": [0.5, 0.5, 0.2, 0.8]}, "", "x1 < x2 and y1 < y2, got .* inverted or empty"),
        ({"boxes": [0.5, 0.5, 0.5, 0.8]}, "", "inverted or empty"),
    ],
)
def test_a_wrong_reference_is_refused_with_its_row(tmp_path, row, frame, message):
    answers = write(tmp_path / "p.jsonl", {"id": 7, "raw_text": ANSWER})
    truth = write(tmp_path / "r.jsonl", {"id": 7, "image_id": "photo", **row})
    with pytest.raises(ValueError, match=rf"r\.jsonl line 1: .*{message}"):
        read_sources("rec", answers, truth, RowReading(reference_format=frame))


def test_another_encoding_is_named_or_read(tmp_path, references):
    path = tmp_path / "p.csv"
    path.write_bytes(f'id,raw_text\n7,"caf\u00e9 {ANSWER}"\n'.encode("cp1252"))
    with pytest.raises(ValueError, match=r"p\.csv, line 2.*--encoding"):
        read_sources("rec", path, references)
    rows = read_sources("rec", path, references, RowReading(encoding="cp1252"))
    assert rows.predictions[0].raw_text == f"café {ANSWER}"


def test_a_cell_of_any_length_and_two_columns_of_one_name(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(f"id,raw_text\n7,{'x' * 200_000}\n")
    assert len(read_table(path)[0][1]["raw_text"]) == 200_000
    path.write_text("id,raw_text,raw_text\n7,a,b\n")
    with pytest.raises(ValueError, match=r"p\.csv: two columns have the name 'raw_text'"):
        read_table(path)


def test_the_files_are_named_where_ids_do_not_meet(tmp_path, references):
    path = write(tmp_path / "p.jsonl", {"id": 8, "raw_text": ANSWER})
    with pytest.raises(ValueError, match=r"p\.jsonl and .*r\.jsonl: 1 ids .*'7'; .* is '8'"):
        score("rec", path, references, "0-1000")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        score("rec", tmp_path / "none.jsonl", references, "0-1000")


def test_negative_zero_is_zero(tmp_path, references):
    path = write(tmp_path / "p.jsonl", {"id": 7, "boxes": [-0.0, -1e-9, 0.5, 1.0000001]})
    rows = read_sources("rec", path, references)
    assert str(rows.predictions[0].boxes) == "[(0.0, 0.0, 0.5, 1.0)]"


@pytest.mark.parametrize("boxes", [[128, 96, 320, 360], [[128.0, 96, 320, 360]]])
def test_boxes_in_another_frame_are_read_as_answers(tmp_path, references, boxes):
    path = write(tmp_path / "p.jsonl", {"id": 7, "boxes": boxes})
    with pytest.raises(ValueError, match=r"p\.jsonl line 1: .*--columns raw_text=boxes --format"):
        read_sources("rec", path, references)
    options = ScoreOptions(reading=RowReading({"raw_text": "boxes"}), bootstrap_samples=2)
    scored = score("rec", path, references, "pixels", options=options)
    assert scored.tasks["rec"].metrics["acc_at_0_9"].value == 1


def test_rows_of_a_program_beside_a_file(tmp_path):
    truth = write(tmp_path / "r.jsonl", {"qid": 7, "image_id": "photo", "boxes": [20, 20, 50, 75]})
    reading = RowReading(reference_columns={"id": "qid"}, reference_format='{"scale": 100}')
    options = ScoreOptions(reading=reading, bootstrap_samples=2)
    scored = score("rec", [PREDICTION], truth, "0-1000", options=options)
    assert scored.tasks["rec"].metrics["acc_at_0_9"].value == 1
    answers = write(tmp_path / "p.jsonl", {"qid": 7, "raw_text": ANSWER})
    options = ScoreOptions(reading=RowReading({"id": "qid"}), bootstrap_samples=2)
    scored = score("rec", answers, [REFERENCE], "0-1000", options=options)
    assert scored.tasks["rec"].metrics["acc_at_0_9"].value == 1
    with pytest.raises(ValueError, match="rows of a program: give their references"):
        score("rec", [PREDICTION], answer_format_name="0-1000")


def test_rows_of_other_tasks_are_not_read(tmp_path, references):
    other = {"id": 7, "task": "pope", "confidence": "high"}
    path = write(tmp_path / "p.jsonl", other, {"id": 7, "task": "rec", "raw_text": ANSWER})
    assert read_sources("rec", path, references).predictions == [PREDICTION]
