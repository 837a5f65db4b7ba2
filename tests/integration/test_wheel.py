"""What `pip install` gives: a wheel of the package alone, which works from an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools")


@pytest.fixture(scope="module")
def wheel(project_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because a build writes beside its sources."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    shutil.copytree(
        project_root / "cloc_mllm",
        source / "cloc_mllm",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(project_root / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(root)]
    pip("wheel", *options, str(source))
    (wheel,) = root.glob("*.whl")
    return wheel


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_it_holds_the_package_and_no_measuring_code(wheel: Path, project_root: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"cloc_mllm"}
    assert not [name for name in names if "bench/" in name]
    package = project_root / "cloc_mllm"
    shipped = [
        *package.glob("configs/*/*.yaml"),
        *package.glob("templates/*"),
        *(path for path in package.glob("assets/**/*") if path.is_file()),
        package / "py.typed",
    ]
    assert shipped and {path.relative_to(project_root).as_posix() for path in shipped} <= names
    assert "cloc_mllm/assets/photos/cloc/model.safetensors" in names
    assert wheel.stat().st_size < 80e6


def test_a_shipped_config_runs_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    pip("install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    empty.mkdir()

    def cloc_mllm(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cloc_mllm.cli", *arguments],
            cwd=empty,
            env={**os.environ, "PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
            check=False,
        )

    built = cloc_mllm("data", "build", "scenes", "--num", "8", "--output_dir", "runs/data/train")
    assert built.returncode == 0, built.stderr
    shown = cloc_mllm("stage1", "--config", "stage1_openmoji", "--dry_run")
    assert shown.returncode == 0, shown.stderr
    assert "output_dir: runs/stage1_openmoji" in shown.stdout
    refused = cloc_mllm("stage1", "--config", "stage1", "--dry_run")
    assert refused.returncode == 2 and "stage1_openmoji_long" in refused.stderr
