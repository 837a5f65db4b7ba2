"""Which builds and training sets are refused."""

from __future__ import annotations

from typing import Any

import pytest

from cloc_mllm.data.acceptance import (
    RefusedBuildError,
    refuse_lossy_build,
    refuse_no_regions,
    refuse_nothing_to_learn,
)
from cloc_mllm.data.drop_log import KINDS, DropLog
from cloc_mllm.data.records import Record, Region


def log_of(delivered: dict[Any, int], dropped: dict[Any, int], aside: dict[Any, int]) -> DropLog:
    log = DropLog()
    log.delivered.update(delivered)
    for kind, count in dropped.items():
        log.add(kind, "x", "not_finite", count=count)
    for kind, count in aside.items():
        log.put_aside(kind, "crowd", count)
    return log


@pytest.mark.parametrize("kind", KINDS)
def test_the_share_holds_for_every_kind(kind: str) -> None:
    log = log_of({"record": 100, kind: 95}, {kind: 5}, {kind: 1000})
    refuse_lossy_build(100, log, 0.06)
    with pytest.raises(RefusedBuildError, match=rf"5 {kind}s .* at most 4.0%"):
        refuse_lossy_build(100, log, 0.04)
    log = log_of({"record": 100}, {kind: 1}, {})
    with pytest.raises(RefusedBuildError, match=rf"1 {kind}s"):
        refuse_lossy_build(100, log, 0.0)


def test_all_kinds_over_the_limit_are_named() -> None:
    log = log_of({"record": 9, "region": 1}, {"record": 1, "region": 9}, {})
    with pytest.raises(RefusedBuildError, match=r"1 records \(10.0%\) and 9 regions \(90.0%\)"):
        refuse_lossy_build(9, log, 0.05)


@pytest.mark.parametrize(
    ("delivered", "dropped", "aside", "is_refused"),
    [
        pytest.param({"region": 1}, {"region": 9}, {}, False, id="a_region"),
        pytest.param({"caption": 9}, {}, {}, False, id="captions_alone"),
        pytest.param({"caption": 9}, {"region": 1}, {}, True, id="captions_and_lost_regions"),
        pytest.param({"caption": 9}, {}, {"region": 1}, True, id="captions_and_crowds"),
        pytest.param({}, {}, {}, True, id="pictures_alone"),
        pytest.param({}, {"region": 9}, {}, True, id="lost_regions"),
    ],
)
def test_a_set_without_regions(
    delivered: dict[str, int], dropped: dict[str, int], aside: dict[str, int], is_refused: bool
) -> None:
    log = log_of({"record": 9, **delivered}, dropped, aside)
    if not is_refused:
        refuse_no_regions(log)
        return
    with pytest.raises(
        RefusedBuildError, match=r"none of 9 records has a region .*allow_no_regions"
    ):
        refuse_no_regions(log)


def record(num_captions: int, num_regions: int) -> Record:
    regions = [Region((0.0, 0.0, 1.0, 1.0), "cat")] * num_regions
    return Record("a", b"", 9, 9, ["a cat"] * num_captions, regions, "test")


BARE, CAPTIONED, BOXED = record(0, 0), record(2, 0), record(0, 1)


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([BARE, CAPTIONED, BOXED], {}, ""),
        ([CAPTIONED, CAPTIONED], {}, "2 training records has a region .4 captions, 0 regions"),
        ([CAPTIONED, CAPTIONED], {"allow_no_regions": True}, ""),
        ([CAPTIONED], {"allow_no_captions": True}, "has a region .*data.allow_no_regions"),
        ([BOXED, BOXED], {}, "2 training records has a caption .0 captions, 2 regions"),
        ([BOXED, BOXED], {"allow_no_captions": True}, ""),
        ([BOXED], {"allow_no_regions": True}, "has a caption .*data.allow_no_captions"),
        ([BARE, BARE], {"allow_no_regions": True}, "has a region or caption .0 captions"),
        ([BARE], {"allow_no_captions": True}, "has a region or caption"),
        ([BOXED], {"learns_regions": False}, "has a caption .*nothing to learn"),
        ([BOXED], {"learns_regions": False, "allow_no_captions": True}, "has a caption"),
        ([BOXED, CAPTIONED], {"learns_regions": False}, ""),
        ([], {}, "none of the 0 training records"),
    ],
)
def test_stage_1_needs_something_to_learn(
    records: list[Record], options: dict[str, bool], message: str
) -> None:
    options = {"learns_regions": True, **options}
    if not message:
        refuse_nothing_to_learn(records, **options)
        return
    with pytest.raises(ValueError, match=message):
        refuse_nothing_to_learn(records, **options)


def test_a_good_set_is_read_no_further_than_needed() -> None:
    def records() -> Any:
        yield CAPTIONED
        yield BOXED
        pytest.fail("read on")

    refuse_nothing_to_learn(records(), learns_regions=True)
