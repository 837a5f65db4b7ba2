"""Which file a name means: as a text, and among the paths of a folder."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Iterable

import pytest

from cloc_mllm.data.readers.files import Files, Match, settle
from cloc_mllm.data.readers.names import (
    CASE,
    DEEPER,
    SPELLING,
    SUFFIX,
    TAIL,
    ids_of_names,
    may_be_same,
    name_to_id,
    plain_path,
    spellings,
)

CAFE_NFD, CAFE_NFC = (unicodedata.normalize(form, "café.png") for form in ("NFD", "NFC"))


class InMemory:
    """A store of empty files that counts how often it is listed."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.all_paths = set(paths)
        self.num_listings = 0

    def has(self, path: str) -> bool:
        return path in self.all_paths

    def read(self, path: str) -> bytes | None:
        return b"" if path in self.all_paths else None

    def paths(self) -> Iterable[str]:
        self.num_listings += 1
        return self.all_paths


def files_of(*paths: str, root: str = "home/me/set/images") -> Files:
    return Files(InMemory(paths), root.split("/"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b.jpg", "a/b.jpg"),
        ("./a/./b.jpg", "a/b.jpg"),
        ("/a//b.jpg", "a/b.jpg"),
        ("a\\b.jpg", "a/b.jpg"),
        (".\\a\\b.jpg", "a/b.jpg"),
        ("C:\\Users\\me\\b.jpg", "Users/me/b.jpg"),
        ("file:///D:/a/b.jpg", "a/b.jpg"),
        ("file://a/b.jpg", "a/b.jpg"),
        ("../../a/b.jpg", "a/b.jpg"),
        ("a/../b.jpg", "b.jpg"),
        (" a/b.jpg\r\n", "a/b.jpg"),
        ("\ufeffb.jpg", "b.jpg"),
        ("https://host/a/b.jpg?token=1#x", "host/a/b.jpg"),
        ("s3://bucket/a/b#1.jpg", "bucket/a/b#1.jpg"),
        ("/data/local-files/?d=a/b.jpg", "a/b.jpg"),
        ("a b(1)#2.jpg", "a b(1)#2.jpg"),
        ("", ""),
        ("/", ""),
    ],
)
def test_plain_path(name: str, expected: str) -> None:
    assert plain_path(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ["a.jpg"]),
        ("a%20b.jpg", ["a%20b.jpg", "a b.jpg"]),
        ("/data/upload/3/cb0618f6-x.png", ["data/upload/3/cb0618f6-x.png", "data/upload/3/x.png"]),
        ("/data/local-files/?d=a%2Fb.jpg", ["a%2Fb.jpg", "a/b.jpg"]),
        ("100%.jpg", ["100%.jpg"]),
        ("%2e%2e/a.jpg", ["%2e%2e/a.jpg", "a.jpg"]),
    ],
)
def test_spellings(name: str, expected: list[str]) -> None:
    assert spellings(name) == expected


