"""One self-contained `report.html`: numbers with intervals, and drawn examples of each task.

No script, no external request; images are JPEG inside the page and every text is escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Collection, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from cloc_mllm.data.drawing import Rgb, draw_regions
from cloc_mllm.evaluation.grounding import answer_iou
from cloc_mllm.evaluation.predictions import ScoredPair
from cloc_mllm.evaluation.report_details import details_html
from cloc_mllm.evaluation.report_style import CSS
from cloc_mllm.evaluation.scoring import SCORERS
from cloc_mllm.evaluation.table import (
    entry_cells,
    failure_sentence,
    metric_title,
    percent,
    used_columns,
)
from cloc_mllm.geometry import Boxes

TRUE_COLOR = (26, 152, 80)
ANSWER_COLOR = (214, 0, 120)
IMAGE_SIDE_PX = 208  # about as wide as a card, so that outlines stay sharp
_SENTENCE_CHARACTERS = 40
# the metric by which examples are called best or worst; a task without one gets no gallery
EXAMPLE_METRIC = {
    "region_classification": "micro_acc",
    "true_box_cloc": "micro_acc",
    "true_box_roi_align": "micro_acc",
    "true_box_crop": "micro_acc",
    "true_box_mask": "micro_acc",
    "zero_shot_classification": "micro_acc",
    "phrase_grounding": "r_at_1",
    "region_to_text": "r_at_1",
    "image_to_text": "r_at_1",
    "text_to_box": "mean_iou",
    "rec": "mean_iou",
    "referring": "word_f1",
}


def write_report(
    path: str | Path,
    metrics: Mapping[str, Any],
    pairs: Mapping[str, Sequence[ScoredPair]],
    load_image: Callable[[str], Image.Image],
    *,
    num_examples: int = 6,
    seed: int = 0,
) -> None:
    """Write the page.

    Args:
        metrics: of `scoring.compute_metrics`; `about` in it (title -> text, list or dict) is shown
            at the end.
        pairs: the model's answers by task.
        load_image: image id -> RGB image in the original frame.
        num_examples: of the best, of the worst, of each kind of surprise and of the rest, for each
            task.
    """
    sections: dict[str, str] = {}
    for task, task_pairs in pairs.items():
        details = metrics.get("details", {}).get(task)
        with_examples = task in EXAMPLE_METRIC and num_examples > 0
        if details or with_examples:
            parts = [details_html(details)] if details else []
            if with_examples:
                parts.append(_gallery(task, task_pairs, load_image, num_examples, seed))
            sections[task] = task_section(task, "".join(parts))
    body = [_headline(metrics, sections), *sections.values(), _about(metrics)]
    Path(path).write_text(page("cloc-mllm evaluation", "".join(body)), encoding="utf-8")


def page(title: str, body: str) -> str:
    """One self-contained HTML page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>"
        f"<body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def task_section(task: str, content: str) -> str:
    """A section that begins with the task's name and rule."""
    title, rule = escape(SCORERS[task].title), escape(SCORERS[task].rule)
    return f'<section id="{task}"><h2>{title}</h2><p class="rule">{rule}</p>{content}</section>'


def _headline(metrics: Mapping[str, Any], sections: Collection[str]) -> str:
    """All tasks' numbers, with a link to each section; on narrow screens each row is a block."""
    columns = used_columns([e for entries in metrics["tasks"].values() for e in entries.values()])
    body = []
    for task, entries in metrics["tasks"].items():
        title = escape(SCORERS[task].title)
        if task in sections:
            title = f'<a href="#{task}">{title}</a>'
        span = len(columns) + 1
        body.append(f'<tr class="task"><th colspan="{span}" scope="rowgroup">{title}</th></tr>')
        body += [_metric_row(metric, entry, columns) for metric, entry in entries.items()]
    failures = "".join(
        f"<p>{escape(failure_sentence(SCORERS[task].title, entry))}</p>"
        for task, entry in metrics["failures"].items()
    )
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ["metric", *columns])
    return (
        "<section><p>Percent, with 95&nbsp;% intervals (bootstrap over images). In the bars: "
        '<span class="key value"></span> score, <span class="key interval"></span> interval, '
        '<span class="key tick"></span> chance.</p>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        f"{failures}</section>"
    )


