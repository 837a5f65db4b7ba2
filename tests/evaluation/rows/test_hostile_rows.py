"""No file makes scoring raise anything but one line that names the file."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cloc_mllm.evaluation.compat import COMPATS
from cloc_mllm.evaluation.rows.sources import RowReading
from cloc_mllm.evaluation.score import ScoreOptions, render_score, score

NUMBERS = st.one_of(
    st.integers(-3, 1200),
    st.floats(),
    st.sampled_from([0.2, 0.5, "0.2", "٣", "２０", "nan", 10**400, -0.0, 1e308, "1e400"]),
)
BOXES = st.one_of(
    st.lists(NUMBERS, max_size=5),
    st.lists(st.lists(NUMBERS, min_size=4, max_size=4), max_size=3),
    st.sampled_from([[0.2, 0.2, 0.5, 0.75], [[0.2, 0.2, 0.5, 0.75]], "0.2 0.2 0.5 0.75"]),
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["[200, 200, 500, 750]", "[0.2, 0.2, 0.5, 0.75]", "\ud800", "a\x00b", "\r"]),
    NUMBERS,
    st.none(),
    st.booleans(),
    st.lists(st.text(max_size=4), max_size=2),
    st.dictionaries(st.text(max_size=3), NUMBERS, max_size=2),
)
IDS = st.one_of(st.sampled_from(["1", 1, 1.0, "1.0", " 1", "b", "b "]), TEXTS)
ANY = st.one_of(TEXTS, NUMBERS, BOXES)
TASKS = st.sampled_from(["rec", "text_to_box"]) | ANY
FRAMES = st.just("normalized") | ANY
PREDICTION = {
    "id": IDS, "raw_text": TEXTS, "boxes": BOXES, "image_id": IDS, "confidence": ANY, "task": TASKS,
    "labels": ANY, "scores": ANY, "settings": ANY, "failure": ANY, "box_frame": FRAMES,
    "model": ANY, "prompt": ANY, "more": ANY,
}  # fmt: skip
REFERENCE = {
    "id": IDS, "image_id": IDS, "boxes": BOXES, "width": NUMBERS, "height": NUMBERS, "labels": ANY,
    "kind": ANY, "choices": ANY, "num_candidates": ANY, "num_distractors": ANY, "task": TASKS,
}  # fmt: skip
GOOD = {"id": 1, "image_id": "i", "boxes": [0.2, 0.2, 0.5, 0.75], "width": 640, "height": 480}
ANSWER = {"id": 1, "raw_text": "[200, 200, 500, 750]"}


def spoilt(good, fields):
    """A good row of which some fields hold anything."""
    odd = st.one_of([st.tuples(st.just(name), values) for name, values in fields.items()])
    ids = st.sampled_from([1, "1", 2, "b"])
    return st.builds(
        lambda row_id, odd: {**good, "id": row_id, **dict(odd)}, ids, st.lists(odd, max_size=2)
    )


PREDICTIONS, REFERENCES = spoilt(ANSWER, PREDICTION), spoilt(GOOD, REFERENCE)


def as_json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_csv(rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        cells = [row.get(name, "") for name in names]
        writer.writerow([c if isinstance(c, str) else json.dumps(c) for c in cells])
    return text.getvalue()


WRITERS = {
    "jsonl": as_json_lines,
    "json": json.dumps,
    "CSV": as_csv,
    "tsv": lambda rows: as_csv(rows).replace(",", "\t"),
}


def score_or_refuse(task, predictions, references, declared, options=None):
    """Scores; a refusal is one line that names a file."""
    try:
        scored = score(task, predictions, references, declared, list(COMPATS), options)
    except ValueError as error:
        assert type(error) is ValueError
        named = str(predictions) in str(error) or str(references) in str(error)
        assert named and "\n" not in str(error)
        return None
    assert render_score(scored)
    json.dumps(scored.to_dict())
    value = scored.tasks[task].metrics["acc_at_0_5"].value
    assert not math.isnan(value)
    return value


@pytest.mark.parametrize("suffix", WRITERS)
@given(
    predictions=st.lists(PREDICTIONS, max_size=2),
    references=st.lists(REFERENCES, min_size=1, max_size=2),
    declared=st.sampled_from(["0-1000", "pixels", "qwen2.5-vl"]),
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(
    predictions=[{"id": 1, "raw_text": {"bbox_2d": [200, 200, 500, 750]}}],
    references=[GOOD],
    declared="0-1000",
)
@example(
    predictions=[{"id": "1", "raw_text": "[1, 2, 3, 4]"}],
    references=[{**GOOD, "width": 10**400}],
    declared="qwen2.5-vl",
)
def test_no_rows_make_scoring_raise_but_one_line(
    suffix, predictions, references, declared, tmp_path
):
    paths = tmp_path / f"p.{suffix}", tmp_path / f"r.{suffix}"
    for path, rows in zip(paths, (predictions, references), strict=True):
        path.write_text(WRITERS[suffix](rows), encoding="utf-8", errors="surrogatepass")
    options = ScoreOptions("qwen2.5-vl", missing="wrong", bootstrap_samples=2)
    score_or_refuse("rec", *paths, declared, options)


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.tsv"])
@given(
    content=st.one_of(
        st.binary(max_size=60),
        st.text(alphabet='{}[]",:;\n\r\t 1aid\x00\ufeff', max_size=60).map(str.encode),
        st.sampled_from([b"[" * 100_000, b'{"id": 1' + b"0" * 5000 + b"}", b"", b"\xff\xfe"]),
    )
)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_make_scoring_raise_but_one_line(name, content, tmp_path):
    path, references = tmp_path / name, tmp_path / "r.jsonl"
    references.write_text(json.dumps(GOOD))
    path.write_bytes(content)
    options = ScoreOptions(missing="wrong", bootstrap_samples=2)
    score_or_refuse("rec", path, references, "0-1000", options)


@given(
    rows=st.lists(spoilt({**GOOD, **ANSWER}, {**PREDICTION, **REFERENCE}), max_size=3),
    columns=st.dictionaries(
        st.sampled_from(["id", "raw_text", "boxes", "width"]),
        st.sampled_from(["id", "raw_text", "boxes", "more", "settings.a", "labels.0", "no"]),
    ),
    frame=st.sampled_from(["", "pixels", '{"order": "cxcywh", "scale": 1}']),
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_mapping_makes_scoring_raise_but_one_line(rows, columns, frame, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(as_json_lines(rows))
    options = ScoreOptions(reading=RowReading(columns, reference_format=frame), bootstrap_samples=2)
    score_or_refuse("rec", path, "", "0-1000", options)
