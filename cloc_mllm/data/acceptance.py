"""Refuses builds that lost too much, and training sets with nothing to learn."""

from __future__ import annotations

from collections.abc import Iterable

from cloc_mllm.data.drop_log import KINDS, DropLog
from cloc_mllm.data.reasons import NUMBERS_AS_WORDS
from cloc_mllm.data.records import Record


class RefusedBuildError(ValueError):
    """A build is refused: its source has nothing to learn, or it lost too much; nothing is kept."""


def refuse_lossy_build(num_records: int, drop_log: DropLog, max_drop_share: float) -> None:
    """Refuses a build that dropped more of any kind than allowed, or has no record.

    Items that were set aside do not count as a loss.
    """
    lost = [
        f"{drop_log.num_dropped(kind):,} {kind}s ({share:.1%})"
        for kind in KINDS
        if (share := drop_log.drop_share(kind)) > max_drop_share
    ]
    if lost:
        raise RefusedBuildError(
            f"{' and '.join(lost)} were dropped, at most {max_drop_share:.1%} may be; nothing was "
            "written. Mend the source, or allow it with a larger --max_drop_share (max_drop_share)"
        )
    if num_records == 0:
        raise RefusedBuildError("the source holds no record that can be used; nothing was written")


def refuse_no_regions(drop_log: DropLog) -> None:
    """Refuses a set without a region, unless it has captions and its source has no regions."""
    num_read = drop_log.num_dropped("region") + drop_log.num_set_aside("region")
    num_captions = drop_log.delivered["caption"]
    if drop_log.delivered["region"] or (num_captions and not num_read):
        return
    raise RefusedBuildError(
        f"none of {drop_log.delivered['record']:,} records has a region (the source states "
        f"{num_read:,}), and there are {num_captions:,} captions; nothing was written. Name the "
        "annotations, or allow it with --allow_no_regions (allow_no_regions)"
    )


def refuse_no_places(drop_log: DropLog, max_drop_share: float) -> None:
    """Refuses chats without a box where more of them than allowed have what looks like one."""
    num_words, num_chats = drop_log.notes[NUMBERS_AS_WORDS], drop_log.delivered["chat"]
    if num_words > max_drop_share * num_chats and not drop_log.delivered["place"]:
        raise RefusedBuildError(
            f"no box was read, while {num_words:,} groups of four numbers stayed words; nothing "
            "was written. Take the source and --frame that `cloc-mllm data doctor` names, write "
            "boxes as that source does, or allow it with --allow_no_regions (allow_no_regions)"
        )


def refuse_nothing_to_learn(
    records: Iterable[Record],
    *,
    learns_regions: bool,
    allow_no_regions: bool = False,
    allow_no_captions: bool = False,
) -> None:
    """Refuses a training set of stage 1 in which no record has what a loss learns from.

    Args:
        records: read up to where all of it was seen; their images are not looked at.
        learns_regions: off for plain CLIP, which learns captions alone.
        allow_no_regions: learns captions alone where no record has a region.
        allow_no_captions: learns regions alone where no record has a caption.

    Raises:
        ValueError: says how many records there are, and what they lack.
    """
    num_records = num_captions = num_regions = 0
    for record in records:
        num_records += 1
        num_captions += len(record.captions)
        num_regions += len(record.regions)
        if num_captions and (num_regions or not learns_regions):
            return
    has_regions = num_regions > 0 and learns_regions
    if (num_captions and allow_no_regions) or (has_regions and allow_no_captions):
        return
    lacks, option = "region or caption", ""
    if num_captions:
        lacks, option = "region", "captions alone with data.allow_no_regions"
    elif has_regions:
        lacks, option = "caption", "regions alone with data.allow_no_captions"
    elif not learns_regions:
        lacks = "caption"
    counts = f"{num_captions:,} captions, {num_regions:,} regions"
    advice = "look at it with `cloc-mllm data stats`, and build it with its annotations"
    raise ValueError(
        f"none of the {num_records:,} training records has a {lacks} ({counts}), so "
        f"{'its loss would learn nothing' if option else 'there is nothing to learn'}; {advice}"
        + (f", or train on {option}" if option else "")
    )
