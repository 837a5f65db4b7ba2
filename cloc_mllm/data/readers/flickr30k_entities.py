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

from cloc_mllm.box import Box, clip_box
from cloc_mllm.data.readers import DEFAULTS, ReadOptions, deliver, open_photos, single
from cloc_mllm.data.readers.boxes import BoxFrame, box_frame
from cloc_mllm.data.readers.files import Files, open_files
from cloc_mllm.data.readers.pascal_voc import CORNERS
from cloc_mllm.data.readers.places import Place, Reading
from cloc_mllm.data.records import DropLog, Record, Region
from cloc_mllm.data.texts import decode, lines_of, parse_xml

SOURCE = "flickr30k-entities"
_MENTION = re.compile(r"\[/EN#(?P<chain>\d+)/(?P<types>\S+) (?P<text>[^\]]*)\]")


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


def read_flickr30k_entities(
    annotations: str | Path,
    images: str | Path,
    *,
    ids: Sequence[str] | None = None,
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per photo with its captions and one region per box.

    A region's phrase is its chain's first mention, the chain's other mentions are `expressions`
    and the chain's id is `group`. Its type (people, clothing, bodyparts, other) is no `category`:
    it does not name the thing, and the photo shows more of its type than is annotated. A box that
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
    ):
        chosen = [PurePosixPath(name).stem for name in xml_files.names()] if ids is None else ids
        with open_photos(
            images, drop_log, options, single(chosen), tell_unused=ids is None
        ) as photos:
            for photo_id in chosen:
                try:
                    parsed = _parsed(xml_files, sentence_files, photo_id, options.encoding)
                except _BAD_ANNOTATION as error:
                    drop_log.add("record", photo_id, "bad_annotation", f"{photo_id}: {error}")
                    continue
                if isinstance(parsed, str):
                    drop_log.add("record", photo_id, "missing_annotation", parsed)
                    continue
                root, text = parsed
                captions, chains = parse_sentences(text)
                photo = photos.find(photo_id)
                frame = photo.frame(*_stated_size(root))
                regions = _to_regions(root, frame, chains, drop_log)
                yield from deliver(photo_id, photo, SOURCE, captions, regions, drop_log)


_BAD_ANNOTATION = (ValueError, ET.ParseError)  # another encoding, no XML


def _parsed(
    xml_files: Files, sentence_files: Files, photo_id: str, encoding: str = ""
) -> tuple[ET.Element, str] | str:
    """The XML's root and the sentences of a photo, or which file is missing."""
    xml = xml_files.read(f"{photo_id}.xml")
    sentences = sentence_files.read(f"{photo_id}.txt")
    if xml is None or sentences is None:
        return f"no {photo_id}.xml" if xml is None else f"no {photo_id}.txt"
    root = parse_xml(xml, f"{photo_id}.xml", encoding)
    return root, decode(sentences, f"{photo_id}.txt", encoding)


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
            try:
                parsed = _parsed(xml_files, sentence_files, photo_id)
            except _BAD_ANNOTATION as error:
                raise ValueError(f"{annotations}, photo {photo_id!r}: {error}") from error
            if isinstance(parsed, str):
                raise ValueError(
                    f"{annotations} has no annotation of photo {photo_id!r} ({parsed}); take "
                    "records that were built from these annotations"
                )
            root, text = parsed
            boxes_of = _usable_boxes(root, notes)
            yield from _mentions_of(photo_id, lines_of(text), boxes_of, notes)


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
    frame = box_frame(None, *_stated_size(root))
    for chain, _, box in _chain_boxes(root, frame):
        clipped, _ = clip_box(box, 1.0, 1.0, min_size_px=0.0)
        if clipped is None:
            notes["unusable_box"] += 1
        else:
            boxes_of.setdefault(chain, []).append(clipped)
    return boxes_of


def parse_sentences(text: str) -> tuple[list[str], dict[str, list[str]]]:
    """Reads a sentence file: its captions without marks, and the distinct names of each chain."""
    chains: dict[str, list[str]] = {}
    for mention in _MENTION.finditer(text):
        names = chains.setdefault(mention["chain"], [])
        if mention["text"].casefold() not in map(str.casefold, names):
            names.append(mention["text"])
    lines = lines_of(_MENTION.sub(lambda mention: mention["text"], text))
    return [line for line in lines if line.strip()], chains


def _stated_size(root: ET.Element) -> tuple[str | None, str | None]:
    return root.findtext("size/width"), root.findtext("size/height")


def _chain_boxes(root: ET.Element, frame: BoxFrame) -> list[tuple[str, list[str | None], Box]]:
    """Lists chain, corners as stated, and box; a box of several chains comes once per chain."""
    chain_ids: list[str] = []
    rows: list[list[str | None]] = []
    for thing in root.iter("object"):
        if thing.find("bndbox") is not None:  # else flagged `scene` or `nobndbox`
            named = [name.text or "" for name in thing.findall("name")] or [""]
            chain_ids += named
            rows += [[thing.findtext(f"bndbox/{corner}") for corner in CORNERS]] * len(named)
    return list(zip(chain_ids, rows, frame.from_xyxy(rows), strict=True))


def _to_regions(
    root: ET.Element, frame: BoxFrame, chains: dict[str, list[str]], drop_log: DropLog
) -> list[Region]:
    boxes = _chain_boxes(root, frame)
    unboxed = chains.keys() - {chain_id for chain_id, _, _ in boxes}
    drop_log.note("chains without a box (the scene, not visual, unmarked)", len(unboxed))
    regions = []
    for chain_id, stated, box in boxes:
        phrase, *others = chains.get(chain_id, [""])  # "" for a box that no caption mentions
        regions.append(
            Region(
                box=box,
                phrase=phrase,
                expressions=others,
                group=chain_id,
                found=stated,
            )
        )
    return regions


def looks_like_flickr30k_entities(place: Place) -> Iterator[Reading]:
    parts = {part for name in place.names for part in name.split("/")[:-1]}
    if {"Annotations", "Sentences"} <= parts:
        why = f"{place.path.resolve().name} holds the folders Annotations and Sentences"
        yield Reading(why, {"annotations": place.path}, "pixels")
