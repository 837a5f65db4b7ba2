"""The demo over the smallest real models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.tiny_mllm import cloc_dir, llm_dir, mllm_dir

if TYPE_CHECKING:
    from cloc_mllm.demo.engine import DemoEngine
    from cloc_mllm.inference.cloc_predictor import ClocPredictor
    from cloc_mllm.inference.grounding_predictor import GroundingPredictor

__all__ = ["cloc_dir", "llm_dir", "mllm_dir"]


@pytest.fixture(scope="session")
def gradio_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder for Gradio's uploads, as `cloc-mllm demo` sets it."""
    folder = tmp_path_factory.mktemp("gradio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        yield folder


@pytest.fixture(scope="session")
def cloc_predictor(cloc_dir: Path) -> ClocPredictor:
    from cloc_mllm.inference.cloc_predictor import ClocPredictor

    return ClocPredictor.from_pretrained(cloc_dir)


@pytest.fixture(scope="session")
def grounding_predictor(mllm_dir: Path) -> GroundingPredictor:
    from cloc_mllm.inference.grounding_predictor import GroundingPredictor

    return GroundingPredictor.from_pretrained(mllm_dir)


@pytest.fixture
def cloc_engine(cloc_predictor: ClocPredictor) -> DemoEngine:
    from cloc_mllm.demo.engine import DemoEngine

    return DemoEngine(cloc_predictor)


@pytest.fixture
def full_engine(
    cloc_predictor: ClocPredictor, grounding_predictor: GroundingPredictor
) -> DemoEngine:
    from cloc_mllm.demo.engine import DemoEngine

    return DemoEngine(cloc_predictor, grounding_predictor)
