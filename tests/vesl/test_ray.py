"""Ray Data gives the records of one process; nobody waits for workers that have no room."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("ray")

from cloc_mllm.data.parquet import load_records
from cloc_mllm.data.records import Record
from cloc_mllm.vesl.config import LabelConfig
from cloc_mllm.vesl.job import label_images
from cloc_mllm.vesl.ray_job import plan_workers
from tests.vesl.test_labelling import save_photos

GPU_MACHINE = {"CPU": 16.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("wanted", "resources", "num_shards", "expected"),
    [
        (0, {"CPU": 8.0}, 100, (8, 0)),
        (0, {"CPU": 8.0}, 3, (3, 0)),
        (2, {"CPU": 8.0}, 100, (2, 0)),
        (0, GPU_MACHINE, 100, (4, 1)),
        (3, GPU_MACHINE, 100, (3, 1)),
    ],
)
def test_one_worker_a_gpu_or_a_core(
    wanted: int, resources: dict[str, float], num_shards: int, expected: tuple[int, int]
) -> None:
    assert plan_workers(wanted, resources, num_shards) == expected


@pytest.mark.parametrize(
    ("wanted", "resources", "room"), [(9, {"CPU": 8.0}, "8 cores"), (5, GPU_MACHINE, "4 GPUs")]
)
def test_more_workers_than_there_is_room_for(
    wanted: int, resources: dict[str, float], room: str
) -> None:
    with pytest.raises(ValueError, match=f"num_workers is {wanted}, but there are {room}"):
        plan_workers(wanted, resources, 100)


def test_ray_gives_the_records_of_one_process(tmp_path: Path, tiny_scenes: list[Record]) -> None:
    photos = save_photos(tmp_path / "photos", tiny_scenes[:4])
    (photos / "broken.jpg").write_bytes(b"<html>")
    config = LabelConfig(
        images=str(photos),
        detector_model="scenes",
        shard_size=2,
        max_drop_share=0.5,
        num_workers=1,
    )
    labels = {}
    for executor in ("ray", "inline"):
        out = tmp_path / executor
        result = label_images(replace(config, executor=executor, output_dir=str(out)))
        assert (result.num_images, result.num_dropped, result.num_now) == (5, 1, 5)
        labels[executor] = list(load_records(out, verify=True))
    assert labels["ray"] == labels["inline"]
    assert sum(len(record.regions) for record in labels["ray"]) > 4


def test_a_worker_that_cannot_start_says_why(tmp_path: Path, tiny_scenes: list[Record]) -> None:
    photos = save_photos(tmp_path / "photos", tiny_scenes[:1])
    (tmp_path / "empty").mkdir()
    config = LabelConfig(
        images=str(photos), detector_model=str(tmp_path / "empty"), output_dir=str(tmp_path / "out")
    )
    with pytest.raises(ValueError, match=r"a worker failed: .*empty is no CLOC model directory"):
        label_images(config)
