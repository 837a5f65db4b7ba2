"""The picture on the page: boxes on it, and a pen for a box, a point or a scribble.

`surface.js` draws; this says what. `strokes` reads what a visitor drew.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gradio as gr
from PIL import Image

from cloc_mllm.box import Box
from cloc_mllm.data.drawing import Rgb
from cloc_mllm.demo.pictures import Picture
from cloc_mllm.demo.strokes import Stroke

_TEMPLATE = """
<div class="tools" role="group" aria-label="Drawing tool">
  <button type="button" data-tool="box" aria-pressed="true">▭ Box</button>
  <button type="button" data-tool="point" aria-pressed="false">• Point</button>
  <button type="button" data-tool="scribble" aria-pressed="false">∿ Scribble</button>
  <button type="button" class="clear">Clear</button>
</div>
<div class="stage" tabindex="0" role="application" aria-label="Draw on the picture"
  aria-describedby="surface-keys">
  <img class="picture" alt="" draggable="false"><img class="heat" alt="" hidden draggable="false">
  <svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true"></svg>
  <div class="tags" aria-hidden="true"></div>
  <div class="cursor" aria-hidden="true" hidden></div>
</div>
<p class="keys" id="surface-keys">Drag a box, tap a point or scribble. Keys: arrows move, Shift
  finely, Enter puts the pen down and lifts it, Esc clears.</p>
<p class="said" role="status"></p>
<div class="tools" role="group" aria-label="Export">
  <button type="button" class="save-picture">Save picture</button>
  <button type="button" class="save-json">Save JSON</button>
  <button type="button" class="copy-python">Copy as Python</button>
</div>
<textarea class="python" rows="8" readonly hidden aria-label="The question as Python"></textarea>
"""


class Mark(NamedTuple):
    """A box to draw.

    Attributes:
        tag: the text at the box; "" is none.
        group: what belongs together on the page; texts of the same group light up with it.
        phrase, by, score: for the JSON: what it is the box of, by which model, and how sure.
    """

    box: Box
    color: Rgb
    tag: str
    group: int
    dashed: bool = False
    phrase: str = ""
    by: str = ""
    score: float | None = None


def surface(first: Picture) -> gr.HTML:
    """Builds the component; its events are `drawn` and `cleared`."""
    return gr.HTML(
        show(first),
        html_template=_TEMPLATE,
        js_on_load=(Path(__file__).parent / "surface.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id="surface",
    )


def show(
    picture: Picture,
    marks: Sequence[Mark] = (),
    stroke: Stroke | None = None,
    heat: Image.Image | None = None,
    python: str = "",
) -> Any:
    """Makes the component's value; see `surface.js`.

    Args:
        stroke: what the visitor drew, which stays visible.
        heat: a picture with transparency that is laid over.
        python: the question as code.
    """
    region = None
    if stroke is not None:
        box = stroke.box(picture.image.size)
        region = {"kind": stroke.kind, "points": stroke.points, "box": box}
    return {
        "image": _data_address(picture.image, "JPEG"),
        "alt": picture.caption or "the chosen picture",
        "marks": [mark._asdict() | {"color": css_color(mark.color)} for mark in marks],
        "region": region,
        "heat": None if heat is None else _data_address(heat, "PNG"),
        "python": python,
    }


def css_color(color: Rgb) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _data_address(image: Image.Image, kind: Literal["JPEG", "PNG"]) -> str:
    """Writes an image into an address, so that no file of it is left anywhere."""
    encoded = io.BytesIO()
    image.save(encoded, kind, quality=88)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded.getvalue()).decode()}"
