import json

import pytest

from cloc_mllm.evaluation.rows.files import read_predictions, read_references, write_rows
from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow, merge_by_id

BOX = (0.1, 0.2, 0.3, 0.4)


def prediction(row_id="q1", **values):
    return PredictionRow(id=row_id, image_id="i1", task="rec", **values)


def reference(row_id="q1", **values):
    return ReferenceRow(id=row_id, image_id="i1", task="rec", **{"boxes": [BOX], **values})


def test_rows_survive_the_file(tmp_path):
    predictions = [
        prediction("q1", prompt="the crab", raw_text="<loc_1>é", boxes=[BOX], confidence=0.5),
        prediction("q2", failure="not_a_box", settings={"image_size": 128}, model="m"),
        prediction("q3", labels=["crab", "dog"], scores=[0.9, 0.1]),
    ]
    references = [reference("q1", kind="size"), reference("q2", labels=["a"], num_candidates=7)]
    assert write_rows(predictions, tmp_path / "p.jsonl") == 3
    write_rows(references, tmp_path / "r.jsonl")
    assert read_predictions(tmp_path / "p.jsonl") == predictions
    assert read_references(tmp_path / "r.jsonl") == references


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 2: expected one JSON object"),
        ("[1, 2]", "line 2: expected an object, got"),
        ('{"id": "q", "task": "rec"}', "line 2: expected an object with id"),
        ('{"id": "q", "image_id": "i", "task": "rec", "bbox": []}', "line 2: expected an object"),
        (
            '{"id": "q", "image_id": "i", "task": "rec", "box_frame": "pixels"}',
            "line 2: prediction 'q': expected box_frame 'normalized', got 'pixels'",
        ),
        (
            '{"id": "q", "image_id": "i", "task": "rec", "boxes": [[12, 30, 80, 90]]}',
            "line 2: prediction 'q': expected a box of four numbers 0..1",
        ),
        (
            '{"id": "q", "image_id": "i", "task": "rec", "boxes": [[0.1, NaN, 0.2, 0.3]]}',
            "four numbers 0..1",
        ),
        ('{"id": "q", "image_id": "i", "task": "rec", "boxes": [[0.1, 0.2]]}', "four numbers"),
        (
            '{"id": "q", "image_id": "i", "task": "rec", "labels": ["a"], "scores": [1, 2]}',
            "1 labels but 2 scores",
        ),
    ],
    ids=["json", "list", "missing", "unknown", "frame", "pixels", "nan", "short", "scores"],
)
def test_wrong_lines_are_refused_with_their_number(tmp_path, line, message):
    good = json.dumps({"id": "a", "image_id": "i", "task": "rec"})
    (tmp_path / "p.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        read_predictions(tmp_path / "p.jsonl")


def test_a_reference_needs_an_answer():
    with pytest.raises(ValueError, match="'q1' has neither a box nor a label"):
        reference(boxes=[])


def test_merge_follows_the_references():
    pairs = merge_by_id(
        [prediction("b"), prediction("a")], [reference("a"), reference("b", kind="size")]
    )
    assert [pair.prediction.id for pair in pairs] == ["a", "b"]
    assert [pair.reference.kind for pair in pairs] == ["", "size"]


@pytest.mark.parametrize(
    ("predicted", "expected", "message"),
    [
        (["a"], ["a", "b"], "1 ids have a reference but no prediction: 'b'"),
        (["a", "b"], ["a"], "1 ids have a prediction but no reference: 'b'"),
        (["a", "a"], ["a"], "1 ids are there more than once in the predictions.*'a'"),
        (["a"], ["a", "a"], "1 ids are there more than once in the references.*'a'"),
        ([], list("abcdefg"), "7 ids .*'a', 'b', 'c', 'd', 'e' and 2 more"),
    ],
    ids=["missing", "unknown", "twice", "reference twice", "many"],
)
def test_merge_names_wrong_ids(predicted, expected, message):
    with pytest.raises(ValueError, match=message):
        merge_by_id([prediction(i) for i in predicted], [reference(i) for i in expected])


def test_merge_refuses_rows_of_another_query():
    other = PredictionRow(id="q1", image_id="i2", task="rec")
    with pytest.raises(ValueError, match=r"another task or image_id.*'q1'"):
        merge_by_id([other], [reference("q1")])
