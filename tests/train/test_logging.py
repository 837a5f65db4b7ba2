from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from cloc_mllm.train.logging import Pace, TrainLog, read_log


def write_rows(output_dir: Path, first_step: int, steps: range) -> None:
    log = TrainLog(output_dir, first_step, num_steps=10, enabled=True)
    for step in steps:
        log.row(step, "train", {"loss": float(step)})
    log.close()


def test_rows_are_strict_json_and_show_nan(tmp_path: Path) -> None:
    log = TrainLog(tmp_path, 0, 10, enabled=True)
    log.row(1, "skipped", {"loss": math.nan, "grad_norm": math.inf, "sample_ids": ["a"]})
    log.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    actual = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=refuse)
    expected = {"loss": "nan", "grad_norm": "inf", "sample_ids": ["a"]}
    assert actual == {"step": 1, "kind": "skipped", **expected}


def test_a_resumed_run_drops_the_rows_it_will_repeat(tmp_path: Path) -> None:
    write_rows(tmp_path, 0, range(1, 6))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "ki')  # cut by a kill
    write_rows(tmp_path, 3, range(4, 8))
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == list(range(1, 8))


def test_damaged_rows_are_set_aside_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path, 0, range(1, 4))
    damaged = [
        b"\xff\xfe\n",
        b"\n",
        b'{"kind": "train"}\n',
        b"[1]\n",
        b'{"step": "2", "kind": ""}\n',
    ]
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.writelines(damaged)
    write_rows(tmp_path, 3, range(4, 6))
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 5]
    assert "5 damaged row(s)" in capsys.readouterr().out
    assert len((tmp_path / "log.damaged.jsonl").read_text().splitlines()) == 5


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_rows(tmp_path, 0, range(1, 4))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 3)]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = TrainLog(tmp_path / "run", 0, 10, enabled=False)
    log.row(1, "train", {"loss": 1.0})
    log.advance()
    log.message("hello")
    log.close()
    assert not (tmp_path / "run").exists()


def test_pace_counts_the_images_since_the_last_question() -> None:
    pace = Pace(images_per_step=8, first_step=10)
    first = pace.since_last(15)
    second = pace.since_last(16)
    assert math.isclose(first["images_per_second"] * first["seconds"], 40)
    assert math.isclose(second["images_per_second"] * second["seconds"], 8)
