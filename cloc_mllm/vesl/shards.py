"""Keeps a labelling run on disk: what is done, what is left, and when it is whole.

The run works in `.NAME.partial` beside the directory it makes. A shard is done once its summary,
`shard-00000.json`, is there: it is written last, in one step, and names the sha256 of
`shard-00000.parquet`. So a run may be killed at any moment: the next one keeps the shards that are
done and makes the others anew, and each image is labelled in exactly one of them.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloc_mllm.data.acceptance import RefusedBuildError
from cloc_mllm.data.drop_log import Drop, DropLog, write_drops
from cloc_mllm.data.parquet import DROPS_NAME, seal_data_set, write_shard
from cloc_mllm.data.storage import sha256_of
from cloc_mllm.vesl.pipeline import Labelled

TEMPORARY = ".writing-"  # prefix of half-written files, which a killed run may leave
_PLAN_NAME = "plan.json"


@dataclass(frozen=True)
class Shard:
    """Images `start` to before `stop` of the source, which become one file."""

    index: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"shard-{self.index:05d}"


@dataclass
class Summary:
    """The account of the images of one shard.

    Attributes:
        file: entry of the manifest; empty if no image could be used.
        ids: ids of the records, in the file's order.
        dropped: what `validate_record` refused, as the fields of `Drop`.
        notes: number of other things that it did, such as converting images.
        boxes: number of the detector's boxes by what became of them.
        phrases: number of queries that got a box (`kept`), and of the others by reason.
        words: number of regions by the number of words of their phrase.
        queries_per_image, boxes_per_image: number of images by how many queries or boxes they have.
    """

    index: int
    start: int
    stop: int
    file: dict[str, Any] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    dropped: list[list[str]] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    boxes: dict[str, int] = field(default_factory=dict)
    phrases: dict[str, int] = field(default_factory=dict)
    words: dict[str, int] = field(default_factory=dict)
    queries_per_image: dict[str, int] = field(default_factory=dict)
    boxes_per_image: dict[str, int] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        return self.stop - self.start

    @property
    def num_dropped(self) -> int:
        """Number of images that cannot be used."""
        return sum(kind == "record" for kind, *_ in self.dropped)

    @property
    def num_regions(self) -> int:
        return sum(self.words.values())


def cut(num_images: int, shard_size: int) -> list[Shard]:
    starts = range(0, num_images, shard_size)
    return [Shard(i, a, min(a + shard_size, num_images)) for i, a in enumerate(starts)]


def partial_directory(output_dir: Path) -> Path:
    return output_dir.with_name(f".{output_dir.name}.partial")


def check_plan(partial: Path, plan: dict[str, Any]) -> None:
    """Writes down the plan of a new run, or checks that it equals that of an unfinished one.

    Raises:
        ValueError: the unfinished run has other images or settings; names the difference.
    """
    path = partial / _PLAN_NAME
    if not path.exists():
        write_durably(path, json.dumps(plan, indent=2))
        return
    begun = json.loads(path.read_text(encoding="utf-8"))
    different = [
        f"{key} was {begun.get(key)!r}, is {plan.get(key)!r}"
        for key in sorted(begun.keys() | plan.keys())
        if begun.get(key) != plan.get(key)
    ]
    if different:
        raise ValueError(
            f"an unfinished run in {partial} differs: {'; '.join(different)}. Finish it with its "
            "own settings, name another --output_dir, or remove that directory"
        )


def done_summary(partial: Path, shard: Shard) -> Summary | None:
    """Reads the summary of a shard that is whole on disk; None if it has to be made."""
    path = partial / f"{shard.name}.json"
    if not path.is_file():
        return None
    summary = Summary(**json.loads(path.read_text(encoding="utf-8")))
    data = partial / f"{shard.name}.parquet"
    if summary.file and (not data.is_file() or sha256_of(data) != summary.file["sha256"]):
        return None
    return summary


def write_shard_files(
    partial: Path, shard: Shard, labelled: Sequence[Labelled], drop_log: DropLog
) -> Summary:
    """Writes the records, the log of phrases and at last the summary, which marks it as done."""
    summary = Summary(shard.index, shard.start, shard.stop)
    summary.dropped = [list(drop) for drop in drop_log.drops]
    summary.notes = dict(drop_log.notes)
    if labelled:
        temporary = partial / f"{TEMPORARY}{shard.name}.{os.getpid()}"
        entry = write_shard([item.record for item in labelled], temporary)
        _replace(temporary, partial / f"{shard.name}.parquet")
        summary.file = {**entry, "name": f"{shard.name}.parquet"}
    log = "".join(f"{json.dumps(row)}\n" for row in _phrase_rows(labelled))
    write_durably(partial / f"{shard.name}.phrases.jsonl", log)
    _count(summary, labelled)
    write_durably(partial / f"{shard.name}.json", json.dumps(vars(summary)))
    return summary


def _phrase_rows(labelled: Sequence[Labelled]) -> Iterator[dict[str, str]]:
    for item in labelled:
        for phrase, reason in item.dropped:
            yield {"id": item.record.id, "phrase": phrase, "reason": reason}


def _count(summary: Summary, labelled: Sequence[Labelled]) -> None:
    boxes: Counter[str] = Counter()
    phrases: Counter[str] = Counter()
    words: Counter[str] = Counter()
    for item in labelled:
        regions = item.record.regions
        carried = {region.phrase for region in regions}
        boxes += item.boxes
        phrases["kept"] += len(carried)
        phrases.update(reason for _, reason in item.dropped)
        words.update(str(len(region.phrase.split())) for region in regions)
    summary.ids = [item.record.id for item in labelled]
    summary.boxes, summary.phrases, summary.words = dict(boxes), dict(phrases), dict(words)
    per_image = Counter(str(item.num_queries) for item in labelled)
    summary.queries_per_image = dict(per_image)
    summary.boxes_per_image = dict(Counter(str(len(item.record.regions)) for item in labelled))


def finish(
    partial: Path,
    output_dir: Path,
    summaries: Sequence[Summary],
    arguments: dict[str, Any],
    notes: dict[str, int],
) -> None:
    """Writes manifest and drops and gives the directory its final name.

    Raises:
        RefusedBuildError: more images are unusable than allowed; the shards stay.
    """
    dropped = [Drop(*entry) for summary in summaries for entry in summary.dropped]  # type: ignore[arg-type]
    num_images = sum(summary.num_images for summary in summaries)
    num_dropped = sum(summary.num_dropped for summary in summaries)
    ids = [record_id for summary in summaries for record_id in summary.ids]
    assert len(ids) + num_dropped == num_images, "an image is neither labelled nor dropped"
    max_drop_share = arguments["max_drop_share"]
    if not ids or num_dropped > max_drop_share * num_images:
        unusable = [drop for drop in dropped if drop.kind == "record"]
        first = {drop.reason: drop for drop in reversed(unusable)}
        listed = "; ".join(
            f"{count:,} {reason}, first {first[reason].item!r}: {first[reason].found}"
            for reason, count in Counter(drop.reason for drop in unusable).most_common()
        )
        raise RefusedBuildError(
            f"{num_dropped:,} of {num_images:,} images cannot be used ({listed}), at most "
            f"{max_drop_share:.1%} may be. Allow it with a larger --max_drop_share; what is "
            f"labelled waits in {partial}"
        )
    write_drops(dropped, partial / DROPS_NAME)
    counts: dict[str, dict[str, int]] = {}
    for drop in dropped:
        kind_counts = counts.setdefault(drop.kind, {})
        kind_counts[drop.reason] = kind_counts.get(drop.reason, 0) + 1
    contents = {
        "arguments": arguments,
        "dropped": counts,
        "notes": notes,
        "files": [summary.file for summary in summaries if summary.file],
    }
    seal_data_set(partial, output_dir, contents)


def sum_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(total)


def write_durably(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all, even after a power cut."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    _replace(temporary, path)


def _replace(temporary: Path, path: Path) -> None:
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)