# name, paths that are there, the one that is meant, difference
FOUND = [
    ("a.jpg", ["a.jpg", "x/a.jpg"], "a.jpg", ""),
    ("x/a.jpg", ["a.jpg", "x/a.jpg"], "x/a.jpg", ""),
    ("a%20b.jpg", ["a%20b.jpg", "a b.jpg"], "a%20b.jpg", ""),
    ("a%20b.jpg", ["a b.jpg"], "a b.jpg", SPELLING),
    ("x\\a.jpg", ["a.jpg", "x/a.jpg"], "x/a.jpg", SPELLING),
    ("./x/a.jpg", ["x/a.jpg"], "x/a.jpg", SPELLING),
    ("/data/local-files/?d=x/a.jpg", ["x/a.jpg"], "x/a.jpg", SPELLING),
    ("/data/upload/1/0123abcd-a.jpg", ["a.jpg"], "a.jpg", TAIL),
    ("/data/upload/1/0123abcd-a.jpg", ["a.jpg", "0123abcd-a.jpg"], "0123abcd-a.jpg", TAIL),
    ("images/a.jpg", ["a.jpg"], "a.jpg", SPELLING),  # the folder that is given is `images`
    ("set\\images\\x\\a.jpg", ["x/a.jpg"], "x/a.jpg", SPELLING),
    ("/home/me/set/images/a.jpg", ["a.jpg"], "a.jpg", SPELLING),
    ("images/a.jpg", ["images/a.jpg", "a.jpg"], "images/a.jpg", ""),
    ("a.jpg", ["x/a.jpg"], "x/a.jpg", DEEPER),
    ("x/a.jpg", ["p/x/a.jpg", "q/y/a.jpg"], "p/x/a.jpg", DEEPER),
    ("/mnt/disk/x/a.jpg", ["x/a.jpg", "y/a.jpg"], "x/a.jpg", TAIL),
    ("train2014/a.jpg", ["val/a.jpg"], "val/a.jpg", TAIL),
    ("C:\\set\\y\\a.jpg", ["x/a.jpg", "y/a.jpg"], "y/a.jpg", TAIL),
    ("night/A.JPG", ["night/a.jpg", "day/A.JPG"], "night/a.jpg", CASE),
    ("a.jpg", ["A.JPG"], "A.JPG", CASE),
    ("A.JPG", ["a.jpg", "b.jpg"], "a.jpg", CASE),
    ("X/a.jpg", ["x/a.jpg"], "x/a.jpg", CASE),
    (CAFE_NFC, [CAFE_NFD], CAFE_NFD, CASE),
    (CAFE_NFD, [CAFE_NFC], CAFE_NFC, CASE),
    ("a", ["a.jpg", "ab.jpg"], "a.jpg", ""),
    ("a", ["x/a.webp"], "x/a.webp", DEEPER),
    ("a.jpg", ["a.png"], "a.png", SUFFIX),
    ("a.jpg", ["a"], "a", SUFFIX),
    ("IMG.jpeg", ["img.JPG"], "img.JPG", SUFFIX),
    ("a.v2", ["a.v2.png", "a.png"], "a.v2.png", ""),
    ("000000000005", ["val2017/000000000005.jpg"], "val2017/000000000005.jpg", DEEPER),
    ("x/a.jpg", ["x\\a.jpg"], "x\\a.jpg", DEEPER),  # from a zip of Windows
]


@pytest.mark.parametrize(("name", "paths", "expected", "difference"), FOUND)
def test_a_name_finds_its_file(name: str, paths: list[str], expected: str, difference: str) -> None:
    match = files_of(*paths).match(name)
    assert (match.path, match.fault, match.difference) == (expected, "", difference)


AMBIGUOUS = [
    ("a.jpg", ["x/a.jpg", "y/a.jpg"]),
    ("/mnt/a.jpg", ["x/a.jpg", "y/a.jpg", "z/a.jpg", "w/a.jpg"]),
    ("a", ["a.jpg", "a.png"]),
    ("a.JPG", ["a.jpg", "A.jpg"]),
    ("a.gif", ["a.jpg", "a.png"]),
    ("x/a.jpg", ["p/x/a.jpg", "q/x/a.jpg"]),
]


@pytest.mark.parametrize(("name", "paths"), AMBIGUOUS)
def test_several_files_that_fit_alike_are_named(name: str, paths: list[str]) -> None:
    match = files_of(*paths).match(name)
    assert (match.path, match.fault) == ("", "ambiguous_image")
    assert sum(path in match.found for path in paths) == min(3, len(paths))


@pytest.mark.parametrize("name", ["b.jpg", "x/b.jpg", "a", "", "..", "/", "aa.jpg"])
def test_a_name_that_finds_nothing_says_what_is_there(name: str) -> None:
    match = files_of("x/aaa.jpg", "notes.txt").match(name)
    assert (match.path, match.fault) == ("", "missing_image")
    assert match.found.endswith("there are 1 image files, such as x/aaa.jpg")


def test_without_a_name_or_an_image() -> None:
    assert files_of("a.txt").match().found == "an image without a name; there is no image file"


def test_the_surest_name_counts() -> None:
    files = files_of("a.png", "b.png", "photo one.jpg")
    assert files.match("b", "a.png").path == "b.png"
    assert files.match("0001", "photo one.jpg").path == "photo one.jpg"
    both = files_of("a.png", "a.jpg")
    assert both.match("a", "a.jpg").path == "a.jpg", "the second name tells which"
    # the end of a path alone says less than a whole name
    assert files_of("x/1.jpg", "2.jpg").match("y/1.jpg", "2.jpg").path == "2.jpg"


