"""Compare: two checkpoints side by side on the same phrase."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from cloc_mllm.data.drawing import region_color
from cloc_mllm.data.wordings import NOT_THERE
from cloc_mllm.demo import answers
from cloc_mllm.demo.compare import Contest, contest
from cloc_mllm.demo.engine import MAX_PHRASE_CHARS, DemoEngine
from cloc_mllm.demo.pictures import Picture
from cloc_mllm.demo.stage import PRIVATE, Stage, required, visitor_errors
from cloc_mllm.demo.surface import Mark, css_color, show

_HINT = (
    "<p class='hint'>Both checkpoints are asked for the same phrase. Phrases of the examples have "
    "a true box, which is drawn dashed.</p>"
)


def compare_tab(stage: Stage, rival: DemoEngine | None) -> None:
    """Builds the tab and its events; without a second checkpoint, the sentence that says so."""
    if rival is None:
        gr.HTML(answers.needs_option("See two checkpoints side by side", "--compare DIR"))
        return
    phrase = gr.Textbox(
        label="What to look for",
        info="Enter asks both.",
        max_length=MAX_PHRASE_CHARS,
        max_lines=1,
        elem_id="compare-phrase",
    )
    suggestions = gr.Dataset(
        components=[phrase], samples=[], visible=False, label="With a true box", elem_id="known"
    )
    table = gr.HTML(_HINT, elem_id="compared", elem_classes="answers")

    def ask(picture: Picture | None, text: str | None) -> tuple[Any, ...]:
        with visitor_errors():
            picture = required(picture)
            found = contest((stage.engine, rival), picture, text or "")
        samples = [[known] for known in picture.suggestions]
        known = gr.Dataset(samples=samples, visible=bool(samples))
        return None, show(picture, marks_of(found)), contest_html(found), known

    event: dict[str, Any] = {"fn": ask, "inputs": [stage.picture, phrase], **PRIVATE}
    event["outputs"] = [stage.stroke, stage.surface, table, suggestions]
    phrase.submit(**event)
    suggestions.click(lambda row: row[0], suggestions, phrase, api_visibility="private").success(
        **event
    )
    stage.on_picture(lambda _: [_HINT], [table])


def marks_of(found: Contest) -> list[Mark]:
    """Lists the boxes of both, and below them the true one."""
    marks = []
    if found.reference is not None:
        color = region_color(2)
        marks.append(Mark(found.reference, color, "true", 2, True, found.phrase, "reference"))
    for group, (name, answer) in enumerate(zip(found.names, found.found, strict=True)):
        for box, score in zip(answer.boxes, answer.scores, strict=False):
            tag = "AB"[group]
            marks.append(
                Mark(box, region_color(group), tag, group, False, found.phrase, name, score)
            )
    return marks


def contest_html(found: Contest) -> str:
    """Names the checkpoints and writes a column for each."""
    rows: dict[str, list[str]] = {"boxes": [], "score": [], "IoU with the true box": [], "ms": []}
    chips = ""
    for group, (name, answer) in enumerate(zip(found.names, found.found, strict=True)):
        iou = found.ious[group]
        chips += (
            f"<button type='button' class='phrase' data-group='{group}' aria-pressed='false' "
            f"style='--group:{css_color(region_color(group))}'>{'AB'[group]}: {escape(name)}"
            "</button>"
        )
        none = NOT_THERE if answer.failure == "not_there" else escape(answer.failure or "none")
        rows["boxes"].append(str(len(answer.boxes)) if answer.boxes else none)
        rows["score"].append(", ".join(f"{score:.2f}" for score in answer.scores) or "–")
        rows["IoU with the true box"].append("–" if iou is None else f"{iou:.2f}")
        rows["ms"].append(f"{answer.milliseconds:.0f}")
    body = "".join(
        f"<tr><td>{title}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for title, cells in rows.items()
    )
    head = f"<tr><th>{escape(found.phrase)}</th><th>A</th><th>B</th></tr>"
    table = f"<div class='chips'>{chips}</div><table class='readings'><thead>{head}</thead>"
    table += f"<tbody>{body}</tbody></table>"
    if found.reference is None:
        table += "<p class='hint'>The true box of this phrase is not known.</p>"
    return table + "<p class='hint'>Scores of different models are not comparable.</p>"
