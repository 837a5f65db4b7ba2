"""The page of an evaluation, of hostile texts."""

import re

import pytest
from PIL import Image

from cloc_mllm.evaluation.metrics import compute_metrics, pairs_by_task
from cloc_mllm.evaluation.report.page import write_report
from cloc_mllm.evaluation.report.table import paper_tables
from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow
from cloc_mllm.evaluation.stats.bootstrap import Bootstrap

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
    evaluation = compute_metrics(pairs, bootstrap=Bootstrap(10))
    evaluation.about = {"config": {"cloc": EVIL}}
    path = tmp_path / "report.html"
    write_report(path, evaluation, pairs, lambda task, image_id: Image.new("RGB", (40, 30), "gray"))
    return path.read_text()


def test_all_texts_are_escaped(page):
    assert "<script" not in page and "<b>" not in page
    assert page.count("&lt;script&gt;") >= 8


def test_the_page_asks_nothing_of_the_network(page):
    addresses = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|@import', page)
    # a link to each section, the picture of each example and a link to itself, plots
    num_plots = page.count('<div class="plot">')
    assert len(addresses) == 3 + 2 * 4 + num_plots and num_plots > 0
    kinds = ("data:image/jpeg;base64,", "data:image/svg+xml;base64,", "#")
    assert all(src.startswith(kinds) for src, _ in addresses)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)


def test_it_is_one_well_formed_page(page):
    for tag in ("section", "figure", "table", "tr", "td", "dl", "dd", "div", "details"):
        assert len(re.findall(rf"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag
    assert '<meta name="viewport"' in page


def test_details_are_drawn_and_their_texts_escaped(tmp_path):
    boxes = [(0.1 * i, 0.1, 0.1 * i + 0.1, 0.5) for i in range(8)]
    references = [
        ReferenceRow(str(i), f"i{i}", "rec", boxes=[box], kind=f"{EVIL}{i % 2}", num_distractors=i)
        for i, box in enumerate(boxes)
    ]
    rows = [
        PredictionRow(str(i), f"i{i}", "rec", boxes=[box], confidence=0.1 * i)
        for i, box in enumerate(boxes)
    ]
    pairs = pairs_by_task(rows, references)
    evaluation = compute_metrics(pairs, bootstrap=Bootstrap(10))
    image = Image.new("RGB", (40, 30), "gray")
    path = tmp_path / "report.html"
    write_report(path, evaluation, pairs, lambda task, image_id: image, num_examples=0)
    html = path.read_text()
    assert "<script" not in html and "<figure" not in html
    for title in ("by kind", "by position", "by distractors", "Reliability", "Selective accuracy"):
        assert title in html
    assert "expected calibration error 65.0 %" in html
    tables = paper_tables(evaluation)
    assert "**rec, by distractors**" in tables and "Rounded to one decimal" in tables
