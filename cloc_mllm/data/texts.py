"""Text files of any source: JSON, JSON lines, CSV, YAML, XML and plain lines.

One rule for all: a byte order mark says the encoding (UTF-8, UTF-16, UTF-32) and is taken off;
without one it is the encoding that the user names, by default UTF-8. Other bytes are an error that
names file, line and byte, because a text in a guessed encoding would be wrong in silence.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import csv
import io
import itertools
import json
import os
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import yaml

from cloc_mllm.data.values import as_dict, as_list

_BOMS = (  # UTF-32's little-endian mark starts with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_MAX_CELL = 64 << 20  # characters of a CSV cell; Python's own limit is 131,072
_CHUNK = 1 << 20  # characters of a JSON list that are read at once
_DECIMAL_COMMA = re.compile(r"^(\s*[-+]?\d+),(\d+\s*)$", re.ASCII)
_GZIP = b"\x1f\x8b"  # the start of a file that gzip made
_BLANKS = re.compile(r"[ \t\r\n]*")
_LINE_END = re.compile(r"\r\n|\r|\n")  # str.splitlines also splits at characters inside texts
_XML_DECLARATION = re.compile(rb"""^\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.-]+)["'][^>]*\?>""")


def decode(data: bytes, where: str | Path, encoding: str = "", errors: str = "strict") -> str:
    """Decodes a text file, its byte order mark taken off.

    Args:
        where: the file, for the message.
        encoding: of files without a byte order mark; "" is UTF-8.
        errors: what to do with other bytes, as in `bytes.decode`.

    Raises:
        ValueError: it is in another encoding, or there is none of this name.
    """
    start, name = _encoding_of(data, encoding)
    try:
        return data[start:].decode(name, errors)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, start + error.start) + 1
        raise _not_decodable(where, line, start + error.start, error) from error


def _encoding_of(data: bytes, encoding: str) -> tuple[int, str]:
    """Finds the length of the byte order mark, and the encoding."""
    for mark, name in _BOMS:
        if data.startswith(mark):
            return len(mark), name
    try:
        return 0, codecs.lookup(encoding or "utf-8").name
    except LookupError as error:
        raise ValueError(
            f"there is no encoding {encoding!r}; usual ones are utf-8, cp1252, gbk, shift_jis"
        ) from error


def _not_decodable(
    where: str | Path, line: int, byte: int, error: UnicodeDecodeError
) -> ValueError:
    if error.object.startswith(_GZIP):
        return ValueError(f"{where} is compressed; unpack it first: gunzip {where}")
    return ValueError(
        f"{where}, line {line:,}, byte {byte:,} (0x{error.object[error.start]:02x}): expected "
        f"{error.encoding}, this is another encoding; name it with --encoding (cp1252, gbk, "
        "shift_jis, ...) or save the file as UTF-8"
    )


def read_text(path: str | Path, encoding: str = "") -> str:
    """Reads a text file, on the disk or in an archive (`set.zip/data.yaml`)."""
    with _open(path) as file:
        return decode(file.read(), path, encoding)


def lines_of(text: str) -> list[str]:
    """Splits a text into lines, blank ones included."""
    lines = _LINE_END.split(text)
    return lines if lines[-1] else lines[:-1]


