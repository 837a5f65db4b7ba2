"""`import cloc_mllm`: what a user finds there, and what it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cloc_mllm
from cloc_mllm.data.scenes import generate_scenes


def run_python(code: str, folder: Path | None = None) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("name", cloc_mllm.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(cloc_mllm, name).__name__ == name


def test_names_are_listed_before_they_are_loaded() -> None:
    listed = run_python("import cloc_mllm; print(*dir(cloc_mllm))").split()
    assert {*cloc_mllm.__all__, "__version__"} <= set(listed)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'cloc_mllm' has no attribute 'ClocPredicter'"):
        cloc_mllm.ClocPredicter  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'ClocPredicter'"):
        from cloc_mllm import ClocPredicter  # noqa: F401


def test_importing_it_loads_nothing() -> None:
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "import cloc_mllm\n"
        "seconds = time.perf_counter() - start\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)), seconds < 0.1)"
    )
    assert run_python(code).strip() == "[] True"


def test_type_checkers_see_the_names(project_root: Path) -> None:
    tree = ast.parse((project_root / "cloc_mllm" / "__init__.py").read_text())
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If))
    assert isinstance(guarded.test, ast.Name) and guarded.test.id == "TYPE_CHECKING"
    imported = {
        alias.name: node.module.removeprefix("cloc_mllm.")
        for node in guarded.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert imported == cloc_mllm._MODULE_OF
    assert sorted(imported) == cloc_mllm.__all__
    assert (project_root / "cloc_mllm" / "py.typed").is_file()
    assert '"py.typed"' in (project_root / "pyproject.toml").read_text()


def test_the_model_is_registered_when_it_is_imported() -> None:
    code = (
        "from cloc_mllm import ClocMllmForConditionalGeneration as Model\n"
        "from transformers import AutoConfig, AutoModelForImageTextToText as Auto\n"
        "print(Auto._model_mapping[type(AutoConfig.for_model('cloc_mllm'))] is Model)"
    )
    assert run_python(code).strip() == "True"


def test_one_line_finds_a_box_in_pixels(tmp_path: Path) -> None:
    record = next(generate_scenes(1, split="test", long_side=256))
    region = next(region for region in record.regions if region.expressions)
    record.load_image().save(tmp_path / "x.jpg")
    out = run_python(
        "from cloc_mllm import GroundingPredictor as G; "
        f"print(G.from_pretrained().ground('x.jpg', {region.expressions[:1]})"
        ".boxes.to_pixels().xyxy.tolist())",
        tmp_path,
    )
    expected = cloc_mllm.Boxes.normalized([region.box]).to_pixels(*record.load_image().size)
    ((x1, y1, x2, y2),) = ast.literal_eval(out)
    assert [x1, y1, x2, y2] == pytest.approx(expected.xyxy[0].tolist(), abs=25)
