"""The labelling job: from a configuration to a data set with logs and a report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from cloc_mllm.data.storage import is_url
from cloc_mllm.shipped import SHIPPED_MODELS, find_model
from cloc_mllm.vesl.config import LabelConfig
from cloc_mllm.vesl.pipeline import Selection
from cloc_mllm.vesl.report import write_report
from cloc_mllm.vesl.shards import (
    TEMPORARY,
    Shard,
    Summary,
    check_plan,
    cut,
    done_summary,
    finish,
    partial_directory,
    sum_counts,
)
from cloc_mllm.vesl.sources import Source, open_source
from cloc_mllm.vesl.worker import ShardDone, ShardLabeller, read_shard

# settings that may differ between an unfinished run and the one that goes on with it
_FREE = {
    "output_dir", "executor", "num_workers", "ray_address", "num_examples", "max_drop_share",
    "batch_size",
}  # fmt: skip


_LEAST = {
    "detector_size": 0, "max_queries": 1, "limit": 0, "shard_size": 1, "batch_size": 1,
    "num_workers": 0, "num_examples": 0,
}  # fmt: skip


@dataclass(frozen=True)
class LabelResult:
    """Counts of a finished labelling job.

    Attributes:
        num_images: images of all runs of the job; `num_dropped` of them cannot be used.
        num_regions: regions that the other images got.
        num_now: images labelled in this run.
        seconds: duration of this run, without the loading of the models.
        notes: number of items of each sort that were not labelled, or were converted.
        examples: the first few names of some notes.
        phrases: number of phrases that got a box (`kept`), and of the others by reason.
    """

    num_images: int
    num_dropped: int
    num_regions: int
    num_now: int
    seconds: float
    notes: dict[str, int]
    examples: dict[str, list[str]] = field(default_factory=dict)
    phrases: dict[str, int] = field(default_factory=dict)

    @property
    def images_per_second(self) -> float:
        return self.num_now / self.seconds if self.num_now else 0.0


def label_images(config: LabelConfig) -> LabelResult:
    """Runs the job, or goes on with it where an earlier run was stopped.

    Raises:
        FileNotFoundError: a name leads to no images or no model.
        RefusedBuildError: more images are unusable than allowed; what is labelled stays.
        ValueError: settings or data cannot be used, `output_dir` is taken, or another run is at
            work on it.
    """
    config = _resolved(config)
    _check(config)
    output_dir = Path(config.output_dir)
    if output_dir.exists():
        raise ValueError(f"{output_dir} already exists; name another directory or remove it first")
    source = open_source(config.images, config.captions, config.encoding)
    if not config.captioner and not source.has_captions():
        raise ValueError(
            f"no image of {config.images} has a caption, so there is nothing to look for: put "
            "NAME.txt beside each photo, or name a file with --captions or a model with --captioner"
        )
    partial = partial_directory(output_dir)
    partial.mkdir(parents=True, exist_ok=True)
    lock = partial.with_name(f"{partial.name}.lock")  # not in the folder that is renamed
    try:
        with FileLock(lock, timeout=0):
            check_plan(partial, {**_plan(config), "source_fingerprint": source.fingerprint()})
            result = _label(config, partial, source)
    except Timeout as error:
        raise ValueError(f"another run is at work on {output_dir}; wait for it") from error
    lock.unlink(missing_ok=True)
    return result


def _resolved(config: LabelConfig) -> LabelConfig:
    """Makes paths absolute, so that they mean the same to every worker."""

    def absolute(place: str) -> str:
        exists = place and not is_url(place) and Path(place).exists()
        return str(Path(place).resolve()) if exists else place

    detector = config.detector_model
    return replace(
        config,
        images=absolute(config.images),
        captions=absolute(config.captions),
        captioner=absolute(config.captioner),
        detector_model=detector if detector in SHIPPED_MODELS else absolute(detector),
        output_dir=str(Path(config.output_dir).resolve()),
    )


def _check(config: LabelConfig) -> None:
    """Refuses at once what the workers would refuse only after they have started."""
    for name, least in _LEAST.items():
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}")
    if not 0 <= config.max_drop_share <= 1:
        raise ValueError(f"max_drop_share must lie in 0..1, got {config.max_drop_share}")
    Selection(config.threshold, config.nms_iou)
    if config.detector_size and config.detector != "owlv2":
        raise ValueError(
            f"detector_size sets the input of owlv2 alone, got {config.detector_size} for "
            f"{config.detector}; leave it out"
        )
    model = config.detector_model
    if config.detector == "cloc" and not find_model("cloc", model).is_dir():
        raise FileNotFoundError(f"detector_model {model} is not the directory of a CLOC")


def _plan(config: LabelConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name not in _FREE}


def _label(config: LabelConfig, partial: Path, source: Source) -> LabelResult:
    for left_over in partial.glob(f"{TEMPORARY}*"):  # half written when an earlier run was killed
        left_over.unlink()
    num_images = min(config.limit or len(source), len(source))
    shards = cut(num_images, config.shard_size)
    todo = [shard for shard in shards if done_summary(partial, shard) is None]
    num_now = sum(shard.stop - shard.start for shard in todo)
    started = time.monotonic()
    with tqdm(
        total=num_images, initial=num_images - num_now, desc="labelling", unit=" images"
    ) as bar:
        for number, done in enumerate(_run(config, partial, source, todo)):
            if number == 0:  # the time before it went into loading the models
                started = max(started, time.monotonic() - done.seconds)
            bar.update(done.num_images)
    seconds = time.monotonic() - started
    summaries = _summaries(partial, shards)
    result = LabelResult(
        num_images=num_images,
        num_dropped=sum(summary.num_dropped for summary in summaries),
        num_regions=sum(summary.num_regions for summary in summaries),
        num_now=num_now,
        seconds=seconds,
        notes=sum_counts([source.notes, *(summary.notes for summary in summaries)]),
        examples=source.examples,
        phrases=sum_counts(summary.phrases for summary in summaries),
    )
    write_report(partial / "report.html", partial, summaries, config, result.images_per_second)
    finish(partial, Path(config.output_dir), summaries, asdict(config), result.notes)
    return result


def _run(
    config: LabelConfig, partial: Path, source: Source, todo: Sequence[Shard]
) -> Iterator[ShardDone]:
    if not todo:
        return
    if config.executor == "ray":
        from cloc_mllm.vesl.ray_job import label_with_ray

        yield from label_with_ray(config, partial, todo)
        return
    label = ShardLabeller(config, partial)
    for shard in todo:
        yield label(read_shard(shard, source))


def _summaries(partial: Path, shards: Sequence[Shard]) -> list[Summary]:
    found = [done_summary(partial, shard) for shard in shards]
    summaries = [summary for summary in found if summary is not None]
    if len(summaries) < len(shards):
        raise ValueError(
            f"{len(shards) - len(summaries)} of {len(shards)} shards in {partial} are missing or "
            "differ from their sha256; run the same command again"
        )
    return summaries
