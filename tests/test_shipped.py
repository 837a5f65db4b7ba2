from __future__ import annotations

import re
from pathlib import Path

import pytest

from cloc_mllm import shipped


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shipped, "ASSETS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("named", ["", None, "photos"], ids=repr)
def test_a_shipped_model_is_found_by_its_name(named: str | None, assets: Path) -> None:
    for name, kind in (("photos", "cloc"), ("scenes", "cloc"), ("scenes", "mllm")):
        (assets / name / kind).mkdir(parents=True)
        (assets / name / kind / "config.json").touch()
    assert shipped.find_model("cloc", named) == assets / "photos" / "cloc"
    assert shipped.find_model("cloc", "scenes") == assets / "scenes" / "cloc"
    assert shipped.find_model("mllm") == assets / "scenes" / "mllm"


def test_a_folder_does_not_hide_a_shipped_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scenes").mkdir()
    assert shipped.find_model("mllm", "scenes") == shipped.ASSETS / "scenes" / "mllm"
    assert shipped.find_model("mllm", "./scenes") == Path("scenes")
    assert shipped.find_model("mllm", Path("scenes")) == Path("scenes")


@pytest.mark.parametrize("kind", ["cloc", "mllm"])
def test_a_missing_one_says_what_to_do(kind: shipped.ModelKind, assets: Path) -> None:
    (assets / "photos" / kind).mkdir(parents=True)  # a folder without a model in it is none
    with pytest.raises(FileNotFoundError, match=f"no {kind} ships by the name photos: .*a direct"):
        shipped.find_model(kind, "photos")


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("stage1_openmoji", "training/stage1_openmoji.yaml"),
        ("stage1_openmoji.yaml", "training/stage1_openmoji.yaml"),
        ("training/configs/stage1_openmoji.yaml", "training/stage1_openmoji.yaml"),
        ("training\\configs\\stage1_openmoji.yaml", "training/stage1_openmoji.yaml"),
        ("quick", "eval/quick.yaml"),
    ],
)
def test_a_shipped_config_is_found_from_any_folder(
    named: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped.find_config(named) == str(shipped.CONFIGS / expected)


def test_a_file_comes_first_and_other_paths_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quick.yaml").touch()
    assert shipped.find_config("quick.yaml") == "quick.yaml"
    assert shipped.find_config("other/quick.yaml") == "other/quick.yaml"


def test_an_unknown_config_lists_the_shipped_ones() -> None:
    said = "no file and no shipped config is called stage1_openmojis; did you mean stage1_openmoji?"
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        shipped.find_config("stage1_openmojis")
    assert all(path.stem in str(refused.value) for path in shipped.CONFIGS.glob("*/*.yaml"))


def test_a_clone_shows_the_shipped_configs_where_people_look(project_root: Path) -> None:
    for part in ("training", "eval"):
        shown = project_root / part / "configs"
        assert shown.resolve() == shipped.CONFIGS / part
        if shown.is_symlink():  # a checkout on Windows may have a file in its place
            assert not shown.readlink().is_absolute()
