"""Phrases of one, several and no boxes: what is asked, and the scores of worked answers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.data.readers.refer import read_refer
from cloc_mllm.data.records import Region
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.evaluation.rows.rows import ScoredPair
from cloc_mllm.evaluation.score import score as score_files
from cloc_mllm.evaluation.tasks.grec import Grec, is_failure, score
from tests.evaluation.helpers import LEFT, RIGHT, means, pair, query_sets, record, write_lines

BOTH = [[0, 0, 500, 1000], [500, 0, 1000, 1000]]


def made(index: int, kind: str, true: list, **answer: Any) -> ScoredPair:
    label = "present" if true else "absent"
    return pair(
        answer, query_id=f"q{index}", image_id=f"i{index}", boxes=true, labels=[label], kind=kind
    )


def test_worked_answers() -> None:
    pairs = [
        made(0, "one", [LEFT], boxes=[LEFT]),
        made(1, "one", [LEFT], boxes=[LEFT, RIGHT]),  # F1 2/3
        made(2, "several", [LEFT, RIGHT], boxes=[RIGHT, LEFT]),
        made(3, "several", [LEFT, RIGHT], raw_text="not in the image", failure="not_there"),
        made(4, "none", [], raw_text="not in the image", failure="not_there"),
        made(5, "none", [], raw_text="[]", failure="no_box"),
        made(6, "none", [], raw_text="there is no crab", failure="not_a_box"),
        made(7, "none", [], boxes=[LEFT]),
        made(8, "none", [], raw_text="a crab", failure="not_a_box"),
        made(9, "one", [LEFT], raw_text="left", failure="not_a_box"),
    ]
    actual = {name: value for name, value in means(score(pairs)).items() if "/" not in name}
    assert actual == pytest.approx(
        {
            "pr_at_f1_1": 5 / 10,
            "pr_at_f1_1_giou": 5 / 10,
            "f1_at_0_5": (5 + 2 / 3) / 10,
            "n_acc": 3 / 5,
            "t_acc": 3 / 5,
            "false_refusals": 1 / 5,
        }
    )
    assert [is_failure(p) for p in pairs] == [False] * 8 + [True, True]
    by_kind = means(score(pairs))
    assert by_kind["f1_at_0_5/one"] == pytest.approx((1 + 2 / 3) / 3)
    assert "t_acc/none" not in by_kind and by_kind["n_acc/none"] == 3 / 5


def test_each_record_is_asked_for_one_several_and_none() -> None:
    scenes = list(generate_scenes(30, split="test"))
    (asked,) = query_sets(Grec(), scenes)
    again = query_sets(Grec(), scenes)[0]
    assert asked.pairs == again.pairs and asked.answer == "boxes"
    kinds = Counter(reference.kind for reference in asked.references)
    assert kinds["none"] == 60 and kinds["one"] > 50 and 15 < kinds["several"] <= 60
    by_id = {scene.id: scene for scene in scenes}
    for query, reference in asked.pairs:
        texts = [t for r in by_id[query.image_id].regions for t in (r.phrase, *r.expressions)]
        assert (len(reference.boxes) == 1) == (reference.kind == "one")
        assert (query.text in texts) == (reference.kind == "one") or reference.kind == "several"


def test_a_group_of_a_photo_is_one_query_with_all_its_boxes() -> None:
    men = [Region(box, "two men", group="1") for box in (LEFT, RIGHT)]
    (asked,) = query_sets(Grec(), [record("a", men), record("b", [Region(LEFT, "a boat")])])
    assert {(query.image_id, query.text, len(right.boxes)) for query, right in asked.pairs} == {
        ("a", "two men", 2),
        ("a", "a boat", 0),
        ("b", "a boat", 1),
        ("b", "two men", 0),
    }


def test_rows_of_another_model_are_read_in_their_format(tmp_path) -> None:
    predictions = write_lines(
        tmp_path / "p.jsonl",
        [
            {"id": "a", "raw_text": json.dumps([{"bbox_2d": b} for b in BOTH])},
            {"id": "b", "raw_text": "I cannot find it."},
            {"id": "c", "raw_text": "[]"},
        ],
    )
    references = write_lines(
        tmp_path / "r.jsonl",
        [
            {"id": "a", "image_id": "i", "boxes": [LEFT, RIGHT], "labels": ["present"]},
            {"id": "b", "image_id": "i", "labels": ["absent"]},
            {"id": "c", "image_id": "i", "labels": ["absent"]},
        ],
    )
    scored = score_files("grec", predictions, references, "qwen3-vl")
    metrics = scored.tasks["grec"].metrics
    assert metrics["pr_at_f1_1"].value == metrics["n_acc"].value == 1


def test_grefcoco_s_own_files(tmp_path: Path) -> None:
    """Rows as `grefs(unc).json` has them: one box, two, none, of a photo that is missing."""
    Image.new("RGB", (100, 50)).save(tmp_path / "COCO_train2014_000000000007.jpg")
    boxes = {1: [0, 0, 50, 50], 2: [50, 0, 50, 50]}
    instances = {
        "images": [{"id": 7, "file_name": "COCO_train2014_000000000007.jpg", "width": 100,
                    "height": 50}],
        "annotations": [{"id": n, "image_id": 7, "category_id": 3, "bbox": b}
                        for n, b in boxes.items()],
        "categories": [{"id": 3, "name": "dog"}],
    }  # fmt: skip
    made_of = [(1, 7, [1], "left dog"), (2, 7, [2, 1], "both dogs"), (3, 7, [-1], "cat")]
    refs = [
        {"ref_id": n, "image_id": image, "ann_id": ids, "category_id": [3] * len(ids),
         "split": "val", "sentences": [{"sent": text}, {"sent": f"the {text}"}]}
        for n, image, ids, text in [*made_of, (4, 8, [9], "a photo that is not there")]
    ]  # fmt: skip
    (tmp_path / "grefs(unc).json").write_text(json.dumps(refs))
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    log = DropLog()
    paths = tmp_path / "grefs(unc).json", tmp_path / "instances.json", tmp_path
    records = list(read_refer(*paths, split="val", drop_log=log))
    assert log.set_aside == {"region": {"no_target": 1}, "expression": {"no_target": 2}}
    assert {(r.phrase, r.category, r.group) for r in records[0].regions} == {
        ("left dog", "dog", ""),
        ("both dogs", "dog", "ref 2"),
    }

    (asked,) = query_sets(Grec(refs=paths[0], split="val"), records)

    found = {q.text: (right.kind, len(right.boxes)) for q, right in asked.pairs}
    assert found["left dog"] == ("one", 1)
    assert found["the both dogs"] == ("several", 2)
    assert found["cat"] == ("none", 0)
    assert str(asked.coverage) == "6 of 8 sentences (missing_image 2)"
    with pytest.raises(ValueError, match="no refs of the split 'testA'"):
        query_sets(Grec(refs=paths[0], split="testA"), records)
