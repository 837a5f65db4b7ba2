"""What the encoder sees, on the smallest real models."""

from __future__ import annotations

import pytest

from cloc_mllm.demo.answers import heat_html, readings_html
from cloc_mllm.demo.engine import DemoEngine
from cloc_mllm.demo.explore import Readings, compare_encoders, heat_map, search
from cloc_mllm.demo.pictures import Picture, example_pictures
from cloc_mllm.demo.strokes import Stroke

BOX = Stroke("box", ((0.0, 0.0), (0.5, 0.5)))


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return example_pictures("scenes")


def test_a_heat_map_has_the_shape_of_its_picture(
    cloc_engine: DemoEngine, pictures: list[Picture]
) -> None:
    heat = heat_map(cloc_engine, pictures[0], "the crab")
    width, height = pictures[0].image.size
    assert heat.overlay.mode == "RGBA"
    assert heat.overlay.width / heat.overlay.height == pytest.approx(width / height, rel=0.02)
    assert -1 <= heat.lowest < heat.highest <= 1
    assert f"{heat.lowest:.2f}" in heat_html(heat)


def test_encoders_are_compared_on_the_same_names(
    full_engine: DemoEngine, pictures: list[Picture]
) -> None:
    readings = compare_encoders(full_engine, pictures[0], BOX, ("crab", "boat"))
    assert list(readings.cosines) == ["Prompter", "CLIP, RoI-Align", "CLIP, mean"]
    assert all(len(cosines) == 2 for cosines in readings.cosines.values())
    with pytest.raises(ValueError, match="at least one name"):
        compare_encoders(full_engine, pictures[0], BOX, ())


def test_the_best_name_of_each_encoder_is_bold_and_names_are_escaped() -> None:
    html = readings_html(Readings(("<b>", "a"), {"Prompter": (0.1, 0.2), "CLIP": (0.4, 0.3)}))
    assert "<td>&lt;b&gt;</td><td>0.10</td><td><b>0.40</b></td>" in html


def test_a_region_is_found_again_in_its_own_picture(
    cloc_engine: DemoEngine, pictures: list[Picture]
) -> None:
    hits = search(cloc_engine, pictures[0], BOX, pictures[:4])
    assert hits[0].picture is pictures[0]
    assert hits[0].box == pytest.approx((0.0, 0.0, 0.5, 0.5))
    assert hits[0].score == pytest.approx(1.0, abs=1e-5)
    scores = [hit.score for hit in hits]
    assert len(scores) == 4 and scores == sorted(scores, reverse=True)
