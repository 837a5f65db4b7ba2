"""Pages from templates: every text is escaped, nothing runs, nothing is loaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from PIL import Image

from cloc_mllm import pages

TEMPLATES = sorted((Path(pages.__file__).parent / "templates").iterdir())


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_no_template_runs_or_loads_anything_or_leaves_a_text_as_it_is(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"<script|javascript:|\son\w+=|https?:|@import|url\(|<link", source)
    assert not re.search(r"\|\s*safe|autoescape|Markup", source)


def test_hostile_texts_are_escaped_in_text_and_attributes() -> None:
    evil = '"><script>alert(1)</script>'
    page = pages.render_page(
        "labels.html.j2",
        title=evil,
        numbers=[(evil, evil)],
        charts=[{"title": evil, "unit": evil, "bars": [(evil, evil, evil)]}],
        fates=[(evil, [(evil, evil, evil)])],
        images_per_second=evil,
        durations=[(evil, evil)],
        examples=[{"id": evil, "image": evil, "caption": evil, "scores": evil}],
        settings={evil: evil},
    )
    assert "<script" not in page and evil not in page
    assert page.count("&#34;&gt;&lt;script&gt;") >= 17


def test_a_value_that_a_template_misses_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="'numbers' is undefined"):
        pages.render_page("labels.html.j2", title="t")


def test_a_picture_is_part_of_the_page() -> None:
    assert pages.image_source(Image.new("RGB", (4, 3))).startswith("data:image/jpeg;base64,")
