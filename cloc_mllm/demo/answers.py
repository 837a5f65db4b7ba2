"""Writes answers as HTML for the page; every text of a visitor or a model is escaped."""

from __future__ import annotations

from html import escape

from cloc_mllm.data.drawing import Rgb
from cloc_mllm.data.wordings import NOT_THERE
from cloc_mllm.demo.engine import Found, FoundBoxes, Named
from cloc_mllm.demo.pictures import Outline

_BLUE: Rgb = (37, 99, 235)
COLORS: dict[str, Rgb] = {
    "Language model": (192, 38, 211),
    "CLOC head": _BLUE,
    "CLOC": _BLUE,
}

FIND_HINT = "<p class='hint'>The box appears on the picture.</p>"
NAME_HINT = "<p class='hint'>Click two opposite corners of a box on the picture.</p>"
SECOND_CLICK_HINT = "<p class='hint'>Now click the opposite corner.</p>"

STYLE = """
.timing, .answer small { color: var(--body-text-color-subdued); }
.timing { font-size: .9em; }
.hint, .timing { margin: .4em 0; }
.answer { border-left: 4px solid var(--answer-color);
  padding: .15em 0 .15em .8em; margin: .7em 0; overflow-wrap: anywhere; }
.answer b { display: block; }
.answer .said { font-size: 1.25em; }
.answer .failed { color: var(--error-text-color, #b91c1c); }
.closest { width: 100%; border-collapse: collapse; margin: .3em 0 !important;
  table-layout: fixed; }
.closest th { text-align: left; font-weight: 400; color: var(--body-text-color-subdued); }
.closest, .closest tr, .closest td, .closest th { border: 0 !important; }
.closest td, .closest th { padding: .2em .4em .2em 0; overflow-wrap: anywhere; }
.closest th:nth-child(2), .closest td:nth-child(2) { width: 45%; }
.closest th:last-child, .closest td:last-child { width: 4.2em; text-align: right;
  font-variant-numeric: tabular-nums; padding-right: 0; }
.closest i { display: block; height: .7em; border-radius: .2em; min-width: 2px;
  background: var(--answer-color); }
#picture img { cursor: crosshair; max-height: 70vh; object-fit: contain; }
#choose { align-items: center; gap: .75em; }
#examples .grid-wrap { padding: 0; min-height: 0; height: auto; overflow-y: hidden; }
#examples .grid-container { padding: 2px; margin: 0; }
#examples .thumbnail-item { aspect-ratio: 4 / 3; }
#named, #found { padding: 0; }
footer { display: none !important; }
"""


def found_outlines(found: Found) -> list[Outline]:
    """Lists what to draw; the language model's answer comes last, so on top."""
    answers = {"CLOC head": found.cloc_head, "Language model": found.language_model}
    return [
        Outline(box, COLORS[name], name)
        for name, answer in answers.items()
        for box in (answer.boxes if answer is not None else ())
    ]


def found_html(found: Found) -> str:
    cards = [_found_card("CLOC head", found.cloc_head, "similarity")]
    if found.language_model is not None:
        cards.insert(0, _found_card("Language model", found.language_model, "confidence"))
    return "".join(cards) + _timing(found.encode_ms)


def _found_card(name: str, answer: FoundBoxes, confidence_name: str) -> str:
    if answer.failure == "not_there":
        said = NOT_THERE
    elif not answer.boxes:
        said = f"<span class='failed'>no box: {escape(answer.failure or '')}</span>"
    else:
        said = " ".join(f"[{', '.join(f'{v:.2f}' for v in box)}]" for box in answer.boxes)
    facts = [f"{answer.milliseconds:.0f} ms"]
    if answer.confidence is not None:
        facts.insert(0, f"{confidence_name} {answer.confidence:.2f}")
    if answer.text:
        facts.append(f"wrote: <code>{escape(answer.text)}</code>")
    return _card(name, said, " · ".join(facts))


def named_html(named: Named) -> str:
    card = ""
    if named.answer is not None:
        said = f"<span class='said'>{escape(named.answer) or '(nothing)'}</span>"
        card = _card("Language model", said, f"{named.answer_ms:.0f} ms")
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td><i style='width:{100 * max(score, 0):.1f}%'></i></td>"
        f"<td>{_score(score, named.measure)}</td></tr>"
        for name, score in named.closest
    )
    table = f"<table class='closest'><tr><th>closest</th><th></th><th>{named.measure}</th>"
    table += f"</tr>{rows}</table>"
    facts = f"{named.closest_ms:.0f} ms"
    return card + _card("CLOC", table, facts) + _timing(named.encode_ms)


def _score(score: float, measure: str) -> str:
    return f"{100 * score:.1f} %" if measure == "probability" else f"{score:.2f}"


def _card(name: str, said: str, facts: str) -> str:
    return (
        f"<div class='answer' style='--answer-color:rgb{COLORS[name]}'><b>{name}</b>{said}"
        f"<div><small>{facts}</small></div></div>"
    )


def _timing(encode_ms: float) -> str:
    if encode_ms < 1:
        return "<p class='timing'>The picture was already encoded; prompts reuse it.</p>"
    return f"<p class='timing'>Encoding the picture took {encode_ms:.0f} ms, once.</p>"
