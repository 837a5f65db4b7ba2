"""Flickr30k Entities (Plummer et al. 2015): `Annotations/ID.xml` and `Sentences/ID.txt`.

A caption reads `[/EN#284197/people A woman] walking across ...`: chain 284197, type people. A
chain is one thing of the photo, named in several captions; its boxes are in the XML, in pixels of
the size the XML states. Boxes are divided by that size, so the photo file itself may be resized,
even squashed.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cloc_mllm.data.readers import boxes_from_xyxy
from cloc_mllm.data.readers.files import Files, open_files, read_image
from cloc_mllm.data.records import DropLog, Record, Region, validate_record

SOURCE = "flickr30k-entities"
_MENTION = re.compile(r"\[/EN#(?P<chain>\d+)/(?P<types>\S+) (?P<text>[^\]]*)\]")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class Chain(NamedTuple):
    """What the captions say of one thing: its first type and its distinct names, in order."""

    category: str
    texts: list[str]


def read_flickr30k_entities(
    annotations: str | Path,
    images: str | Path,
    *,
    ids: Sequence[str] | None = None,
    drop_log: DropLog,
) -> Iterator[Record]:
    """One record a photo: its captions, and a region a box.

    A region's phrase is its chain's first mention, the chain's other mentions are `expressions`,
    the chain's id is `group` and the type (people, clothing, ...) is `category`. A box that
    several chains share becomes a region for each. Chains without a box are noted, not dropped.

    Args:
        annotations: folder or zip that holds `Annotations/` and `Sentences/`.
        images: folder, tar or zip of `ID.jpg`.
        ids: photos to read; default all that are annotated.
        drop_log: records get, beside the reasons of `validate_record`, `missing_annotation` (no
            XML or no sentences) and `bad_annotation` (XML or text that does not parse).
    """
    with (
        open_files(annotations, "Annotations") as xml_files,
        open_files(annotations, "Sentences") as sentence_files,
        open_files(images) as image_files,
    ):
        if ids is None:
            ids = [PurePosixPath(name).stem for name in xml_files.names()]
        for photo_id in ids:
            xml = xml_files.read(f"{photo_id}.xml")
            sentences = sentence_files.read(f"{photo_id}.txt")
            if xml is None or sentences is None:
                drop_log.add("record", photo_id, "missing_annotation")
                continue
            try:
                captions, chains = parse_sentences(sentences.decode("utf-8"))
                regions = _parse_regions(_parse_xml(xml), chains, drop_log)
            except (UnicodeDecodeError, ET.ParseError):
                drop_log.add("record", photo_id, "bad_annotation")
                continue
            record = validate_record(_to_record(photo_id, image_files, captions, regions), drop_log)
            if record is not None:
                yield record


def parse_sentences(text: str) -> tuple[list[str], dict[str, Chain]]:
    """A sentence file -> its captions without marks, and the chains by id."""
    chains: dict[str, Chain] = {}
    for mention in _MENTION.finditer(text):
        chain = chains.setdefault(
            mention["chain"], Chain(category=mention["types"].split("/")[0], texts=[])
        )
        if mention["text"].casefold() not in map(str.casefold, chain.texts):
            chain.texts.append(mention["text"])
    lines = _MENTION.sub(lambda mention: mention["text"], text).splitlines()
    return [line for line in lines if line.strip()], chains


def _parse_xml(data: bytes) -> ET.Element:
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:  # nothing here needs entities
        raise ET.ParseError("document type declarations are refused")
    return ET.fromstring(data)


def _parse_regions(root: ET.Element, chains: dict[str, Chain], drop_log: DropLog) -> list[Region]:
    chain_ids: list[str] = []
    rows: list[list[str | None]] = []
    for thing in root.iter("object"):
        if thing.find("bndbox") is not None:  # else flagged `scene` or `nobndbox`
            named = [name.text or "" for name in thing.findall("name")] or [""]
            chain_ids += named
            rows += [[thing.findtext(f"bndbox/{corner}") for corner in _CORNERS]] * len(named)
    if unboxed := chains.keys() - set(chain_ids):
        drop_log.note("chains without a box (the scene, not visual, unmarked)", len(unboxed))
    boxes = boxes_from_xyxy(rows, root.findtext("size/width"), root.findtext("size/height"))
    regions = []
    for chain_id, box in zip(chain_ids, boxes, strict=True):
        category, texts = chains.get(chain_id, Chain("", [""]))  # a box no caption mentions
        regions.append(
            Region(
                box=box,
                phrase=texts[0],
                expressions=texts[1:],
                category=category,
                group=chain_id,
            )
        )
    return regions


def _to_record(
    photo_id: str, image_files: Files, captions: list[str], regions: list[Region]
) -> Record:
    return Record(
        id=photo_id,
        image=read_image(image_files, photo_id),
        width=0,  # of the image file: set by validate_record
        height=0,
        captions=captions,
        regions=regions,
        source=SOURCE,
    )
