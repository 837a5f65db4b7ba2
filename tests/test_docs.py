"""The documentation: it builds strictly, its links lead somewhere, its commands exist."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cloc_mllm import cli

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
MAX_LINES = 250
LINK = re.compile(r"\]\(([^)\s]+)\)")
# what a page would load when it opens; plain links are followed by readers alone
LOADED = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*?(?:src|href)=\"(https?://[^\"]+)")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=name)
def test_links_lead_to_files(page: Path) -> None:
    generated = {DOCS / "reference" / "commands.md"}
    targets = [t for t in LINK.findall(page.read_text(encoding="utf-8")) if ":" not in t]
    paths = [(page.parent / target.partition("#")[0]).resolve() for target in targets]
    assert [path for path in paths if not path.exists() and path not in generated] == []


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.parent.name not in ("reference", "lab")], ids=name
)
def test_a_page_is_read_in_one_go(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def commands() -> list[str]:
    """The lines of README and Learn that begin with `cloc-mllm`."""
    lines = []
    for page in (ROOT / "README.md", *sorted((DOCS / "learn").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S):
            joined = block.replace("\\\n", " ")
            lines += [line for line in joined.splitlines() if line.startswith("cloc-mllm ")]
    return lines


@pytest.mark.parametrize("line", commands())
def test_a_command_and_its_options_exist(line: str) -> None:
    words = line.partition("  #")[0].split()[1:]
    own = words[0] in ("data", "eval") and words[1].islower() and not words[1].startswith("-")
    depth = 3 if words[:2] == ["data", "build"] and words[2].islower() else 1 + own
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        assert cli.main([*words[:depth], "--help"]) == 0
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert re.search(rf"{re.escape(option)}\b", said.getvalue()), option


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason="the extra `docs` is not installed",
)
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert build.returncode == 0, build.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    assert {found for page in pages for found in LOADED.findall(page.read_text())} == set()
    settings = (tmp_path / "reference" / "config.html").read_text()
    assert "regions_per_image" in settings
    known = (tmp_path / "reference" / "commands.html").read_text()
    assert all(f"cloc-mllm {command}" in known for command in cli.SUBCOMMANDS)
