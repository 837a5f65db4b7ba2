"""The ablation: which cells it makes, how it sums them up, and one small table for real."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from cloc_mllm.ablation import main, run_ablation
from cloc_mllm.ablation.cells import Cell, build_cells
from cloc_mllm.ablation.config import AblationArm, AblationConfig
from cloc_mllm.ablation.summary import Estimate, Row, estimate, verdict
from cloc_mllm.data.parquet import write_records
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.evaluation.stats.bootstrap import QueryScores
from cloc_mllm.stopping import StopRequest, wait_for
from tests.train.tiny_stage1 import tiny_config, write_tiny_inputs

ARMS = [
    AblationArm("CLOC"),
    AblationArm("M = 1", {"data.regions_per_image": 1, "model.init": "s{seed}"}, against="CLOC"),
]


def test_cells_come_seed_by_seed_with_the_arms_settings() -> None:
    config = AblationConfig(base="b.yaml", settings={"run.steps": 5}, arms=ARMS, seeds=[0, 7])
    cells = build_cells(config, "records")
    assert [cell.name for cell in cells] == [
        "CLOC, seed 0",
        "M = 1, seed 0",
        "CLOC, seed 7",
        "M = 1, seed 7",
    ]
    assert cells[3].directory.name == "m_1-seed7"
    assert " ".join(cells[3].arguments) == (
        "--config b.yaml --run.steps 5 --data.regions_per_image 1 --model.init s7"
        " --data.train records --run.seed 7"
    )


@pytest.mark.parametrize(
    ("arms", "only", "message"),
    [
        ([], [], "arms of different names"),
        ([ARMS[0], ARMS[0]], [], "arms of different names"),
        ([ARMS[1]], [], r"not among them: \['CLOC'\]"),
        (ARMS, ["CLIP"], r"not among them: \['CLIP'\]"),
    ],
    ids=["none", "twice", "against nothing", "only nothing"],
)
def test_impossible_arms_are_refused(
    arms: list[AblationArm], only: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_cells(AblationConfig(arms=arms, only=only), "records")


def scores(share: float, num_images: int = 100) -> QueryScores:
    values = (np.arange(num_images) < share * num_images).astype(float)
    return QueryScores(values, [str(i) for i in range(num_images)])


def test_an_interval_grows_with_the_spread_of_the_seeds() -> None:
    same = estimate([scores(0.5)] * 3)
    spread = estimate([scores(0.4), scores(0.5), scores(0.6)])
    assert same.value == pytest.approx(0.5) == pytest.approx(spread.value)
    assert same.high - same.low == pytest.approx(0.2, abs=0.04)  # 2 * 1.96 * sqrt(0.25 / 100)
    # Student's t with 2 degrees of freedom is 4.303; the seeds' standard error 0.1 / sqrt(3)
    assert spread.high - spread.value == pytest.approx(np.hypot(0.07, 4.303 * 0.0577), abs=0.02)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-0.3, -0.1, "="), (0.1, 0.3, "≠"), (-0.1, 0.2, "?")],
    ids=["same sign", "opposite sign", "not decided"],
)
def test_our_sign_is_held_against_the_papers(low: float, high: float, expected: str) -> None:
    arm = AblationArm("M = 1", paper={"text_to_box": -2.0})
    row = Row(arm, 3, [1.0], differences={"text_to_box": Estimate((low + high) / 2, low, high)})
    assert verdict(row, "text_to_box") == expected


def test_a_table_is_made_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_inputs(tmp_path)
    write_records(generate_scenes(12, split="test", long_side=64), tmp_path / "test")
    base = dataclasses.asdict(tiny_config(tmp_path, tmp_path / "unused", steps=2))
    base["optim"]["betas"] = list(base["optim"]["betas"])
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    ablation = {
        "base": str(tmp_path / "base.yaml"),
        "train": str(tmp_path / "records"),
        "test": str(tmp_path / "test"),
        "seeds": [0],
        "output_dir": str(tmp_path / "out"),
        "arms": [
            {"name": "CLOC"},
            {"name": "M = 1", "against": "CLOC", "settings": {"data.regions_per_image": 1}},
        ],
    }
    (tmp_path / "ablation.yaml").write_text(yaml.safe_dump(ablation))
    arguments = ["--config", str(tmp_path / "ablation.yaml")]

    assert main([*arguments, "--only", "[CLOC]"]) == 0
    assert main([*arguments, "--list"]) == 0
    assert "CLOC, seed 0: done\nM = 1, seed 0: to do" in capsys.readouterr().out
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "CLOC, seed 0: done before" in output
    assert "| M = 1 | CLOC | - |" in output
    assert (tmp_path / "out" / "ablation.png").stat().st_size > 10_000
    assert main([*arguments, "--settings", '{"run.steps": 1}', "--only", "[CLOC]"]) == 0
    assert "CLOC, seed 0: its settings changed, so it is trained anew" in capsys.readouterr().out


def test_after_a_cell_that_failed_or_a_signal_no_other_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_records(generate_scenes(2, split="test", long_side=64), tmp_path / "test")
    begun = []

    def run_cell(cell: Cell, *_: object, **__: object) -> None:
        begun.append(cell.name)
        if cell.seed:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)  # the main thread hears it
        else:
            raise ValueError("no records")

    monkeypatch.setattr("cloc_mllm.ablation.run_cell", run_cell)
    config = AblationConfig(
        base="b.yaml", arms=ARMS, train="records", test=str(tmp_path / "test"), output_dir="out"
    )
    with pytest.raises(ValueError, match="no records"):
        run_ablation(config)
    assert begun == ["CLOC, seed 0"]
    begun.clear()
    assert run_ablation(dataclasses.replace(config, seeds=[1, 2, 3])) == 128 + signal.SIGTERM
    assert 1 <= len(begun) < 6
    assert "the same command goes on" in capsys.readouterr().out


def test_a_signal_is_handed_on_to_the_training(tmp_path: Path) -> None:
    command = (
        "import signal, sys; from pathlib import Path; "
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); "
        f"Path({str(tmp_path / 'up')!r}).touch(); signal.pause()"
    )
    with StopRequest() as stop:
        process = subprocess.Popen([sys.executable, "-c", command])

        def stop_when_it_is_up() -> None:
            if (tmp_path / "up").exists():
                os.kill(os.getpid(), signal.SIGINT)

        wait_for(process, stop, stop_when_it_is_up)
    assert process.returncode == 143 and stop.requested
