"""The code that the page offers asks what the page asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from cloc_mllm.demo.engine import DemoEngine
from cloc_mllm.demo.snippets import ground_code, refer_code
from cloc_mllm.demo.strokes import Stroke

SIZE = (80, 60)
BOX = Stroke("box", ((0.1, 0.1), (0.6, 0.7)))


@pytest.fixture(params=["cloc", "language model"])
def engine(request: pytest.FixtureRequest, cloc_dir: Path, mllm_dir: Path) -> DemoEngine:
    with_words = request.param == "language model"
    grounding = request.getfixturevalue("grounding_predictor") if with_words else None
    cloc = request.getfixturevalue("cloc_predictor")
    return DemoEngine(cloc, grounding, names=(str(cloc_dir), str(mllm_dir)))


def test_code_runs_and_draws(
    engine: DemoEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", SIZE, "teal").save("PICTURE.jpg")
    names = ("crab", "boat")  # the tiny CLOC has no list of its own
    phrases = ['the "crab"', "it's {x}\\n"]
    for code in (ground_code(engine, phrases), refer_code(engine, BOX, SIZE, names)):
        exec(compile(code, "snippet", "exec"), {})
        assert Path("answer.png").stat().st_size > 0
        Path("answer.png").unlink()
    boxes = json.loads(capsys.readouterr().out.strip().rpartition(" [[")[2].join(["[[", ""]))
    assert boxes == [pytest.approx([8, 6, 48, 42], abs=0.01)]


def test_the_models_own_list_is_asked_for_without_names(cloc_engine: DemoEngine) -> None:
    code = refer_code(cloc_engine, BOX, SIZE, ())
    assert 'predictor.closest("PICTURE.jpg", [[0.1, 0.1, 0.6, 0.7]])' in code
    assert "ClocPredictor.from_pretrained('photos')" in code
