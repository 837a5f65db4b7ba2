from __future__ import annotations

import re
from pathlib import Path

import pytest

from cloc_mllm import ClocPredictor, GroundingPredictor, cli, shipped


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


def test_what_a_shipped_model_knows_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("photos", "./photos", Path("photos"), "runs/mine", ""):
        shipped.say_what_it_knows(name, "--mllm")
    out, err = capsys.readouterr()
    assert out == ""
    assert (
        err
        == "the model photos knows everyday photos; for the built-in drawings use --mllm scenes\n"
    )


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["demo"], ["the model photos knows"]),
        (["demo", "--model", "scenes"], ["the model scenes knows"]),
        (["demo", "--mllm", "scenes"], ["the model photos knows", "the model scenes knows"]),
        (["serve", "--port", "0"], ["the model scenes knows"]),
        (["serve", "--port", "0", "--mllm", "photos"], ["the model photos knows"]),
        (["serve", "--port", "0", "--mllm", "./photos"], []),
    ],
    ids=" ".join,
)
def test_demo_and_serve_say_it_before_they_load(
    command: list[str],
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for extra in ("gradio", "uvicorn"):
        pytest.importorskip(extra, reason=f"{extra} is not installed")

    def load(*_: object, **__: object) -> None:
        raise ValueError("not loaded")

    for predictor in (ClocPredictor, GroundingPredictor):
        monkeypatch.setattr(predictor, "from_pretrained", load)
    monkeypatch.setattr("cloc_mllm.serve._log_requests", lambda: None)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")  # the demo sets them
    assert cli.main(command) == 2
    *lines, error = capsys.readouterr().err.splitlines()
    assert error == "cloc-mllm: error: not loaded"
    assert [line[: len("the model photos knows")] for line in lines] == said


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
