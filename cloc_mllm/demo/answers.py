"""Writes answers as HTML for the page; every text of a visitor or a model is escaped.

Elements with `data-group` light up together with the boxes of that group (`surface.js`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from cloc_mllm.data.drawing import Rgb, region_color
from cloc_mllm.data.wordings import NOT_THERE
from cloc_mllm.demo.engine import FoundBoxes, Grounding, Named
from cloc_mllm.demo.explore import Heat, Readings
from cloc_mllm.demo.pictures import Picture
from cloc_mllm.demo.surface import Mark, css_color
from cloc_mllm.inference.commands import LOW_SIMILARITY
from cloc_mllm.mllm.coordinates import BOX_TOKEN

LANGUAGE_MODEL, CLOC = "Language model", "CLOC"

GROUND_HINT = "<p class='hint'>Each phrase gets a colour; its boxes appear on the picture.</p>"
REFER_HINT = "<p class='hint'>Draw on the picture: drag a box, tap a point or scribble.</p>"


def needs_language_model(what: str) -> str:
    """Says in a sentence what is missing, and the command that brings it."""
    return (
        f"<p class='needs'>{what} needs a language model: start with "
        "<code>cloc-mllm demo --mllm photos</code> (photos), <code>--model scenes</code> "
        "(built-in drawings) or <code>--mllm DIR</code>.</p>"
    )


def needs_option(what: str, option: str) -> str:
    """Says in a sentence what a tab would show, and the command that brings it."""
    return f"<p class='needs'>{what}: start with <code>cloc-mllm demo {option}</code>.</p>"


def credit_html(picture: Picture) -> str:
    """Names where a picture comes from and its licence; "" where none is due."""
    if picture.credit is None:
        return ""
    address, licence = map(escape, picture.credit)
    link = f"<a href='{address}' rel='noreferrer' target='_blank'>its author on Flickr</a>"
    return f"<p class='credit'>Photo by {link}, {licence}, made smaller.</p>"


def marks_of(grounding: Grounding) -> list[Mark]:
    """Lists what to draw. With a language model CLOC's boxes are dashed, below the others."""
    marks = []
    for group, found in enumerate(grounding.found):
        color, phrase = region_color(group), found.phrase
        cloc, written = found.cloc, found.language_model
        second = written is not None or grounding.writing is not None
        tag = "" if written is not None and written.boxes else phrase
        for box, score in zip(cloc.boxes, cloc.scores, strict=False):
            marks.append(Mark(box, color, tag, group, second, phrase, CLOC, score))
        if written is None:
            continue
        for box, score in zip(written.boxes, written.scores, strict=False):
            marks.append(Mark(box, color, phrase, group, False, phrase, LANGUAGE_MODEL, score))
    return sorted(marks, key=lambda mark: not mark.dashed)


def grounding_html(grounding: Grounding) -> str:
    cards = []
    has_language_model = grounding.writing is not None or any(
        found.language_model is not None for found in grounding.found
    )
    writing = grounding.writing
    for group, found in enumerate(grounding.found):
        lines = []
        if found.language_model is not None:
            lines.append(_found_line(LANGUAGE_MODEL, found.language_model, _confidence))
        elif writing is not None:
            lines.append(_line(LANGUAGE_MODEL, f"<code class='writing'>{escape(writing)}</code>"))
            writing = None
        name = f"{CLOC} (dashed)" if has_language_model else CLOC
        lines.append(_found_line(name, found.cloc, _similarity))
        cards.append(_card(group, region_color(group), found.phrase, lines))
    return "".join(cards) + _timing(grounding.encode_ms)


