"""Records to WebDataset tars in GRIT's layout: `KEY.jpg`, `KEY.txt` and `KEY.json` a sample."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.data.records import Record, Region
from cloc_mllm.data.storage import new_directory
from cloc_mllm.data.writers import image_suffix, safe_name


def write_webdataset(
    records: Iterable[Record], directory: str | Path, *, shard_size: int = 1000
) -> Counter[str]:
    """`00000.tar ...` of `shard_size` samples each.

    The text of a sample is its first caption, which is what open_clip's loader trains on. The JSON
    holds the record whole (`captions`, `regions`: boxes xyxy in 0..1 of the original image), and
    as GRIT's `noun_chunks` and `ref_exps` what stands in its first caption word for word.

    Returns:
        counts of what was written.
    """
    counts: Counter[str] = Counter()
    stream = iter(records)
    with new_directory(directory) as folder:
        for number in itertools.count():
            shard = list(itertools.islice(stream, shard_size))
            if not shard:
                break
            with tarfile.open(folder / f"{number:05d}.tar", "w") as archive:
                for name, data in itertools.chain.from_iterable(map(_members, shard)):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
            counts["records"] += len(shard)
            counts["regions"] += sum(len(record.regions) for record in shard)
            counts["captions"] += sum(len(record.captions) for record in shard)
    return counts


def _members(record: Record) -> Iterator[tuple[str, bytes]]:
    key = safe_name(record.id)
    yield f"{key}.{image_suffix(record.image)}", record.image
    caption = record.captions[0] if record.captions else ""
    if record.captions:
        yield f"{key}.txt", caption.encode()
    yield f"{key}.json", json.dumps(_row(record, key, caption)).encode()


def _row(record: Record, key: str, caption: str) -> dict[str, Any]:
    phrases = ((region, region.phrase) for region in record.regions)
    expressions = ((region, text) for region in record.regions for text in region.expressions)
    return {
        "key": key,
        "id": record.id,
        "caption": caption,
        "width": record.width,
        "height": record.height,
        "noun_chunks": _spans(phrases, caption),
        "ref_exps": _spans(expressions, caption),
        "captions": record.captions,
        "regions": [region.stored() for region in record.regions],
        "source": record.source,
    }


def _spans(texts: Iterable[tuple[Region, str]], caption: str) -> list[list[float]]:
    """GRIT's `[start, end, x1, y1, x2, y2, score]` of the texts that the caption holds."""
    spans = []
    for region, text in texts:
        start = caption.find(text)
        if start >= 0:
            spans.append([start, start + len(text), *region.box, region.score])
    return spans
