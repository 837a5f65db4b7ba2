"""Short forms of `make faults`, on the real commands. Kills and damaged checkpoints are tried in
`tests/integration/test_stage1.py` and `tests/train/test_checkpoint.py`."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import faults
from faults import Bench, Row

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("faults"))
    yield bench
    bench.end()


@pytest.mark.parametrize(
    "group",
    [
        pytest.param(
            lambda bench: faults.signals(bench, ["deepspeed"], [signal.SIGHUP]), id="signal"
        ),
        pytest.param(lambda bench: faults.lost_ranks(bench, ["deepspeed"], ["dead"]), id="rank"),
        pytest.param(lambda bench: faults.disks(bench, ["stage1", "data"]), id="disks"),
        pytest.param(faults.same_directory, id="directory"),
        pytest.param(faults.spikes, id="spikes"),
    ],
)
def test_a_fault_is_borne(bench: Bench, group: Callable[[Bench], Iterator[Row]]) -> None:
    rows = list(group(bench))
    assert rows
    if not any(row.times for row in rows):
        pytest.skip(rows[0].outcome)
    assert [faults.line_of(row) for row in rows if row.failed] == []


@pytest.mark.parametrize(
    ("group", "names"),
    [
        pytest.param(
            faults.serve,
            [
                "4 bodies of 19.5 MB: boxes",
                "4 bodies of 19.5 MB: escaped base64",
                "numbers and boxes out of bounds",
            ],
            id="serve",
        ),
        pytest.param(
            faults.demo,
            [
                "4 bodies of 20 MB",
                "4 pictures of 400 megapixels",
                "addresses",
                "files of the machine",
                "markup in a phrase",
                "100,000 characters",
                "boxes of NaN",
            ],
            id="demo",
        ),
    ],
)
def test_abuse_is_borne(bench: Bench, group: Callable[..., Iterator[Row]], names: list) -> None:
    rows = list(group(bench, names, health_bar_s=math.inf))  # other tests keep the machine busy
    assert [faults.line_of(row) for row in rows if row.failed] == []


def test_a_process_that_is_left_is_found_and_ended(tmp_path: Path) -> None:
    job = faults.Job(["sh", "-c", "sleep 600 & exec sleep 600"], tmp_path / "log")
    while len(job.members()) < 2:
        pass
    job.process.terminate()
    assert job.seconds_to_end(1)[1] == 1
    assert job.members() == []