def _metric_row(metric: str, entry: Mapping[str, Any], columns: Sequence[str]) -> str:
    cells = entry_cells(entry)
    html = "".join(
        f'<td data-label="{escape(name)}">{escape(cells[name])}'
        f"{_bar(entry) if name == 'score' else ''}</td>"
        for name in columns
    )
    return f'<tr><th scope="row">{escape(metric_title(metric))}</th>{html}</tr>'


def _bar(entry: Mapping[str, Any]) -> str:
    low, width = entry["ci_low"], entry["ci_high"] - entry["ci_low"]
    tick = ""
    if "chance" in entry:
        tick = f'<i class="tick" style="left:{percent(entry["chance"])}%"></i>'
    return (
        f'<div class="bar"><i class="value" style="width:{percent(entry["value"])}%"></i>'
        f'<i class="interval" style="left:{percent(low)}%;width:{percent(width)}%"></i>{tick}</div>'
    )


def _gallery(
    task: str,
    pairs: Sequence[ScoredPair],
    load_image: Callable[[str], Image.Image],
    num_examples: int,
    seed: int,
) -> str:
    scores = SCORERS[task].score(pairs)[EXAMPLE_METRIC[task]].values
    groups = choose_examples(scores, num_examples, seed, _confidences(pairs))
    html = [_legend(task)]
    for title, indices in groups.items():
        if indices:
            cards = "".join(
                _card(pairs[i], load_image(pairs[i].reference.image_id)) for i in indices
            )
            html.append(f'<h3>{title}</h3><div class="gallery">{cards}</div>')
    return "".join(html)


def _confidences(pairs: Sequence[ScoredPair]) -> np.ndarray:
    """float[Q]: the answer's confidence, or the score of its first label; NaN if it has neither."""
    answers = [pair.prediction for pair in pairs]
    known = [
        row.scores[0] if row.confidence is None and row.scores else row.confidence
        for row in answers
    ]
    return np.array([np.nan if value is None else value for value in known], dtype=float)


def choose_examples(
    scores: np.ndarray, num_examples: int, seed: int, confidence: np.ndarray | None = None
) -> dict[str, list[int]]:
    """Indices of the best, the worst, the surprising and random others; ties in random order.

    None is shown twice; of few queries each group gets at most a third. Surprising are the wrong
    answers (score < 0.5) of the highest confidence and the right ones of the lowest.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(scores))
    surprises: dict[str, list[int]] = {}
    if confidence is not None and np.isfinite(confidence).any():
        known = shuffled[np.isfinite(confidence[shuffled])]
        known = known[np.argsort(-confidence[known], kind="stable")]
        count = min(num_examples, len(scores) // 6)
        surprises = {
            "Surprising: confident and wrong": known[scores[known] < 0.5][:count].tolist(),
            "Surprising: unsure and right": known[scores[known] >= 0.5][::-1][:count].tolist(),
        }
    shown = [index for group in surprises.values() for index in group]
    shuffled = shuffled[~np.isin(shuffled, shown)]
    order = shuffled[np.argsort(-scores[shuffled], kind="stable")]
    count = min(num_examples, len(order) // 3 or 1)
    best, rest = order[:count], order[count:]
    worst, middle = rest[::-1][:count], rest[: max(0, len(rest) - count)]
    chosen = rng.permutation(middle)[:num_examples].tolist()
    groups = {"Best": best.tolist(), "Worst": worst.tolist()}
    return {**groups, **surprises, "Random others": chosen}


def _legend(task: str) -> str:
    if task in ("image_to_text", "zero_shot_classification"):
        return ""
    asked = task.startswith("true_box") or task in (
        "region_classification",
        "region_to_text",
        "referring",
    )
    legend = swatch(TRUE_COLOR) + ("the box asked about" if asked else "true box")
    if not asked:
        legend += swatch(ANSWER_COLOR) + "answer"
    return f'<p class="legend">{legend}</p>'


def swatch(color: Rgb) -> str:
    return f'<span class="box" style="border-color:rgb{color}"></span> '


def _card(pair: ScoredPair, image: Image.Image) -> str:
    """One picture with what was asked, what was answered and what is true."""
    reference, prediction = pair.reference, pair.prediction
    data = jpeg_bytes(draw_answer(pair, image))
    alt = f"{reference.task} example on image {reference.image_id}"
    return card(prediction.id, data, alt, _facts(pair), _boxes_and_ids(pair))


def card(
    query_id: str,
    jpeg: bytes | None,
    alt: str,
    facts: Sequence[tuple[str, str]],
    more: Sequence[tuple[str, str]],
) -> str:
    """A picture (None: there is none), what is to be said of it, and `more` to be unfolded.

    Its address in the page is the query's id.
    """
    image = '<p class="no-image">picture not available</p>'
    if jpeg:
        source = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
        image = f'<img alt="{escape(alt, quote=True)}" src="{source}">'
    link = f'<a href="#{quote(query_id)}">link to this example</a>'
    return (
        f'<figure id="{escape(query_id, quote=True)}">{image}<figcaption>{_list(facts)}'
        f"<details><summary>boxes and ids</summary>{_list(more)}{link}</details>"
        "</figcaption></figure>"
    )


def _list(facts: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts)
    return f"<dl>{rows}</dl>"


def _boxes_and_ids(pair: ScoredPair) -> list[tuple[str, str]]:
    """Boxes in the original image's frame, 0..1, and where to find the query in the files."""
    prediction, reference = pair.prediction, pair.reference
    facts = [("query", reference.id), ("image", reference.image_id)]
    if reference.kind:
        facts.append(("kind", reference.kind))
    facts += [("true box", box_text(box)) for box in reference.boxes[:4]]
    return facts + [("answered box", box_text(box)) for box in prediction.boxes[:4]]