@pytest.mark.parametrize(
    ("names", "paths", "expected"),
    [
        pytest.param(
            ["set_a/1.png", "set_b/1.png"], ["1.png"], ["", ""], id="two_names_of_one_file"
        ),
        pytest.param(
            ["set_a/1.png", "set_b/1.png"],
            ["set_b/1.png"],
            ["", "set_b/1.png"],
            id="the_path_itself_wins",
        ),
        pytest.param(["1.png", "set/1.png"], ["1.png"], ["1.png", ""], id="exact_and_end"),
        pytest.param(["x/1.png", "1.png"], ["x/1.png"], ["x/1.png", ""], id="exact_and_deeper"),
        pytest.param(
            ["images/1.png", "other/1.png"], ["1.png"], ["1.png", ""], id="from_the_folder_above"
        ),
        pytest.param(["1", "1.png"], ["1.png"], ["1.png", "1.png"], id="with_and_without_suffix"),
        pytest.param(["A.png", "a.png"], ["a.png"], ["a.png", "a.png"], id="two_letter_cases"),
        pytest.param(["a.jpg", "a.png"], ["a.png"], ["", "a.png"], id="two_suffixes"),
        pytest.param(["./1.png", "1.png"], ["1.png"], ["1.png", "1.png"], id="two_spellings"),
        pytest.param(["x/1.png", "y/2.png"], ["1.png", "2.png"], ["1.png", "2.png"], id="unique"),
    ],
)
def test_different_names_never_share_a_file(
    names: list[str], paths: list[str], expected: list[str]
) -> None:
    matches = settle(files_of(*paths), [(name,) for name in names])
    assert [matches[name,].path for name in names] == expected
    for match in matches.values():
        assert bool(match.path) != (match.fault == "ambiguous_image")


def test_files_are_listed_once_and_only_when_a_path_fails() -> None:
    store = InMemory(["a.jpg", "x/b.jpg"])
    files = Files(store)
    assert files.match("a.jpg") == Match("a.jpg", "a.jpg")
    assert files.match("./x/b.jpg").path == "x/b.jpg"
    assert store.num_listings == 0
    for name in ("b.jpg", "c.jpg", "B.JPG"):
        files.match(name)
    assert store.num_listings == 1


def test_many_missing_files_are_told_fast() -> None:
    files = files_of(*(f"{number}.jpg" for number in range(100_000)))
    started = time.process_time()
    for number in range(10_000):
        assert files.match(f"no_{number}.jpg").fault == "missing_image"
    assert time.process_time() - started < 20


@pytest.mark.parametrize("names", ["deeper", "absolute", "frames"])
def test_many_files_are_found_fast(names: str) -> None:
    """100,000 files, 10,000 names; seconds would be minutes if a name looked at every file."""
    paths = [f"{folder:03}/{number:04}.jpg" for folder in range(100) for number in range(1000)]
    if names == "frames":  # one name in every folder
        paths = [f"video_{number:06}/frame_0.jpg" for number in range(100_000)]
    files = files_of(*paths)
    written = {
        "deeper": [f"./{path}".upper() for path in paths[:10_000]],
        "absolute": [f"C:\\other\\place\\{path}" for path in paths[:10_000]],
        "frames": [f"/mnt/{path}" for path in paths[:10_000]],
    }[names]
    started = time.process_time()
    assert [files.match(name).path for name in written] == paths[:10_000]
    assert time.process_time() - started < 20


def test_hidden_files_are_none() -> None:
    names = ["a.jpg", "._a.jpg", ".DS_Store", "__MACOSX/a.jpg", "x/.cache/b.jpg", "x/b.jpg"]
    assert files_of(*names).names() == ["a.jpg", "x/b.jpg"]


def test_ids_of_names_do_not_collide() -> None:
    names = ["0001.jpg", "night/0001.jpg", "a.jpg", "a.png", "v1.5", "b", 7]
    assert ids_of_names(names) == {
        "0001.jpg": "0001",
        "night/0001.jpg": "night/0001",
        "a.jpg": "a.jpg",
        "a.png": "a.png",
        "v1.5": "v1.5",
        "b": "b",
        7: "7",
    }
    assert name_to_id("C:\\x\\a.JPG") == "x/a"


def test_spellings_of_one_name() -> None:
    assert may_be_same("a", "a.jpg") and may_be_same("A.JPG", "a.jpg")
    assert may_be_same(CAFE_NFC, CAFE_NFD)
    assert not may_be_same("a.png", "a.jpg") and not may_be_same("x/a.jpg", "a.jpg")
