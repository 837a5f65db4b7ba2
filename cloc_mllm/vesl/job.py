"""The labelling job: from a configuration to a data set with logs and a report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from cloc_mllm.config import LabelConfig
from cloc_mllm.data.storage import is_url
from cloc_mllm.vesl.report import write_report
from cloc_mllm.vesl.shards import (
    Shard,
    Summary,
    check_plan,
    cut,
    done_summary,
    finish,
    partial_directory,
)
from cloc_mllm.vesl.sources import open_source

# what may differ between an unfinished run and the one that goes on with it
_FREE = {
    "output_dir", "executor", "num_workers", "ray_address", "num_examples", "max_drop_share",
    "batch_size",
}  # fmt: skip


@dataclass(frozen=True)
class LabelResult:
    """How much was done: over all runs, in this one, and how long this one took."""

    num_images: int
    num_now: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        return self.num_now / self.seconds if self.seconds > 0 else 0.0


def label_images(config: LabelConfig) -> LabelResult:
    """Run the job, or go on with it where an earlier run of it was stopped.

    Raises:
        ValueError: settings or data that cannot be used, `output_dir` is taken, or another run is
            at work on it.
    """
    config = _resolved(config)
    output_dir = Path(config.output_dir)
    if output_dir.exists():
        raise ValueError(f"{output_dir} already exists; name another directory or remove it first")
    source = open_source(config.images, config.captions)
    num_images = min(config.limit or len(source), len(source))
    partial = partial_directory(output_dir)
    partial.mkdir(parents=True, exist_ok=True)
    lock = partial.with_name(f"{partial.name}.lock")  # beside what is renamed in the end
    try:
        with FileLock(lock, timeout=0):
            check_plan(partial, {**_plan(config), "source_fingerprint": source.fingerprint()})
            result = _label(config, partial, cut(num_images, config.shard_size))
            _finish(config, partial, output_dir, cut(num_images, config.shard_size), result)
    except Timeout as error:
        raise ValueError(f"another run is at work on {output_dir}; wait for it") from error
    lock.unlink(missing_ok=True)
    return result


def _resolved(config: LabelConfig) -> LabelConfig:
    """Paths that mean the same to every worker."""

    def absolute(place: str) -> str:
        exists = place and not is_url(place) and Path(place).exists()
        return str(Path(place).resolve()) if exists else place

    return replace(
        config,
        images=absolute(config.images),
        captions=absolute(config.captions),
        captioner=absolute(config.captioner),
        detector_model=absolute(config.detector_model),
        output_dir=str(Path(config.output_dir).resolve()),
    )


def _plan(config: LabelConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name not in _FREE}


def _label(config: LabelConfig, partial: Path, shards: Sequence[Shard]) -> LabelResult:
    for left_over in partial.glob(".shard-*"):  # half written when an earlier run was killed
        left_over.unlink()
    todo = [shard for shard in shards if done_summary(partial, shard) is None]
    num_images = sum(shard.stop - shard.start for shard in shards)
    num_todo = sum(shard.stop - shard.start for shard in todo)
    started = time.monotonic()
    with tqdm(
        total=num_images, initial=num_images - num_todo, desc="labelling", unit=" images"
    ) as bar:
        for row in _run(config, partial, todo):
            bar.update(int(row["num_images"]))
    return LabelResult(num_images, num_todo, time.monotonic() - started)


def _run(config: LabelConfig, partial: Path, todo: Sequence[Shard]) -> Iterator[dict[str, Any]]:
    if not todo:
        return
    if config.executor == "ray":
        from cloc_mllm.vesl.ray_job import label_with_ray

        yield from label_with_ray(config, partial, todo)
        return
    from cloc_mllm.vesl.worker import ShardLabeller, read_shard

    label = ShardLabeller(config, str(partial))
    for shard in todo:
        yield label(read_shard(asdict(shard), config.images, config.captions))


def _finish(
    config: LabelConfig,
    partial: Path,
    output_dir: Path,
    shards: Sequence[Shard],
    result: LabelResult,
) -> None:
    found = [done_summary(partial, shard) for shard in shards]
    summaries: list[Summary] = [summary for summary in found if summary is not None]
    if len(summaries) < len(shards):
        raise ValueError(
            f"{len(shards) - len(summaries)} of {len(shards)} shards in {partial} are missing or "
            "differ from their sha256; run the same command again"
        )
    write_report(partial / "report.html", partial, summaries, config, result.images_per_second)
    finish(partial, output_dir, summaries, asdict(config), config.max_drop_share)
