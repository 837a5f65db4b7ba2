from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from ratio import (
    Ratio,
    Samples,
    interleaved_ratio,
    machine_state,
    report,
    save_samples,
)


def test_order_is_abba_after_the_warmups() -> None:
    calls: list[str] = []
    ratio = interleaved_ratio(
        lambda: calls.append("a"), lambda: calls.append("b"), pairs=3, warmups=1
    )
    assert "".join(calls) == "ab" + "abbaab"
    assert len(ratio.wall.ours) == len(ratio.cpu.theirs) == 3


def test_sleep_counts_as_wall_and_not_as_cpu_time() -> None:
    ratio = interleaved_ratio(
        lambda: time.sleep(0.06), lambda: time.sleep(0.02), pairs=3, warmups=0
    )
    assert 1.5 < ratio.wall.median < 6  # 3 on a quiet machine
    assert max(ratio.cpu.ours) < 0.02


def test_median_is_of_the_ratios_of_the_pairs() -> None:
    samples = Samples([1.0, 8.0, 3.0], [2.0, 2.0, 3.0])
    ratio = Ratio(wall=samples, cpu=samples)
    assert ratio.wall.median == 1.0 and ratio.wall.spread == (0.5, 4.0)
    assert report("x", ratio).startswith("x: wall 1.00 (0.50-4.00; 3.000 s / 2.000 s), cpu 1.00")


def test_samples_and_machine_are_written(tmp_path: Path) -> None:
    ratio = Ratio(Samples([1.0], [2.0]), Samples([1.0], [4.0]))
    path = tmp_path / "new" / "out.json"
    save_samples(path, machine_state(), {"loss": ratio, "memory": {"mib": 3}})
    written = json.loads(path.read_text())
    assert written["results"]["loss"]["cpu"] == {"ours": [1.0], "theirs": [4.0]}
    assert written["results"]["memory"] == {"mib": 3}
    assert written["machine"]["threads"] >= 1


def test_noisy_is_a_load_above_one_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (0.6, 0.0, 0.0))
    assert machine_state()["noisy"]
