"""Flickr30k Entities (Plummer et al. 2015): `Annotations/ID.xml` and `Sentences/ID.txt`.

A caption reads `[/EN#284197/people A woman] walking across ...`: chain 284197, type people. A
chain is one thing of the photo, named in several captions; its boxes are in the XML, in pixels of
the size the XML states. Boxes are divided by that size, so the photo file itself may be resized,
even squashed.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cloc_mllm.data.readers import boxes_from_xyxy
from cloc_mllm.data.readers.files import open_files, read_image
from cloc_mllm.data.records import Box, DropLog, Record, Region, validate_record
from cloc_mllm.geometry import clean_box

SOURCE = "flickr30k-entities"
_MENTION = re.compile(r"\[/EN#(?P<chain>\d+)/(?P<types>\S+) (?P<text>[^\]]*)\]")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class Mention(NamedTuple):
    """One marked phrase of one caption, with all boxes of its chain.

    Attributes:
        sentence: the number of the caption, from 0.
        text: the phrase as it stands in the caption.
        chain: the id of the thing it names; two equal texts may be of two chains.
        types: `people`, `clothing`, ...; a phrase may have several.
        boxes: float xyxy, normalised to the original image.
    """

    photo_id: str
    sentence: int
    text: str
    chain: str
    types: tuple[str, ...]
    boxes: list[Box]


class Chain(NamedTuple):
    """What the captions say about one thing: its first type and its distinct names, in order."""

    category: str
    texts: list[str]


def read_flickr30k_entities(
    annotations: str | Path,
    images: str | Path,
    *,
    ids: Sequence[str] | None = None,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per photo with its captions and one region per box.

    A region's phrase is its chain's first mention, the chain's other mentions are `expressions`,
    the chain's id is `group` and the type (people, clothing, ...) is `category`. A box that
    several chains share becomes a region for each. Chains without a box are noted, not dropped.

    Args:
        annotations: folder or zip that holds `Annotations/` and `Sentences/`.
        images: folder, tar or zip of `ID.jpg`.
        ids: photos to read; by default all that are annotated.
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
            image = read_image(image_files, photo_id)
            try:
                captions, chains = parse_sentences(sentences.decode("utf-8"))
                regions = _parse_regions(_parse_xml(xml), image, chains, drop_log)
            except (UnicodeDecodeError, ET.ParseError):
                drop_log.add("record", photo_id, "bad_annotation")
                continue
            record = validate_record(_to_record(photo_id, image, captions, regions), drop_log)
            if record is not None:
                yield record


def read_mentions(
    annotations: str | Path, ids: Iterable[str], notes: Counter[str]
) -> Iterator[Mention]:
    """Lists every marked phrase whose chain has a box, by photo, in the order of the captions.

    Args:
        annotations: folder or zip that holds `Annotations/` and `Sentences/`.
        ids: photos to read.
        notes: counts what is not a mention: `phrase_without_box` (the scene, not visual) and
            `unusable_box` (no area inside the photo).

    Raises:
        ValueError: a photo has no annotation, or one that does not parse.
    """
    with (
        open_files(annotations, "Annotations") as xml_files,
        open_files(annotations, "Sentences") as sentence_files,
    ):
        for photo_id in ids:
            xml = xml_files.read(f"{photo_id}.xml")
            sentences = sentence_files.read(f"{photo_id}.txt")
            if xml is None or sentences is None:
                raise ValueError(
                    f"{annotations} has no annotation of photo {photo_id!r}; take records that "
                    "were built from these annotations"
                )
            try:
                boxes_of = _usable_boxes(_parse_xml(xml), notes)
                lines = sentences.decode("utf-8").splitlines()
            except (UnicodeDecodeError, ET.ParseError) as error:
                raise ValueError(f"{annotations}, photo {photo_id!r}: {error}") from error
            yield from _mentions_of(photo_id, lines, boxes_of, notes)


def _mentions_of(
    photo_id: str, lines: list[str], boxes_of: dict[str, list[Box]], notes: Counter[str]
) -> Iterator[Mention]:
    for sentence, line in enumerate(line for line in lines if line.strip()):
        for mark in _MENTION.finditer(line):
            chain, types = mark["chain"], tuple(mark["types"].split("/"))
            if chain in boxes_of:
                yield Mention(photo_id, sentence, mark["text"], chain, types, boxes_of[chain])
            else:
                notes["phrase_without_box"] += 1


def _usable_boxes(root: ET.Element, notes: Counter[str]) -> dict[str, list[Box]]:
    """Finds the boxes of each chain, clipped to the photo."""
    boxes_of: dict[str, list[Box]] = {}
    for chain, box in zip(*_chain_boxes(root), strict=True):
        clipped, _ = clean_box(box, 1.0, 1.0, min_size_px=0.0)
        if clipped is None:
            notes["unusable_box"] += 1
        else:
            boxes_of.setdefault(chain, []).append(clipped)
    return boxes_of


def parse_sentences(text: str) -> tuple[list[str], dict[str, Chain]]:
    """Reads a sentence file: its captions without marks, and the chains by id."""
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


def _chain_boxes(root: ET.Element, image: bytes = b"") -> tuple[list[str], list[Box]]:
    """Lists boxes with the chain each belongs to; a box of several chains comes once per chain."""
    chain_ids: list[str] = []
    rows: list[list[str | None]] = []
    for thing in root.iter("object"):
        if thing.find("bndbox") is not None:  # else flagged `scene` or `nobndbox`
            named = [name.text or "" for name in thing.findall("name")] or [""]
            chain_ids += named
            rows += [[thing.findtext(f"bndbox/{corner}") for corner in _CORNERS]] * len(named)
    size = root.findtext("size/width"), root.findtext("size/height")
    return chain_ids, boxes_from_xyxy(rows, *size, image)


def _parse_regions(
    root: ET.Element, image: bytes, chains: dict[str, Chain], drop_log: DropLog
) -> list[Region]:
    chain_ids, boxes = _chain_boxes(root, image)
    if unboxed := chains.keys() - set(chain_ids):
        drop_log.note("chains without a box (the scene, not visual, unmarked)", len(unboxed))
    regions = []
    for chain_id, box in zip(chain_ids, boxes, strict=True):
        category, texts = chains.get(chain_id, Chain("", [""]))  # a box that no caption mentions
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


def _to_record(photo_id: str, image: bytes, captions: list[str], regions: list[Region]) -> Record:
    return Record(
        id=photo_id,
        image=image,
        width=0,  # of the image file: set by validate_record
        height=0,
        captions=captions,
        regions=regions,
        source=SOURCE,
    )
