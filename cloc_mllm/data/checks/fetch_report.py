"""`cloc-mllm data fetch-report`: what share of URL-listed images survived a download.

Half of a web set may be gone a year later, so two runs on "the same" set are not comparable unless
they say which part they had. The report counts, and gives the survivors one sha256.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cloc_mllm.data.readers import as_dict
from cloc_mllm.data.texts import read_json

_SUCCESS = "success"
_DIGITS = re.compile(r"0x[0-9a-f]+|\d{4,}")


@dataclass
class FetchReport:
    """Attributes:
    listed: URLs asked for, `fetched` of them are here.
    reasons: why the others are not, as the downloader put it.
    missing_tables: shards without the table that lists their URLs; their numbers come from
        `*_stats.json`, and their images are not in `sha256`.
    sha256: over the sorted URLs that survived.
    """

    listed: int = 0
    fetched: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    missing_tables: int = 0
    sha256: str = ""


def add_fetch_report(commands: Any) -> None:
    report = commands.add_parser(
        "fetch-report",
        help="say what share of URL-listed images survived",
        description="Reads the folder that img2dataset wrote (NNNNN.parquet, NNNNN_stats.json).",
        epilog="exit status: 0 fine, 1 less than --min_share survived, 2 wrong input",
    )
    report.add_argument("folder", type=Path, help="img2dataset's output folder")
    report.add_argument(
        "--listed",
        metavar="N",
        type=int,
        help="URLs in the original list, if the download was not finished",
    )
    report.add_argument(
        "--min_share", metavar="SHARE", type=float, default=0.0, help="default: %(default)s"
    )
    report.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    report = read_fetch_report(args.folder)
    never_tried = max(0, (args.listed or 0) - report.listed)
    if never_tried:
        report.reasons["never tried"] += never_tried
        report.listed += never_tried
    share = report.fetched / max(1, report.listed)
    print(f"listed:  {report.listed:>12,}")
    print(f"fetched: {report.fetched:>12,}  {share:.1%}")
    for reason, count in report.reasons.most_common(20):
        print(f"  {count:>12,}  {reason}")
    print(f"sha256 of the surviving URLs, sorted: {report.sha256}")
    if report.missing_tables:
        print(f"{report.missing_tables} shards have no table: they are not in the sha256")
    return 1 if share < args.min_share else 0


def read_fetch_report(folder: str | Path) -> FetchReport:
    """Sum up a download.

    Raises:
        ValueError: neither tables nor statistics in the folder, or a damaged one.
    """
    folder = Path(folder)
    tables = {path.stem: path for path in sorted(folder.glob("*.parquet"))}
    stats = {path.name.removesuffix("_stats.json"): path for path in folder.glob("*_stats.json")}
    if not tables and not stats:
        raise ValueError(f"{folder} holds no NNNNN.parquet or NNNNN_stats.json of img2dataset")
    report = FetchReport()
    urls: list[str] = []
    for table in tables.values():
        for url, status, error in _rows(table):
            report.listed += 1
            if status == _SUCCESS:
                report.fetched += 1
                urls.append(url)
            else:
                report.reasons[_reason(status, error)] += 1
    for name in sorted(set(stats) - set(tables)):
        _add_stats(report, stats[name])
    report.sha256 = hashlib.sha256("\n".join(sorted(urls)).encode()).hexdigest()
    return report


def _rows(path: Path) -> Iterator[tuple[str, str, str]]:
    try:
        table = pq.read_table(path, columns=["url", "status", "error_message"])
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
        raise ValueError(
            f"{path}: expected img2dataset's table with url, status, error_message: {error}"
        ) from error
    for row in table.to_pylist():
        yield str(row["url"]), str(row["status"]), str(row["error_message"] or "")


def _reason(status: str, error: str) -> str:
    """One line, numbers that differ from case to case taken out."""
    text = " ".join(_DIGITS.sub("N", error).split())[:80]
    return f"{status}: {text}" if text else status


def _add_stats(report: FetchReport, path: Path) -> None:
    stats = as_dict(read_json(path))
    listed, fetched = stats.get("count"), stats.get("successes")
    if not isinstance(listed, int) or not isinstance(fetched, int):
        raise ValueError(f"{path}: expected img2dataset's `count` and `successes`")
    report.listed += listed
    report.fetched += fetched
    report.missing_tables += 1
    for reason, count in as_dict(stats.get("status_dict")).items():
        if reason != _SUCCESS and isinstance(count, int):
            report.reasons[reason] += count
