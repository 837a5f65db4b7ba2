"""Writes a question of the page as Python that asks the same."""

from __future__ import annotations

from collections.abc import Sequence

from cloc_mllm.demo.engine import DemoEngine
from cloc_mllm.demo.strokes import Stroke

_PICTURE = '"PICTURE.jpg"'
_SHOW = """print(result.labels, result.scores.tolist(), result.boxes.to_pixels().xyxy.tolist())
result.draw().save("answer.png")
"""


def ground_code(engine: DemoEngine, phrases: Sequence[str]) -> str:
    method = "locate" if engine.grounding is None else "ground"
    call = f"{method}({_PICTURE}, {list(phrases)!r})"
    return f"{_predictor(engine)}result = predictor.{call}\n{_SHOW}"


def refer_code(
    engine: DemoEngine, stroke: Stroke, image_wh: tuple[int, int], names: Sequence[str]
) -> str:
    box = [round(value, 4) for value in stroke.box(image_wh)]
    if engine.grounding is not None:
        call = f"refer({_PICTURE}, [{box}])"
    elif names:
        call = f"classify({_PICTURE}, [{box}], {list(names)!r})"
    else:
        call = f"closest({_PICTURE}, [{box}])"
    return f"{_predictor(engine)}result = predictor.{call}  # box xyxy, 0..1\n{_SHOW}"


def _predictor(engine: DemoEngine) -> str:
    kind, module, name = "ClocPredictor", "cloc_predictor", engine.names[0]
    if engine.grounding is not None:
        kind, module, name = "GroundingPredictor", "grounding_predictor", engine.names[1]
    return (
        f"from cloc_mllm.inference.{module} import {kind}\n\n"
        f"predictor = {kind}.from_pretrained({name!r})\n"
    )
