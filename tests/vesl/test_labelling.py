"""`cloc-mllm label` end to end: a folder of scenes with captions, CLOC that ships, one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("spacy")

from filelock import FileLock

from cloc_mllm import cli
from cloc_mllm.data.acceptance import RefusedBuildError
from cloc_mllm.data.parquet import load_records, read_manifest
from cloc_mllm.data.records import Record
from cloc_mllm.data.storage import sha256_of
from cloc_mllm.vesl import job
from cloc_mllm.vesl.config import LabelConfig
from cloc_mllm.vesl.job import LabelResult, label_images
from cloc_mllm.vesl.worker import ShardContent, ShardDone, ShardLabeller
from self_training import label_quality


def save_photos(directory: Path, records: Sequence[Record]) -> Path:
    """A folder of photos, each with its captions beside it."""
    directory.mkdir()
    for record in records:
        (directory / f"{record.id}.png").write_bytes(record.image)
        (directory / f"{record.id}.txt").write_text("\n".join(record.captions))
    return directory


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, tiny_scenes: list[Record]) -> Path:
    return save_photos(tmp_path_factory.mktemp("photos") / "photos", tiny_scenes[:8])


@pytest.fixture(scope="module")
def config(photos: Path) -> LabelConfig:
    return LabelConfig(
        images=str(photos),
        detector_model="scenes",
        executor="inline",
        shard_size=3,
        phrase_form="name",
        num_examples=2,
    )


@pytest.fixture(scope="module")
def labels(
    config: LabelConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, LabelResult]:
    out = tmp_path_factory.mktemp("labels") / "labels"
    return out, label_images(replace(config, output_dir=str(out)))


def test_every_image_is_a_record_with_true_boxes(
    labels: tuple[Path, LabelResult], photos: Path, tiny_scenes: list[Record]
) -> None:
    out, result = labels
    records = list(load_records(out, verify=True))
    assert [record.id for record in records] == sorted(path.name for path in photos.glob("*.png"))
    assert {record.source for record in records} == {"photos+vesl"}
    assert (result.num_images, result.num_dropped, result.num_now) == (8, 0, 8)
    assert result.num_regions == sum(len(record.regions) for record in records)
    true = [replace(record, id=f"{record.id}.png") for record in tiny_scenes[:8]]
    quality = label_quality(records, true)
    assert quality.precision > 0.5, quality
    assert quality.recall > 0.4, quality
    assert {record.id: record.image for record in records} == {r.id: r.image for r in true}


def test_manifest_and_summaries_account_for_files_and_ids(
    labels: tuple[Path, LabelResult],
) -> None:
    out, _ = labels
    manifest = read_manifest(out)
    assert [file["rows"] for file in manifest["files"]] == [3, 3, 2]
    assert manifest["arguments"]["threshold"] == 0.1
    for file in manifest["files"]:
        data = out / file["name"]
        assert file["sha256"] == sha256_of(data)
        assert file["bytes"] == data.stat().st_size
        summary = json.loads(data.with_suffix(".json").read_text())
        assert summary["ids"] == [record.id for record in load_records(data)]
        assert summary["file"] == file
    assert cli.main(["data", "validate", str(out)]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["labels"], "nothing is left over"


def test_every_phrase_has_a_box_or_a_reason(labels: tuple[Path, LabelResult]) -> None:
    out, _ = labels
    rows = [json.loads(line) for path in out.glob("*.jsonl") for line in path.open() if "{" in line]
    reasons = Counter(row["reason"] for row in rows)
    assert reasons["duplicate"] > 0
    counted: Counter[str] = Counter()
    for path in sorted(out.glob("shard-*.json")):
        summary = json.loads(path.read_text())
        counted.update(summary["phrases"])
        assert sum(summary["boxes_per_image"].values()) == len(summary["ids"])
    assert counted.pop("kept") > 0
    assert counted == reasons


def test_the_report_shows_counts_and_pictures(labels: tuple[Path, LabelResult]) -> None:
    out, result = labels
    page = (out / "report.html").read_text()
    assert f"<b>{result.num_regions}</b><small>boxes</small>" in page
    assert page.count("<figure>") == 2
    assert "the paper has 11.6" in page and "the paper has 2.1" in page


def _stop_at(monkeypatch: pytest.MonkeyPatch, stop: int | None) -> list[int]:
    """The shards that are labelled from now on; the run stops before number `stop` of them."""
    begun: list[int] = []
    label = ShardLabeller.__call__

    def call(self: ShardLabeller, content: ShardContent) -> ShardDone:
        if len(begun) == stop:
            raise KeyboardInterrupt
        begun.append(content.shard.index)
        return label(self, content)

    monkeypatch.setattr(ShardLabeller, "__call__", call)
    return begun


def _labels(directory: Path) -> list[tuple[str, list[Any]]]:
    return [(record.id, record.regions) for record in load_records(directory)]


def test_a_stopped_run_goes_on_and_gives_the_same(
    config: LabelConfig,
    labels: tuple[Path, LabelResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(config, output_dir=str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        begun = _stop_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            label_images(config)
    assert begun == [0, 1]
    partial = tmp_path / ".out.partial"
    damaged = partial / "shard-00001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")  # bit rot in what was done
    (partial / ".writing-shard-00002.123").write_bytes(b"half")
    begun = _stop_at(monkeypatch, None)
    result = label_images(config)
    assert begun == [1, 2]
    assert (result.num_images, result.num_now) == (8, 5)
    assert _labels(tmp_path / "out") == _labels(labels[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").glob(".*"))


def test_a_run_of_other_settings_does_not_mix_in(
    config: LabelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "ShardLabeller", stop)
    config = replace(config, output_dir=str(tmp_path / "out"))
    with pytest.raises(KeyboardInterrupt):
        label_images(config)
    with pytest.raises(ValueError, match=r"threshold was 0\.1, is 0\.3.*--output_dir"):
        label_images(replace(config, threshold=0.3))
    with FileLock(tmp_path / ".out.partial.lock"), pytest.raises(ValueError, match="another run"):
        label_images(config)
    with pytest.raises(KeyboardInterrupt):  # what does not change a label may differ
        label_images(replace(config, batch_size=2, num_examples=0, max_drop_share=0.5))


def test_photos_that_cannot_be_used(
    photos: Path, config: LabelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    good = sorted(photos.glob("*.png"))[0]
    (mixed / "good.png").write_bytes(good.read_bytes())
    (mixed / "cut.png").write_bytes(good.read_bytes()[:2000])
    (mixed / "page.jpg").write_bytes(b"<html>not here</html>")
    (mixed / "empty.jpg").touch()
    captions = tmp_path / "captions.jsonl"
    rows = [
        {"image": "good.png", "captions": ["a crab", "", "x" * 3000, "\ud800", 7]},
        {"image": "gone.jpg", "captions": ["a crab"]},
    ]
    captions.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = replace(
        config, images=str(mixed), captions=str(captions), output_dir=str(tmp_path / "out")
    )
    with pytest.raises(
        RefusedBuildError, match=r"3 of 4 images cannot be used \(.*, first '.*': .*max_drop_share"
    ):
        label_images(config)
    begun = _stop_at(monkeypatch, None)
    result = label_images(replace(config, max_drop_share=0.8))
    assert begun == [], "what was labelled is used"
    assert (result.num_images, result.num_dropped, result.num_now) == (4, 3, 0)
    assert result.notes == {
        "captioned images that are not there": 1,
        "photos that no row captions": 3,
    }
    assert result.examples["photos that no row captions"] == ["cut.png", "empty.jpg", "page.jpg"]
    (record,) = load_records(tmp_path / "out")
    assert (record.id, record.captions) == ("good.png", ["a crab"])
    drops = [json.loads(line) for line in (tmp_path / "out" / "drops.jsonl").open()]
    assert sorted((d["kind"], d["id"], d["reason"]) for d in drops) == [
        ("caption", "good.png", "bad_text"),
        ("caption", "good.png", "bad_text"),
        ("caption", "good.png", "empty_text"),
        ("caption", "good.png", "text_too_long"),
        ("record", "cut.png", "broken_image"),
        ("record", "empty.jpg", "missing_image"),
        ("record", "page.jpg", "not_an_image"),
    ]


def _without_captions(folder: Path) -> dict[str, Any]:
    for path in folder.glob("*.txt"):
        path.unlink()
    return {}


def _captions_file(text: str) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        path = folder.parent / "captions.jsonl"
        path.write_text(text)
        return {"captions": str(path)}

    return write


def _empty_folder(folder: Path) -> dict[str, Any]:
    (folder / "empty").mkdir()
    return {"images": str(folder / "empty")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: {"images": ""}, "nothing to label"),
        (lambda folder: {"images": str(folder / "nowhere")}, "no such folder or archive"),
        (_empty_folder, "holds no photo"),
        (_without_captions, "no image of .* has a caption.*--captioner"),
        (_captions_file("{"), r"captions.jsonl, line 1: expected .* got \{$"),
        (_captions_file('{"image": "a.png"}'), r"line 1: expected .* got {'image': 'a.png'}"),
        (_captions_file('{"image": "b.png", "captions": []}'), "its first is 'b.png'"),
        (lambda folder: {"output_dir": str(folder)}, "already exists"),
        (lambda _: {"detector_model": "nowhere"}, "nowhere is not the directory"),
        (lambda _: {"detector_size": 448}, "detector_size sets the input of owlv2"),
        (lambda _: {"threshold": 1.5}, "threshold must lie in"),
        (lambda _: {"max_drop_share": 5}, "max_drop_share must lie in 0..1, got 5"),
        (lambda _: {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (lambda _: {"shard_size": -1}, "shard_size must be at least 1"),
    ],
)
def test_input_that_cannot_be_used_is_refused_before_anything_is_written(
    change: Callable[[Path], dict[str, Any]],
    message: str,
    tiny_scenes: list[Record],
    tmp_path: Path,
) -> None:
    folder = save_photos(tmp_path / "folder", tiny_scenes[:1])
    settings = {"images": str(folder), "output_dir": str(tmp_path / "out")} | change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        label_images(LabelConfig(executor="inline", **settings))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_an_unknown_detector_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["label", "--images", "x", "--detector", "yolo"]) == 2
    assert "grounding_dino" in capsys.readouterr().err


def test_an_empty_set_of_estimates_for_a_run_with_nothing_to_do() -> None:
    assert LabelResult(8, 0, 20, 0, 0.1, {}).images_per_second == 0


def _start(photos: Path, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "cloc_mllm.cli", "label", "--images", str(photos), "--output_dir",
         str(out), "--executor", "inline", "--shard_size", "1", "--num_examples", "1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _kill_at(process: subprocess.Popen[bytes], partial: Path, num_done: int) -> dict[str, int]:
    """`kill -9` once so many shards are done: which were, and the inodes of their files."""
    while len(list(partial.glob("shard-*.json"))) < num_done:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = {path.stem for path in partial.glob("shard-*.json")}
    return {name: (partial / f"{name}.parquet").stat().st_ino for name in done}


def test_killed_twice_and_resumed_labels_each_image_once(
    tmp_path: Path, tiny_scenes: list[Record]
) -> None:
    scenes = [
        replace(record, id=f"{copy}-{record.id}") for copy in range(4) for record in tiny_scenes
    ]
    photos = save_photos(tmp_path / "photos", scenes)
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    first = _kill_at(_start(photos, out), partial, 3)
    second = _kill_at(_start(photos, out), partial, len(first) + 3)
    assert first.items() <= second.items(), "what was done is not done again"
    assert len(second) < len(scenes)
    assert _start(photos, out).wait() == 0
    assert {name: (out / f"{name}.parquet").stat().st_ino for name in second} == second
    ids = [record.id for record in load_records(out, verify=True)]
    assert ids == sorted(f"{record.id}.png" for record in scenes)
