import re

import numpy as np
import pytest
from cloc_mllm.evaluation.report.details import details_html
from cloc_mllm.evaluation.report.paper_table import paper_tables
from cloc_mllm.evaluation.scoring import compute_metrics, pairs_by_task
from PIL import Image

from cloc_mllm.evaluation.report.page import choose_examples, write_report
from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow

EVIL = '<script>alert("1")</script> & more'


@pytest.fixture
def page(tmp_path):
    """A report over hostile texts, an inverted box, and an answer that cannot be read."""
    box, inverted = (0.1, 0.1, 0.5, 0.5), (0.5, 0.5, 0.1, 0.1)
    rows = [
        PredictionRow("1", "i1", "rec", EVIL, EVIL, boxes=[inverted]),
        PredictionRow("2", "i2", "rec", "the crab", EVIL, failure=EVIL),
        PredictionRow("3", '"><b>', "referring", EVIL, EVIL),
        PredictionRow("4", "i1", "region_classification", "", labels=[EVIL], scores=[0.5]),
    ]
    references = [
        ReferenceRow("1", "i1", "rec", boxes=[box], kind=EVIL),
        ReferenceRow("2", "i2", "rec", boxes=[box]),
        ReferenceRow("3", '"><b>', "referring", boxes=[box], labels=[EVIL]),
        ReferenceRow(
            "4", "i1", "region_classification", boxes=[box], labels=[EVIL], num_candidates=3
        ),
    ]
    pairs = pairs_by_task(rows, references)
    metrics = compute_metrics(pairs, samples=10)
    metrics["about"] = {"config": {"cloc": EVIL}}
    path = tmp_path / "report.html"
    write_report(path, metrics, pairs, lambda image_id: Image.new("RGB", (40, 30), "gray"))
    return path.read_text()


def test_all_texts_are_escaped(page):
    assert "<script" not in page and "<b>" not in page
    assert page.count("&lt;script&gt;") >= 8


def test_the_page_asks_nothing_of_the_network(page):
    addresses = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|@import', page)
    # a link to each section, the picture of each example and a link to itself
    assert len(addresses) == 3 + 2 * 4
    assert all(src.startswith(("data:image/jpeg;base64,", "#")) for src, _ in addresses)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)


def test_it_is_one_well_formed_page(page):
    for tag in ("section", "figure", "table", "tr", "td", "dl", "dd", "div", "svg", "g", "details"):
        assert len(re.findall(rf"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag
    assert '<meta name="viewport"' in page


@pytest.mark.parametrize("count", [1, 2, 4, 30])
def test_examples_are_best_worst_and_others_without_repetition(count):
    scores = np.random.default_rng(0).permutation(np.linspace(0, 1, count))
    groups = choose_examples(scores, 6, seed=0)
    chosen = [index for group in groups.values() for index in group]
    assert len(chosen) == len(set(chosen)) == min(count, 18)
    if count == 30:
        order = np.argsort(-scores)
        assert groups["Best"] == order[:6].tolist()
        assert groups["Worst"] == order[::-1][:6].tolist()
        assert len(groups["Random others"]) == 6


def test_surprising_are_confident_errors_and_unsure_hits():
    rng = np.random.default_rng(0)
    scores, confidence = (rng.random(60) < 0.5).astype(float), rng.random(60)
    confidence[:5] = np.nan
    groups = choose_examples(scores, 4, seed=0, confidence=confidence)
    wrong = [i for i in np.argsort(-confidence[5:]) + 5 if scores[i] == 0]
    right = [i for i in np.argsort(confidence[5:]) + 5 if scores[i] == 1]
    assert groups["Surprising: confident and wrong"] == wrong[:4]
    assert groups["Surprising: unsure and right"] == right[:4]
    chosen = [index for group in groups.values() for index in group]
    assert len(chosen) == len(set(chosen)) == 5 * 4
    assert "Surprising: unsure and right" not in choose_examples(scores, 4, 0, np.full(60, np.nan))


def test_details_are_drawn_and_their_texts_escaped():
    boxes = [(0.1 * i, 0.1, 0.1 * i + 0.1, 0.5) for i in range(8)]
    references = [
        ReferenceRow(str(i), f"i{i}", "rec", boxes=[box], kind=f"{EVIL}{i % 2}", num_distractors=i)
        for i, box in enumerate(boxes)
    ]
    rows = [
        PredictionRow(str(i), f"i{i}", "rec", boxes=[box], confidence=0.1 * i)
        for i, box in enumerate(boxes)
    ]
    metrics = compute_metrics(pairs_by_task(rows, references), samples=10)
    html = details_html(metrics["details"]["rec"])
    assert "<script" not in html and "&lt;script&gt;" in html
    for title in ("by kind", "by position", "by distractors", "Reliability", "Selective accuracy"):
        assert title in html
    assert "expected calibration error 65.0 %" in html
    tables = paper_tables(metrics)
    assert "**rec, by distractors**" in tables and "Rounded to one decimal" in tables


def test_a_task_with_one_score_shows_different_examples_by_seed():
    scores = np.ones(50)
    assert choose_examples(scores, 6, seed=0) != choose_examples(scores, 6, seed=1)
