"""Explore: what the encoder sees, without any training or language model in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
from PIL import Image

from cloc_mllm.data.drawing import draw_regions, region_color
from cloc_mllm.data.scenes import CONCEPTS
from cloc_mllm.demo import answers
from cloc_mllm.demo.engine import MAX_PHRASE_CHARS, parse_names
from cloc_mllm.demo.explore import Hit, compare_encoders, heat_map, search
from cloc_mllm.demo.pictures import Picture, open_picture
from cloc_mllm.demo.stage import PRIVATE, Stage, required, required_stroke, visitor_errors
from cloc_mllm.demo.strokes import Stroke
from cloc_mllm.demo.surface import show
from cloc_mllm.geometry import Boxes

_MAX_GALLERY = 16
_NUM_HITS = 8
_HIT_SIDE_PX = 384  # about as large as it is shown, so that its tag can be read
_PHOTO_NAMES = (
    "a man, a woman, a child, a dog, a horse, a bird, a bear, an elephant, a bus, a motorcycle, "
    "a skateboard, a fire hydrant"
)
_HINT = "<p class='hint'>Draw a region on the picture, then compare or search.</p>"


def explore_tab(stage: Stage, examples: Sequence[Picture]) -> None:
    """Builds the tab and its events."""
    _heat_map(stage)
    _comparison(stage)
    _search(stage, examples)


def _heat_map(stage: Stage) -> None:
    phrase = gr.Textbox(
        label="Heat map of a phrase",
        placeholder="the dog",
        info="Enter lays it over the picture.",
        max_length=MAX_PHRASE_CHARS,
        max_lines=1,
        elem_id="heat-phrase",
    )
    said = gr.HTML("", elem_id="heat", elem_classes="answers")

    def heat(picture: Picture | None, text: str | None) -> tuple[Any, ...]:
        with visitor_errors():
            picture = required(picture)
            found = heat_map(stage.engine, picture, text or "")
        return None, show(picture, heat=found.overlay), answers.heat_html(found)

    shown = [stage.stroke, stage.surface, said]
    phrase.submit(heat, [stage.picture, phrase], shown, **PRIVATE)
    stage.on_picture(lambda _: [""], [said])


def _comparison(stage: Stage) -> None:
    names = gr.Textbox(
        _PHOTO_NAMES if stage.engine.cloc.phrases is not None else ", ".join(CONCEPTS[:16]),
        label="Names to compare a region with",
        info="Change the list as you like.",
        lines=2,
        max_lines=4,
        elem_id="explore-names",
    )
    button = gr.Button("Compare encoders", elem_id="compare-encoders")
    readings = gr.HTML(_HINT, elem_id="readings", elem_classes="answers")

    def compare(picture: Picture | None, stroke: Stroke | None, text: str | None) -> str:
        with visitor_errors():
            picture, stroke = required(picture), required_stroke(stroke)
            found = compare_encoders(stage.engine, picture, stroke, parse_names(text or ""))
        return answers.readings_html(found)

    button.click(compare, [stage.picture, stage.stroke, names], readings, **PRIVATE)
    stage.on_picture(lambda _: [_HINT], [readings])


def _search(stage: Stage, examples: Sequence[Picture]) -> None:
    with gr.Accordion("Gallery to search", open=False):
        files = gr.File(
            file_count="multiple",
            file_types=[".jpg", ".jpeg", ".png", ".webp"],
            label=f"Up to {_MAX_GALLERY} pictures; without any, the examples above are searched",
            height=120,
            elem_id="gallery-files",
        )
    button = gr.Button("Find similar regions", elem_id="search")
    # photos or scenes, whichever the model knows and which therefore come first
    known = [one for one in examples if (one.credit is None) == (examples[0].credit is None)]
    hits = gr.Gallery(
        label="Most similar regions",
        columns=2,
        height="auto",
        object_fit="contain",
        interactive=False,
        visible=False,
        buttons=[],
        elem_id="hits",
    )

    def find(picture: Picture | None, stroke: Stroke | None, paths: list[str] | None) -> Any:
        with visitor_errors():
            picture, stroke = required(picture), required_stroke(stroke)
            if len(paths or ()) > _MAX_GALLERY:
                raise ValueError(f"got {len(paths or ())} pictures; at most {_MAX_GALLERY}")
            gallery = [open_picture(path) for path in paths or ()] or [
                example for example in known if example.key != picture.key
            ]
            found = search(stage.engine, picture, stroke, gallery)
        return gr.Gallery([_drawn(hit) for hit in found[:_NUM_HITS]], visible=True)

    button.click(find, [stage.picture, stage.stroke, files], hits, **PRIVATE)
    stage.on_picture(lambda _: [gr.Gallery([], visible=False)], [hits])


def _drawn(hit: Hit) -> tuple[Image.Image, str]:
    tag = f"{hit.score:.2f}"
    boxes = Boxes.normalized([hit.box])
    drawn = draw_regions(
        hit.picture.image, boxes, [tag], colors=[region_color(0)], long_side=_HIT_SIDE_PX
    )
    return drawn, f"cosine {tag}"
