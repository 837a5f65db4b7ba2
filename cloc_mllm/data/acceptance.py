"""Which builds are refused: losing what people care about is never success."""

from __future__ import annotations

from cloc_mllm.data.drop_log import KINDS, DropLog


class RefusedBuildError(ValueError):
    """A build whose source gave nothing to learn, or lost more than it may; nothing is kept."""


def refuse_lossy_build(num_records: int, drop_log: DropLog, max_drop_share: float) -> None:
    """Refuses a build that dropped more of any kind than allowed, or has no record.

    What was set aside is no loss.
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
    """Refuses a set without a region, unless it is one of captions: then no region was read."""
    num_read = drop_log.num_dropped("region") + drop_log.num_set_aside("region")
    num_captions = drop_log.delivered["caption"]
    if drop_log.delivered["region"] or (num_captions and not num_read):
        return
    raise RefusedBuildError(
        f"none of {drop_log.delivered['record']:,} records has a region (the source states "
        f"{num_read:,}), and there are {num_captions:,} captions; nothing was written. Name the "
        "annotations, or allow it with --allow_no_regions (allow_no_regions)"
    )
