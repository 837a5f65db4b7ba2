"""Data: a set of records or chats with its boxes, and what its build dropped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import gradio as gr

from cloc_mllm.data.drawing import region_color
from cloc_mllm.demo import answers
from cloc_mllm.demo.data_set import DataSet, Item
from cloc_mllm.demo.engine import MAX_PHRASE_CHARS
from cloc_mllm.demo.pictures import new_picture
from cloc_mllm.demo.stage import Stage, visitor_errors
from cloc_mllm.demo.surface import Mark, css_color

_MAX_TAG_CHARS = 40
_HINT = "<p class='hint'>Next shows the first one.</p>"


def data_tab(stage: Stage, data_set: DataSet | None) -> None:
    """Builds the tab and its events; without a set, the sentence that says so."""
    if data_set is None:
        gr.HTML(answers.needs_option("Browse a set of records or chats", "--data DIR"))
        return
    words = gr.Textbox(
        label="Only with these words",
        info=f"{data_set.directory}: {len(data_set):,} {data_set.items.kind}",
        max_length=MAX_PHRASE_CHARS,
        max_lines=1,
        elem_id="data-words",
    )
    with gr.Row():
        before = gr.Button("Previous", elem_id="data-previous", min_width=120)
        after = gr.Button("Next", elem_id="data-next", min_width=120)
    shown = gr.HTML(_HINT, elem_id="data-item", elem_classes="answers")
    place = gr.State(None)  # among the items with these words

    def go(step: int | None, text: str | None, at: int | None) -> tuple[Any, ...]:
        with visitor_errors():
            found = data_set.find((text or "")[:MAX_PHRASE_CHARS])
            if not found:
                raise ValueError("no item has these words; try others")
            at = 0 if step is None or at is None else (at + step) % len(found)
            item = data_set.read(found[at])
            head = f"{at + 1:,} of {len(found):,}"
            if item.image is None:
                return at, item_html(item, head), *[gr.skip()] * len(stage.outputs)
            picture = new_picture(item.image, item.record)
            return at, item_html(item, head), *stage.choose(picture, marks_of(item))

    options: dict[str, Any] = {"inputs": [words, place], "api_visibility": "private"}
    options |= {"outputs": [place, shown, *stage.outputs]}
    words.submit(lambda text, at: go(None, text, at), **options)
    before.click(lambda text, at: go(-1, text, at), **options)
    after.click(lambda text, at: go(1, text, at), **options)
    _drops(data_set)


def _drops(data_set: DataSet) -> None:
    with gr.Accordion("What the build left out", open=False, elem_id="data-drops"):
        words = gr.Textbox(
            label="Only with these words",
            info="A reason, an id, or what stood there.",
            max_length=MAX_PHRASE_CHARS,
            max_lines=1,
            elem_id="drop-words",
        )
        table = gr.HTML(drops_html(data_set, ""), elem_id="drops", elem_classes="answers")
    words.submit(
        lambda text: drops_html(data_set, (text or "")[:MAX_PHRASE_CHARS]),
        words,
        table,
        api_visibility="private",
    )


def marks_of(item: Item) -> list[Mark]:
    """Lists the boxes of an item, each group in the colour of its name."""
    return [
        Mark(
            box, region_color(group), named.text[:_MAX_TAG_CHARS], group, False, named.text, "data"
        )
        for group, named in enumerate(item.named)
        for box in named.boxes
    ]


def item_html(item: Item, head: str) -> str:
    parts = [f"<p><b>{head}</b> <code>{escape(item.id)}</code></p>"]
    if item.num_images != 1:
        which = "the first is shown" if item.num_images else "nothing to show on the picture"
        parts.append(f"<p class='hint'>{item.num_images} images; {which}.</p>")
    parts += [f"<p class='text'>{escape(text)}</p>" for text in item.texts]
    chips = "".join(
        f"<button type='button' class='phrase' data-group='{group}' aria-pressed='false' "
        f"style='--group:{css_color(region_color(group))}'>{escape(named.text)}</button>"
        for group, named in enumerate(item.named)
    )
    return "".join(parts) + f"<div class='chips'>{chips}</div>"


def drops_html(data_set: DataSet, words: str) -> str:
    """Writes the counts of each reason and the first items, with what would have been right."""
    counts, drops = data_set.drops(words)
    parts = [f"<pre>{escape(data_set.built)}</pre>"]
    if not counts:
        return parts[0] + "<p class='hint'>No dropped item has these words.</p>" * bool(words)
    parts.append("<p>" + ", ".join(_counted(counts.most_common())) + "</p>")
    for reason, expected in dict.fromkeys((drop.reason, drop.expected) for drop in drops):
        wanted = f": expected {escape(expected)}" if expected else ""
        parts.append(f"<p class='text'><b>{escape(reason)}</b>{wanted}</p><ul>")
        for drop in drops:
            if drop.reason == reason:
                found = f": <code>{escape(drop.found)}</code>" if drop.found else ""
                what = f"{escape(drop.kind)} <code>{escape(drop.id)}</code>"
                parts.append(f"<li class='text'>{what}{found}</li>")
        parts.append("</ul>")
    if len(drops) < counts.total():
        parts.append(f"<p class='hint'>and {counts.total() - len(drops):,} more</p>")
    return "".join(parts)


def _counted(counts: Sequence[tuple[str, int]]) -> list[str]:
    return [f"{escape(reason)} {count:,}" for reason, count in counts]
