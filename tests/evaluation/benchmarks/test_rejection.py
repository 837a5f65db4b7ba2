from __future__ import annotations

from cloc_mllm.evaluation.benchmarks.rejection import (
    cloc_rejects,
    cloc_threshold,
    rejection_phrases,
    rejection_questions,
)

from cloc_mllm.inference.cloc_predictor import ClocPredictor


def test_half_of_the_phrases_are_absent_indeed() -> None:
    records, phrases = rejection_phrases(30)
    scenes = {record.id: record for record in records}
    for kind in ("concept", "expression"):
        of_kind = [phrase for phrase in phrases if phrase.kind == kind]
        assert sum(bool(phrase.boxes) for phrase in of_kind) == len(of_kind) / 2 > 10
    for phrase in phrases:
        regions = scenes[phrase.image_id].regions
        names = {region.category for region in regions}
        expressions = {text: region.box for region in regions for text in region.expressions}
        if phrase.kind == "concept":
            there = tuple(region.box for region in regions if region.category == phrase.text)
        else:
            there = (expressions[phrase.text],) if phrase.text in expressions else ()
            if not there:  # it starts with the name of a kind that is not here
                assert not any(phrase.text.split(" the ")[0].endswith(f" {name}") for name in names)
        assert phrase.boxes == there
    assert phrases == rejection_phrases(30)[1]
    assert phrases != rejection_phrases(30, seed=1)[1]
    question_set = rejection_questions(records, phrases)
    question_set.require_complete()
    labels = {row.id.rpartition("/")[2]: row.labels for row in question_set.references}
    assert labels == {"present": ["present"], "absent": ["absent"]}


def test_cloc_refuses_under_its_threshold(cloc_dir) -> None:
    predictor = ClocPredictor.from_pretrained(cloc_dir, device="cpu")
    records, phrases = rejection_phrases(4)
    threshold = cloc_threshold(predictor, 4)
    rows = cloc_rejects(predictor, records, phrases, threshold, "tiny")
    assert {row.id for row in rows} == {phrase.id for phrase in phrases}
    for row in rows:
        assert row.labels == ["absent" if row.confidence < threshold else "present"]
        assert row.settings["threshold"] == threshold
    all_refused = cloc_rejects(predictor, records, phrases, 2.0, "tiny")
    assert {row.labels[0] for row in all_refused} == {"absent"}