def read_json(path: str | Path, encoding: str = "") -> Any:
    """Reads a JSON file; NaN and Infinity are numbers. ValueError names the file that is none."""
    text = read_text(path, encoding)
    if not text.strip():
        raise ValueError(f"{path} is empty; expected JSON")
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def from_base64(text: str) -> bytes:
    """Decodes base64, line breaks in it included; b"" for what is none."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return b""


def read_rows(
    path: str | Path,
    encoding: str = "",
    delimiter: str = "",
    columns: Sequence[str] | None = (),
) -> Iterator[tuple[str, Any]]:
    """Reads (id for messages, row) of a JSON list, of JSON lines, or of a CSV file with a header.

    A list is read item by item, so that one of gigabytes needs little memory; it shows by its first
    character. A comma behind a line is taken off; a line that is no JSON is the text that it is.
    `.csv` and `.tsv` count in any letter case, and a `.csv` whose header has semicolons and no
    comma is one of those (Excel's in many countries, whose decimal commas become points). A cell
    that is missing at the end of a line is None; what a line has beyond the columns stands under
    None.

    Args:
        delimiter: of a CSV file, whatever its suffix; "" is what suffix and header say.
        columns: of a CSV file without a header; () takes the header, None numbers them from 1.

    Raises:
        ValueError: another encoding, two columns of one name, or a file that starts as a JSON list
            and is none, which may show only behind its first rows.
    """
    suffix = Path(path).suffix.lower()
    if suffix in (".csv", ".tsv") or delimiter:
        delimiter = delimiter or ("\t" if suffix == ".tsv" else "")
        yield from _csv_rows(path, encoding, delimiter, columns)
        return
    with _open(path) as file:
        start, name = _encoding_of(file.read(4), encoding)
        file.seek(start)
        if file.read(4096).decode(name, "ignore").lstrip().startswith("["):
            file.seek(start)
            try:
                for index, row in enumerate(_list_items(io.TextIOWrapper(file, name))):
                    yield f"row {index}", row
            except ValueError:
                read_json(path, encoding)  # says where it is none, or in another encoding
                raise
            return
        file.seek(start)
        for number, line in enumerate(_decoded_lines(file, name, path), 1):
            if line.strip():
                yield f"line {number}", _json_or_text(line)


def _open(path: str | Path) -> BinaryIO:
    if os.path.exists(path) or not any(above.is_file() for above in Path(path).parents):
        return open(path, "rb")
    # only for a path into an archive: it brings torch, which scoring goes without
    from cloc_mllm.data.readers.files import read_annotation_file

    return io.BytesIO(read_annotation_file(path))


def _decoded_lines(file: BinaryIO, name: str, path: str | Path) -> Iterator[str]:
    if name.startswith(("utf-16", "utf-32")):  # whose line ends are more than one byte
        yield from lines_of(decode(file.read(), path, name))
        return
    place = file.tell()
    for number, line in enumerate(file, 1):
        try:
            yield line.decode(name)
        except UnicodeDecodeError as error:
            raise _not_decodable(path, number, place + error.start, error) from error
        place += len(line)


def _list_items(file: TextIO) -> Iterator[Any]:
    """Yields the items of a JSON list while it is read. ValueError where it is none."""
    decode = json.JSONDecoder().raw_decode
    text = file.read(_CHUNK)
    at = text.index("[")
    sign = "["  # what stands there, before an item
    while sign != "]":
        try:
            start = _skip_blanks(text, at + 1)
            if sign == "[" and text[start] == "]":
                at, sign = start, "]"
                continue
            item, end = decode(text, start)
            end = _skip_blanks(text, end)
            if text[end] not in ",]":
                raise ValueError(f"expected a comma or the end of the list, got {text[end]!r}")
        except (ValueError, IndexError, RecursionError) as error:  # no JSON, or cut off here
            more = file.read(max(_CHUNK, len(text) - at))
            if not more:
                raise ValueError(f"the list is cut off or no JSON: {error}") from error
            text, at = text[at:] + more, 0
            continue
        yield item
        at, sign = end, text[end]
    if text[at + 1 :].strip() or file.read().strip():
        raise ValueError("there is more behind the list")


def _skip_blanks(text: str, at: int) -> int:
    match = _BLANKS.match(text, at)
    assert match is not None  # of no blank, too
    return match.end()


def _json_or_text(line: str) -> Any:
    for text in (line, line.strip().removesuffix(",")):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            continue
    return line.strip()


def _csv_rows(
    path: str | Path, encoding: str, delimiter: str, columns: Sequence[str] | None
) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(_MAX_CELL)
    text = read_text(path, encoding)
    header = text.partition("\n")[0]
    delimiter = delimiter or (";" if ";" in header and "," not in header else ",")
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for cells in table:
            if not cells:
                continue
            if columns == ():
                columns = [cell.strip() for cell in cells]
                _refuse_same_names(columns, path)
                continue
            if delimiter == ";":
                cells = [_DECIMAL_COMMA.sub(r"\1.\2", cell) for cell in cells]
            names = columns or [str(number) for number in range(1, len(cells) + 1)]
            row: dict[Any, Any] = dict(itertools.zip_longest(names, cells[: len(names)]))
            if len(cells) > len(names):
                row[None] = cells[len(names) :]
            yield f"line {table.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{path}, line {table.line_num}: no valid CSV ({error})") from error


def _refuse_same_names(columns: Sequence[str], path: str | Path) -> None:
    for name, count in Counter(filter(None, columns)).items():
        if count > 1:
            raise ValueError(f"{path}: two columns have the name {name!r}")


def read_yaml(path: str | Path, encoding: str = "") -> Any:
    """Reads a YAML file in which every value is the text that was written.

    YAML's own types would turn the class names `no`, `5` and `2024-01-01` into a bool, a number
    and a date.

    Raises:
        ValueError: no valid YAML, or another encoding.
    """
    try:
        loader = yaml.BaseLoader(read_text(path, encoding))
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error


def is_yaml(path: str | Path) -> bool:
    return Path(path).suffix.lower() in (".yaml", ".yml")


def read_class_list(path: str | Path, encoding: str = "") -> dict[str, str]:
    """Reads class number (as text) -> name.

    Args:
        path: YAML or JSON with `names`, a list or an object number -> name, which may have gaps
            (of JSON, also the list or object itself); or a text file of one name per line, where
            a blank line is a class without a name.

    Raises:
        ValueError: another layout or encoding.
    """
    is_json = Path(path).suffix.lower() == ".json"
    if not is_json and not is_yaml(path):
        return {str(i): name for i, name in enumerate(lines_of(read_text(path, encoding)))}
    names = read_json(path, encoding) if is_json else read_yaml(path, encoding)
    if not is_json or (isinstance(names, dict) and "names" in names):
        names = as_dict(names).get("names")
    pairs = names.items() if isinstance(names, dict) else enumerate(as_list(names))
    found = {str(number).strip(): name for number, name in pairs if isinstance(name, str)}
    if not found:
        raise ValueError(f"{path}: expected `names`, a list or an object number -> name")
    return found


def parse_xml(data: bytes, where: str | Path, encoding: str = "") -> ET.Element:
    """Parses XML.

    Args:
        encoding: "" is what its declaration says, or UTF-8.

    Raises:
        ET.ParseError: no XML, another encoding, or a document type: entities can blow up.
    """
    declared = _XML_DECLARATION.match(data)
    try:
        text = decode(data, where, encoding or (declared[1].decode("ascii") if declared else ""))
    except ValueError as error:
        raise ET.ParseError(str(error)) from error
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ET.ParseError("document type declarations are refused")
    # the parser knows fewer encodings, so it gets UTF-8 and no declaration
    text = re.sub(r"^\s*<\?xml[^>]*\?>", "", text)
    try:
        return ET.fromstring(text.encode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise ET.ParseError(str(error)) from error
