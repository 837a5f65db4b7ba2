"""Two checkpoints on the same phrase."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloc_mllm.demo import load_rival
from cloc_mllm.demo.compare import Contest, contest
from cloc_mllm.demo.engine import DemoEngine, FoundBoxes
from cloc_mllm.demo.pictures import Picture, example_pictures
from cloc_mllm.demo.tabs.compare import contest_html, marks_of

BOX = (0.0, 0.0, 0.5, 0.5)


@pytest.fixture(scope="module")
def picture() -> Picture:
    return example_pictures("scenes")[0]


def test_both_are_asked_and_scored_against_the_true_box(
    cloc_engine: DemoEngine, full_engine: DemoEngine, picture: Picture
) -> None:
    phrase, box = picture.references[0]
    found = contest((cloc_engine, full_engine), picture, f" {phrase} ")
    assert found.reference == box
    assert found.names == ("photos, CLOC", "scenes, language model")
    assert found.found[0].text == "" and found.found[1].text != ""
    assert found.ious[0] is not None and 0 <= found.ious[0] <= 1
    unknown = contest((cloc_engine, full_engine), picture, "a thing nobody named")
    assert unknown.reference is None and unknown.ious == (None, None)


def test_the_answers_stand_side_by_side() -> None:
    half = FoundBoxes((BOX, (0.0, 0.0, 0.25, 0.5)), (0.9, 0.8), "", None, 1.0)
    none = FoundBoxes((), (), "no", "not_there", 1.0)
    found = Contest("<b>", ("<i>", "b"), (half, none), BOX, (1.0, None))
    html = contest_html(found)
    assert "<td>2</td><td>not in the image</td>" in html
    assert "<td>1.00</td><td>–</td>" in html
    assert "<th><b>" not in html and "<i>" not in html
    assert [(mark.tag, mark.group) for mark in marks_of(found)] == [
        ("true", 2),
        ("A", 0),
        ("A", 0),
    ]


def test_a_rival_of_either_stage(
    cloc_engine: DemoEngine, cloc_dir: Path, mllm_dir: Path, picture: Picture
) -> None:
    of_stage_1, of_stage_2 = (
        load_rival(cloc_engine, str(directory)) for directory in (cloc_dir, mllm_dir)
    )
    assert of_stage_1.grounding is None and of_stage_2.grounding is not None
    assert contest((of_stage_1, of_stage_2), picture, "the crab").names == (
        f"{cloc_dir}, CLOC",
        f"{mllm_dir}, language model",
    )


def test_a_shipped_rival_is_of_the_same_kind(
    cloc_engine: DemoEngine, full_engine: DemoEngine
) -> None:
    cloc, mllm = (load_rival(engine, "scenes") for engine in (cloc_engine, full_engine))
    assert cloc.grounding is None and cloc.names == ("scenes", "")
    assert mllm.grounding is not None and mllm.names[1] == "scenes"


def test_the_best_of_several_boxes_counts(cloc_engine: DemoEngine, picture: Picture) -> None:
    from cloc_mllm.demo.compare import _best_iou

    assert _best_iou([(0.0, 0.0, 0.25, 0.5), (0.5, 0.5, 1.0, 1.0)], BOX) == pytest.approx(0.5)
    assert _best_iou([], BOX) is None