def _found_line(name: str, answer: FoundBoxes, say_score: Callable[[float], str]) -> str:
    if answer.failure == "not_there":
        said = NOT_THERE
    elif not answer.boxes:
        said = f"<span class='failed'>no box: {escape(answer.failure or '')}</span>"
    else:
        said = " · ".join(say_score(score) for score in answer.scores)
        if len(answer.boxes) > 1:
            said = f"{len(answer.boxes)} boxes, {said}"
    facts = [f"{answer.milliseconds:.0f} ms"]
    if answer.text.replace(BOX_TOKEN, "").strip():
        facts.append(f"wrote <code>{escape(answer.text)}</code>")
    return _line(name, f"{said} <small>{' · '.join(facts)}</small>")


def named_html(named: Named) -> str:
    parts = []
    if named.answer is not None:
        words = escape(named.answer) or "…"
        parts.append(f"<p class='said'>{words} <small>{LANGUAGE_MODEL}</small></p>")
    if named.box is not None:
        parts.append(
            "<p class='hint'>This model learnt boxes alone: it reads the dashed box that stands "
            "for your drawing.</p>"
        )
    own = ", and how often each is said" if named.measure == "similarity" else ""
    parts.append(
        f"<p>Likeliest of {named.num_names} names, by {CLOC}{own}; a ranking, not an answer in "
        "words.</p>"
    )
    parts.append(names_html(named.closest, named.measure))
    return "".join(parts) + _timing(named.encode_ms)


def names_html(closest: Sequence[tuple[str, float]], measure: str) -> str:
    """Writes names with a bar for each score."""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td><i style='width:{100 * max(score, 0):.1f}%'></i></td>"
        f"<td>{_score(score, measure)}</td></tr>"
        for name, score in closest
    )
    return (
        "<table class='closest'><thead><tr><th>name</th><th><span class='hidden'>bar</span></th>"
        f"<th>{measure}</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def heat_html(heat: Heat) -> str:
    return (
        f"<p>Cosine of the phrase and the picture's tokens: from {heat.lowest:.2f} (dark blue) to "
        f"{heat.highest:.2f} (orange). The colours always span the whole range, also where "
        "nothing fits.</p>"
    )


def readings_html(readings: Readings) -> str:
    """Writes a row per name and a column per encoder; the best name of each column is bold."""
    best = {way: max(cosines) for way, cosines in readings.cosines.items()}
    head = "".join(f"<th>{escape(way)}</th>" for way in readings.cosines)
    rows = []
    for index, name in enumerate(readings.names):
        cells = ""
        for way, cosines in readings.cosines.items():
            said = f"{cosines[index]:.2f}"
            cells += f"<td>{f'<b>{said}</b>' if cosines[index] == best[way] else said}</td>"
        rows.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    return (
        "<table class='readings'><thead><tr><th>name</th>"
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        "<p class='hint'>Cosines of the same box and each name; the best of each column is bold. "
        "The two CLIP columns pool the tower's own tokens: nothing of them was trained on regions."
        "</p>"
    )


def _score(score: float, measure: str) -> str:
    return f"{100 * score:.1f} %" if measure == "probability" else f"{score:.2f}"


def _similarity(score: float) -> str:
    """Says a cosine, and in words when it is low."""
    low = score < LOW_SIMILARITY
    return f"similarity {score:.2f}" + (", low: perhaps not in the image" if low else "")


def _confidence(score: float) -> str:
    return f"confidence {score:.2f}"


def _card(group: int, color: Rgb, phrase: str, lines: Sequence[str]) -> str:
    return (
        f"<div class='answer' style='--group:{css_color(color)}'>"
        f"<button type='button' class='phrase' data-group='{group}' aria-pressed='false'>"
        f"{escape(phrase)}</button>{''.join(lines)}</div>"
    )


def _line(name: str, said: str) -> str:
    return f"<div><b>{name}</b> {said}</div>"


def _timing(encode_ms: float) -> str:
    if encode_ms < 1:
        return "<p class='timing'>The picture was already encoded; questions reuse it.</p>"
    return f"<p class='timing'>Encoding the picture took {encode_ms:.0f} ms, once.</p>"
