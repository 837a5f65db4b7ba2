from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from cloc_mllm import about, cli
from cloc_mllm.extras import install_command
from cloc_mllm.shipped import ASSETS, SHIPPED_MODELS


def test_models_lists_what_ships_and_what_was_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = tmp_path / "one" / "model"
    shutil.copytree(ASSETS / "scenes" / "cloc", local)
    assert cli.main(["models", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for name, knows in SHIPPED_MODELS.items():
        assert f"{name} (" in out
        assert knows in out
    assert f"  {local}  (CLOC, " in out


def test_models_of_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", str(tmp_path / "none")]) == 0
    assert capsys.readouterr().out.endswith(f"in {tmp_path / 'none'}: no model\n")


@pytest.mark.parametrize("model", about._SHIPPED, ids=lambda model: f"{model.name}-{model.kind}")
def test_every_score_stands_in_the_model_card(model: about._Shipped) -> None:
    card = " ".join((ASSETS / "README.md").read_text(encoding="utf-8").split())
    section = card.partition(f"## `{model.name}`")[2].partition("## `")[0]
    numbers = re.findall(r"(\d+\.\d) %", model.scores)
    assert numbers
    for number in numbers:
        assert number in section


def test_every_shipped_model_is_listed() -> None:
    shipped = {path.parent for path in ASSETS.glob("*/*/config.json")}
    assert shipped == {ASSETS / model.name / model.kind for model in about._SHIPPED}


@pytest.mark.parametrize("model", ["photos", str(ASSETS / "scenes" / "mllm")])
def test_doctor_says_that_a_model_fits(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", model]) == 0
    out = capsys.readouterr().out
    for said in ("cloc-mllm", "torch", "memory", "disk", "precision"):
        assert re.search(rf"^{said} +\S", out, re.MULTILINE), said
    assert f"{model}: fingerprint fits this version; " in out


def test_doctor_refuses_another_preprocessing_and_half_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ASSETS / "scenes" / "cloc", tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert cli.main(["doctor", str(tmp_path)]) == 2
    assert "model.safetensors is not whole" in capsys.readouterr().err

    config = json.loads((tmp_path / "config.json").read_text())
    config["fingerprint"]["pixel_mean"] = "(0.1, 0.1, 0.1)"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["doctor", str(tmp_path)]) == 2
    assert "pixel_mean" in capsys.readouterr().err


def test_doctor_names_the_command_of_a_missing_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(about.EXTRA_OF_PACKAGE, "no_such_package", "vesl")
    assert cli.main(["doctor"]) == 0
    assert f"lacks no_such_package: {install_command('vesl')}\n" in capsys.readouterr().out


def test_doctor_of_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", str(tmp_path)]) == 2
    assert "is no model" in capsys.readouterr().err
