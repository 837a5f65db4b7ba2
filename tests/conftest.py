"""Fixtures of all tests. The environment is set before anything imports torch or the hub."""

from __future__ import annotations

import os
import random
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"  # each miss of an unreachable hub would cost 25 s
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest

if TYPE_CHECKING:
    from cloc_mllm.data.records import Record

# a busy machine is no reason to fail
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test starts alike, whichever ran before it in its process."""
    os.environ.pop("LOCAL_RANK", None)
    random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


PROJECT_ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def project_root() -> Path:
    return PROJECT_ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photos and annotations beside the project."""
    path = PROJECT_ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no real data: {path} does not exist")
    return path


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium-like browser."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no browser: none of chromium, chromium-browser, google-chrome is on the PATH")


@pytest.fixture(scope="session")
def tiny_scenes() -> list[Record]:
    """16 built-in training scenes, seed 0."""
    from cloc_mllm.data.scenes import generate_scenes

    return list(generate_scenes(16, split="train", seed=0))
