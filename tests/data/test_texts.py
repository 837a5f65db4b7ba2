"""Text files in any encoding, and what YAML, JSON, CSV and XML make of them."""

from __future__ import annotations

import codecs
import gzip
import json
import tracemalloc
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path
from typing import Any

import pytest

from cloc_mllm.data import texts
from cloc_mllm.data.texts import (
    decode,
    lines_of,
    parse_xml,
    read_class_list,
    read_json,
    read_rows,
    read_text,
    read_yaml,
)

BOMS = {
    "utf-8": b"",
    "utf-8-sig": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}
TEXT = "café 猫\r\nnext"


def written(text: str, encoding: str) -> bytes:
    return BOMS[encoding] + text.encode(encoding.removesuffix("-sig"))


@pytest.mark.parametrize("encoding", BOMS)
def test_byte_order_marks_say_the_encoding(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(written(TEXT, encoding))
    assert read_text(tmp_path / "x.txt") == TEXT
    assert read_text(tmp_path / "x.txt", "cp1252") == TEXT or encoding == "utf-8"


ROWS = [{"a": "café", "b": [1, 2]}, {"a": "猫\u2028x", "b": []}]


@pytest.mark.parametrize("encoding", BOMS)
@pytest.mark.parametrize("layout", ["list", "lines", "pretty list", "crlf lines"])
def test_rows(layout: str, encoding: str, tmp_path: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    text = {
        "list": json.dumps(ROWS, ensure_ascii=False),
        "pretty list": " \n" + json.dumps(ROWS, ensure_ascii=False, indent=2),
        "lines": "\n".join([lines[0], "", lines[1]]),
        "crlf lines": "\r\n".join(lines) + "\r\n",
    }[layout]
    (tmp_path / "rows").write_bytes(written(text, encoding))
    found = list(read_rows(tmp_path / "rows"))
    assert [row for _, row in found] == ROWS
    items = {"list": ["row 0", "row 1"], "lines": ["line 1", "line 3"]}
    assert [item for item, _ in found] == items.get(layout, [item for item, _ in found])


@pytest.mark.parametrize("name", ["x.csv", "X.CSV", "x.tsv"])
@pytest.mark.parametrize("encoding", BOMS)
def test_tables(name: str, encoding: str, tmp_path: Path) -> None:
    comma = "\t" if name == "x.tsv" else ","
    long = "x" * 200_000
    text = f'id{comma}text\r\n1{comma}"a ""b""\nc"\r\n2{comma}{long}\r\n'
    (tmp_path / name).write_bytes(written(text, encoding))
    rows = list(read_rows(tmp_path / name))
    assert [row for _, row in rows] == [{"id": "1", "text": 'a "b"\nc'}, {"id": "2", "text": long}]


def test_lines_that_are_no_json(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": NaN}\n{\n[1]\n' + "[" * 100_000 + "\n-Infinity\n")
    rows = [row for _, row in read_rows(tmp_path / "x.jsonl")]
    assert rows[0]["a"] != rows[0]["a"]
    assert rows[1:] == ["{", [1], "[" * 100_000, float("-inf")]


def test_a_comma_behind_each_line_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1},\r\n{"a": 2} , \n{"a": 3}')
    assert [row["a"] for _, row in read_rows(tmp_path / "x.jsonl")] == [1, 2, 3]


ITEMS = [1, -2.5e3, 'a]"\\b\n😀,', None, [], {}, [[1, 2], {"a": [3]}], True, 12345.678, "x" * 50]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_is_read_in_parts(
    chunk: int, indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_CHUNK", chunk)
    for items in (ITEMS, [], [0]):
        (tmp_path / "x.json").write_text(json.dumps(items, indent=indent) + " \n")
        assert [row for _, row in read_rows(tmp_path / "x.json")] == items


def test_a_list_of_any_length_takes_little_memory(tmp_path: Path) -> None:
    rows = [{"id": f"{i}", "text": "x" * 1000} for i in range(10_000)]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    tracemalloc.start()
    assert sum(1 for _ in read_rows(tmp_path / "x.json")) == len(rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 << 20  # of 10 MB; two parts of 1 MB and what is cut off them


@pytest.mark.parametrize(
    "text", ["[{]", "[" * 100_000, "[1, 2", "[1, 2,]", "[1 2]", "[1] 2", "[,]"]
)
def test_a_list_that_is_no_json_names_its_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x.json is not valid JSON"):
        list(read_rows(tmp_path / "x.json"))
    with pytest.raises(ValueError, match=r"x.json is not valid JSON"):
        read_json(tmp_path / "x.json")


def test_empty_and_compressed_files_are_said(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("\n")
    with pytest.raises(ValueError, match=r"x.json is empty; expected JSON"):
        read_json(tmp_path / "x.json")
    (tmp_path / "y.json.gz").write_bytes(gzip.compress(b"[1]"))
    for read in (read_json, lambda path: list(read_rows(path))):
        with pytest.raises(ValueError, match=r"y.json.gz is compressed; unpack it first: gunzip"):
            read(tmp_path / "y.json.gz")


LATIN = "first\nsecond\ncafé".encode("cp1252")


@pytest.mark.parametrize("read", [read_text, read_json, read_yaml, read_class_list])
def test_another_encoding_is_named_with_its_place(read: Any, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(LATIN)
    with pytest.raises(ValueError, match=r"x.txt, line 3, byte 16 \(0xe9\): .*--encoding"):
        read(tmp_path / "x.txt")


def test_another_encoding_of_rows(tmp_path: Path) -> None:
    lines = ['{"a": "x"}', '{"a": "café"}']
    (tmp_path / "x.jsonl").write_bytes("\n".join(lines).encode("cp1252"))
    with pytest.raises(ValueError, match=r"x.jsonl, line 2, byte 21 \(0xe9\): .*--encoding"):
        list(read_rows(tmp_path / "x.jsonl"))
    assert [row for _, row in read_rows(tmp_path / "x.jsonl", "cp1252")][1] == {"a": "café"}
    (tmp_path / "x.json").write_bytes('["café"]'.encode("gbk"))
    assert list(read_rows(tmp_path / "x.json", "gbk")) == [("row 0", "café")]


def test_an_unknown_encoding_is_named() -> None:
    with pytest.raises(ValueError, match="no encoding 'latin-15'"):
        decode(b"x", "x.txt", "latin-15")


def test_lines() -> None:
    assert lines_of("a\n\nb\r\nc\rd\n") == ["a", "", "b", "c", "d"]
    assert lines_of("a\u2028b\x0bc") == ["a\u2028b\x0bc"]
    assert lines_of("") == lines_of("\n")[1:] == []


YAML_NAMES = """\
nc: 9
names: [yes, no, off, 5, 1.50, 2024-01-01, null, ~, 0x1F, "a: b", 1e3]
kpt_shape: [17, 3]
"""


def test_yaml_values_are_the_texts_that_were_written(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text(YAML_NAMES)
    names = ["yes", "no", "off", "5", "1.50", "2024-01-01", "null", "~", "0x1F", "a: b", "1e3"]
    expected = {str(index): name for index, name in enumerate(names)}
    assert read_class_list(tmp_path / "data.yaml") == expected
    assert read_yaml(tmp_path / "data.yaml")["kpt_shape"] == ["17", "3"]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.yaml", "names: {0: cat, 2: dog}", {"0": "cat", "2": "dog"}),
        ("a.YML", "names:\n  0: cat\n  1: 'no'\n", {"0": "cat", "1": "no"}),
        ("a.json", '{"names": ["cat", "dog"]}', {"0": "cat", "1": "dog"}),
        ("a.json", '{"0": "cat"}', {"0": "cat"}),
        ("a.JSON", '["cat", 7, "dog"]', {"0": "cat", "2": "dog"}),
        ("a.txt", "cat\n\ndog\r\n", {"0": "cat", "1": "", "2": "dog"}),
        ("a.names", "\ufeffcat\ndog", {"0": "cat", "1": "dog"}),
    ],
)
def test_class_lists(name: str, text: str, expected: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_class_list(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: images", "expected `names`"),
        ("names: 7", "expected `names`"),
        ("- a", "expected `names`"),
        ("", "expected `names`"),
        ("a: [", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("a: !!python/object:os.system x", "expected `names`"),
    ],
)
def test_other_yaml_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"data.yaml.*{message}"):
        read_class_list(tmp_path / "data.yaml")


def test_yaml_aliases_do_not_blow_up(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    (tmp_path / "x.yaml").write_text("\n".join([*lines, "names: [cat]"]))
    assert read_class_list(tmp_path / "x.yaml") == {"0": "cat"}


XML = "<a><b>café</b></a>"


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        *[(written(XML, encoding), "") for encoding in BOMS],
        *[(written(f'<?xml version="1.0"?>\n{XML}', encoding), "") for encoding in BOMS],
        (f'<?xml version="1.0" encoding="gbk"?>{XML}'.encode("gbk"), ""),
        (f"<?xml version='1.0' encoding='ISO-8859-1'?>{XML}".encode("latin-1"), ""),
        (f'<?xml version="1.0" encoding="utf-8"?>{XML}'.encode("cp1252"), "cp1252"),
        (XML.encode("cp1252"), "cp1252"),
        (codecs.BOM_UTF8 + f'<?xml version="1.0" encoding="utf-16"?>{XML}'.encode(), ""),
    ],
)
def test_xml(data: bytes, encoding: str) -> None:
    assert parse_xml(data, "x.xml", encoding).findtext("b") == "café"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<a>", "no element found"),
        (b"", "no element found"),
        (b"<!DOCTYPE x><a/>", "document type"),
        ("<!DOCTYPE x><a/>".encode("utf-16"), "document type"),
        (b'<!ENTITY x "y"><a/>', "document type"),
        (XML.encode("cp1252"), r"x.xml, line 1, byte 9 \(0xe9\): .*--encoding"),
        (b'<?xml version="1.0" encoding="nothing"?><a/>', "no encoding 'nothing'"),
    ],
)
def test_what_is_no_xml(data: bytes, message: str) -> None:
    with pytest.raises(ET.ParseError, match=message):
        parse_xml(data, "x.xml")


def test_texts_in_an_archive_are_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
        archive.writestr("set/data.yaml", "names: [cat]")
        archive.writestr("set/rows.jsonl", '\ufeff{"a": 1}\n{"a": 2}\n')
    assert read_class_list(tmp_path / "export.zip/set/data.yaml") == {"0": "cat"}
    rows = list(read_rows(tmp_path / "export.zip/set/rows.jsonl"))
    assert rows == [("line 1", {"a": 1}), ("line 2", {"a": 2})]