def box_text(box: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in box)


def _facts(pair: ScoredPair) -> list[tuple[str, str]]:
    prediction, reference = pair.prediction, pair.reference
    facts = []
    if reference.boxes and reference.task in ("text_to_box", "rec", "phrase_grounding"):
        facts += [("asked", prediction.prompt), ("IoU", f"{answer_iou([pair])[0]:.2f}")]
    else:
        if prediction.task == "referring":
            facts.append(("asked", prediction.prompt))
        facts.append(("true", _shown(reference.labels)))
    if prediction.raw_text:
        facts.append(("answer", prediction.raw_text))
    if prediction.labels:
        facts.append(("answer", _shown(prediction.labels)))
    if prediction.confidence is not None:
        facts.append(("confidence", f"{prediction.confidence:.2f}"))
    if prediction.failure:
        facts.append(("failure", prediction.failure))
    return facts


def _shown(labels: Sequence[str]) -> str:
    """The first three, or the first alone if they are sentences."""
    return " · ".join(labels[:3] if len(labels[0]) < _SENTENCE_CHARACTERS else labels[:1])


def draw_answer(pair: ScoredPair, image: Image.Image) -> Image.Image:
    """The image, long side 208 px, with the true boxes and the answered one (labelled)."""
    answered = [] if pair.prediction.failure else pair.prediction.boxes[:1]
    num_true = len(pair.reference.boxes)
    return draw_regions(
        image,
        Boxes.normalized([*pair.reference.boxes, *answered]),
        [""] * num_true + ["answer"] * len(answered),
        colors=[TRUE_COLOR] * num_true + [ANSWER_COLOR] * len(answered),
        long_side=IMAGE_SIDE_PX,
    )


def jpeg_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _about(metrics: Mapping[str, Any]) -> str:
    rules = "".join(
        f"<dt>{escape(SCORERS[task].title)}</dt><dd>{escape(rule)}</dd>"
        for task, rule in metrics["rules"].items()
    )
    about = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{_plain(value)}</dd>"
        for name, value in metrics.get("about", {}).items()
    )
    return (
        f"<section><h2>Rules of scoring</h2><dl>{rules}</dl>"
        f"<h2>How this was made</h2><dl>{about}</dl></section>"
    )


def _plain(value: Any) -> str:
    """A setting as escaped text, a dict as lines."""
    if isinstance(value, Mapping):
        return "<br>".join(f"{escape(key)}: {_plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return escape(", ".join(map(str, value)) or "none")
    return escape(str(value))
