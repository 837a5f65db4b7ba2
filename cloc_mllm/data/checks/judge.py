"""Finds out the format of annotations: every source whose layout fits reads the first records.

A reading is judged by what its reader delivers, so the recommended command is the one that was run.
Nothing is concluded from the size of numbers alone: if two readings fit, both are returned with the
evidence for them.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from cloc_mllm.box import Box
from cloc_mllm.data.chats import Chat
from cloc_mllm.data.checks.frames import (
    FRAMES,
    MIN_BOXES,
    MIN_INSIDE,
    MIN_REACH,
    ORDERS,
    Case,
    Evidence,
    weigh,
    written,
)
from cloc_mllm.data.conversation_sources import CHATS_ALONE, CONVERSATIONS, ConversationKind
from cloc_mllm.data.drop_log import KINDS, DropLog, note_line, set_aside_lines
from cloc_mllm.data.images import FILE_FORMATS, read_header
from cloc_mllm.data.readers.boxes import UNTOLD, BoxOrder
from cloc_mllm.data.readers.names import is_image_name
from cloc_mllm.data.readers.photos import DEFAULTS, OTHER_FILES, UNNAMED_IMAGES, ReadOptions
from cloc_mllm.data.readers.places import Place, Reading
from cloc_mllm.data.reasons import NUMBERS_AS_WORDS
from cloc_mllm.data.records import Record
from cloc_mllm.data.sources import LOOKS, add_formats

NUM_ITEMS = 200  # records or chats per reading that are judged
MAX_DROP_SHARE = 0.05  # as in `data build`
_LOW_REACH = 0.75  # if declared boxes reach less far, another frame that fits is worth a question
_WHOLES = ("record", "chat")  # what a reader yields
_NOT_THERE = ("missing_image", "ambiguous_image")  # says nothing of the layout
_SLACK = 0.01
_TINY_REACH = 0.05  # boxes that all end this near to the first corner are of another frame
_OBLONG = 0.9  # short over long side
_PLACEHOLDER = Path("IMAGES")  # in a command, for the user to fill in
Size = tuple[float, float]


@dataclass
class Judgement:
    """One reading and how it went.

    Attributes:
        options: of `data build SOURCE`, --images and --boxes_of among them.
        boxes: (xyxy in 0..1 as stated, unclipped; size of the image) of each box.
        phrases: the phrase of each box.
        turned: the boxes in photos with an EXIF turn.
        items: the first records or chats that were delivered.
        share_missing: share of the items whose image is not there.
        faults: reasons why the files have another format.
        doubts: reasons why they may have another format nevertheless.
    """

    source: str
    reading: Reading
    options: dict[str, Any]
    log: DropLog = field(default_factory=DropLog)
    boxes: list[tuple[Box, Size]] = field(default_factory=list)
    phrases: list[Any] = field(default_factory=list)
    turned: list[Box] = field(default_factory=list)
    items: list[Record | Chat] = field(default_factory=list)
    share_missing: float = 0.0
    faults: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    evidence: Evidence | None = None

    @property
    def is_blind(self) -> bool:
        """Whether no image was found, so that the layout alone is judged."""
        return not self.items and not self.faults

    def parsed(self) -> argparse.Namespace:
        """The arguments of the command; its `read(args, drop_log)` yields records or chats."""
        parser = argparse.ArgumentParser()
        add_formats(parser.add_subparsers(dest="source"))
        return parser.parse_args([self.source, *arguments(self.options)])

    def command(self, output_dir: str | Path = "runs/data/NAME") -> str:
        """The command that builds it, to be pasted into a shell."""
        words = ["cloc-mllm", "data", "build", self.source, *arguments(self.options)]
        return shlex.join([*words, "--output_dir", str(output_dir)])


def arguments(options: Mapping[str, Any]) -> list[str]:
    """Writes options as they are typed."""
    words: list[str] = []
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value not in (None, False, ""):
            words += [f"--{name}", str(value)]
    return words


def judge(
    path: str | Path,
    images: str | Path | None = None,
    options: ReadOptions = DEFAULTS,
    kind: ConversationKind | Literal[""] = "",
) -> list[Judgement]:
    """Judges every reading of what lies at a path: the ones that fit first.

    Args:
        path: a file, a folder, a zip or a tar.
        images: the place of the images; without it they are looked for in and beside `path`.
        options: the user's options for all files.
        kind: what conversations are read as; "" is chats wherever there are turns.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: a file cannot be parsed, or has another encoding.
    """
    place = Place(path, options.encoding)
    if not place.names and not Path(path).exists() and place.sibling(place.path.name) is None:
        raise FileNotFoundError(f"no such file, folder or archive: {path}")
    judgements: list[Judgement] = []
    seen: set[str] = set()
    said: dict[str, Any] = {"encoding": options.encoding}
    if options.boxes_of != DEFAULTS.boxes_of:
        said["boxes_of"] = options.boxes_of
    if options.restore_shape:
        said["restore_shape"] = True
    if options.max_side:
        said["max_side"] = options.max_side
    if images is not None:
        said["images"] = Path(images)
    tables = [Place(table, options.encoding, is_named=False) for table in place.tables()]
    for at in [place, *tables]:
        try:
            found = [
                (source, list(looks_like(at)))
                for source, looks_like in LOOKS.items()
                if kind != "regions" or source not in CHATS_ALONE
            ]
        except ValueError as error:
            if at is place:
                raise
            judgements.append(Judgement("unreadable", Reading(at.path.name, {}), {}))
            judgements[-1].faults.append(str(error))
            continue
        for source, readings in found:
            new = [reading for reading in readings if repr((source, reading.options)) not in seen]
            seen |= {repr((source, reading.options)) for reading in new}
            if new:
                places = [said["images"]] if images is not None else _image_places(at, place)
                of_kind = {"as": kind} if source in CONVERSATIONS else {}
                judgements += _judged_together(source, new, {**said, **of_kind}, places)
    _part(judgements)
    judgements = [judgement for judgement in judgements if not _is_weaker(judgement, judgements)]
    return sorted(judgements, key=lambda judgement: bool(judgement.faults))


def _is_weaker(judgement: Judgement, others: list[Judgement]) -> bool:
    """Whether another reading that fits takes more of the files, or is no guess as this one is."""
    files = _files(judgement)
    return any(
        not other.faults
        and (
            (files and files < _files(other))
            or (files == _files(other) and judgement.reading.is_general > other.reading.is_general)
            or bool(judgement.reading.doubt) > bool(other.reading.doubt)
        )
        for other in others
    )


def _files(judgement: Judgement) -> set[Path]:
    values = judgement.reading.options.values()
    listed = [value if isinstance(value, list) else [value] for value in values]
    return {value for value in itertools.chain.from_iterable(listed) if isinstance(value, Path)}


def _image_places(place: Place, whole: Place) -> list[Path]:
    """Lists places of the images: beside an annotation file, and in the folder that was named."""
    return list(dict.fromkeys([*place.image_places(), *whole.image_places()]))


def _judged_together(
    source: str, readings: list[Reading], said: dict[str, Any], places: list[Path]
) -> list[Judgement]:
    """Judges the readings of one source. If several read the same files, the numbers that the first
    found tell which of the others are worth another reading."""
    judged: list[Judgement] = []
    for reading in readings:
        options = {**reading.options, **said}
        if "images" in said and "images" not in reading.options:  # added below where needed
            del options["images"]
        new = Judgement(source, reading, options)
        first = next((item for item in judged if item.boxes and _are_of_one_file(item, new)), None)
        if first is not None and (fault := _misfit(first, reading)):
            new.faults.append(fault)
            judged.append(new)
            continue
        known = first.options.get("images") if first is not None else None
        judged += _judged(source, reading, options, [known] if known else places)
    return judged


def _misfit(first: Judgement, reading: Reading) -> str:
    """Says why boxes that were read in another frame do not fit into this one; "" if they do, or
    if it has none."""
    if not reading.frame:
        return ""
    frame, order = first.reading.frame, first.reading.order
    cases = [Case(written(box, frame, order, size), size) for box, size in first.boxes]
    evidence = weigh(cases, reading.frame, reading.order)
    is_tiny = evidence.reach < _TINY_REACH and len(cases) >= MIN_BOXES
    return f"as {_said(evidence, reading.order)}" if evidence.inside < MIN_INSIDE or is_tiny else ""


def _judged(
    source: str, reading: Reading, options: dict[str, Any], places: list[Path]
) -> list[Judgement]:
    """Judges a reading with the place of images that leaves the fewest missing; twice if photos
    have an EXIF turn and nothing tells whether the boxes are turned, too."""
    if reading.lacks:
        return [Judgement(source, reading, options)]
    if reading.needs_images and not places:
        return [Judgement(source, reading, {**options, "images": _PLACEHOLDER})]
    tried = []
    for images in places if reading.needs_images else [None]:
        tried.append(_run(source, reading, {**options, "images": images} if images else options))
        if not tried[-1].share_missing:
            break
    best = min(tried, key=lambda judgement: judgement.share_missing)
    if best.share_missing == 1 and len(places) > 1:
        best.options["images"] = _PLACEHOLDER
    if UNTOLD not in best.log.notes or not best.turned:
        return [best]
    both = [_run(source, reading, {**best.options, "boxes_of": k}) for k in ("upright", "stored")]
    for judgement in both:
        inside = _share_inside(judgement.turned)
        if inside < MIN_INSIDE and not judgement.faults:
            judgement.faults.append(
                f"--boxes_of {judgement.options['boxes_of']}: {inside:.1%} of "
                f"{len(judgement.turned):,} boxes of photos with an EXIF turn lie in them"
            )
    return both


def _share_inside(boxes: list[Box]) -> float:
    return sum(min(box) >= -_SLACK and max(box) <= 1 + _SLACK for box in boxes) / max(1, len(boxes))


def _run(source: str, reading: Reading, options: dict[str, Any]) -> Judgement:
    judgement = Judgement(source, reading, options, doubts=[reading.doubt] if reading.doubt else [])
    judgement.log.watch = lambda *found: _keep_boxes(judgement, *found)
    args = judgement.parsed()
    try:
        with closing(args.read(args, judgement.log)) as items:
            judgement.items = list(itertools.islice(items, NUM_ITEMS))
    except ValueError as error:
        judgement.faults.append(str(error))
        return judgement
    _weigh_losses(judgement)
    if judgement.boxes and reading.frame:
        _weigh_boxes(judgement, reading.frame, reading.order)
    return judgement


def _keep_boxes(judgement: Judgement, image: bytes, boxes: list[Box], phrases: list[Any]) -> None:
    header = read_header(image, formats=FILE_FORMATS)
    if header is None:
        return
    width, height = map(float, header.upright_wh)
    finite = [box for box in boxes if all(map(math.isfinite, box))]
    judgement.boxes += [(box, (width, height)) for box in finite]
    judgement.phrases += phrases
    if header.turn is not None:
        judgement.turned += finite


def _weigh_losses(judgement: Judgement) -> None:
    log = judgement.log
    dropped = [drop.reason for drop in log.drops if drop.kind in _WHOLES]
    num_missing = sum(reason in _NOT_THERE for reason in dropped)
    num_read = len(dropped) + len(judgement.items)
    judgement.share_missing = num_missing / max(1, num_read)
    for kind in KINDS:
        reasons = log.counts.get(kind, {})
        lost = {reason: count for reason, count in reasons.items() if reason not in _NOT_THERE}
        share = sum(lost.values()) / max(1, sum(lost.values()) + log.delivered[kind])
        if share > MAX_DROP_SHARE:
            listed = ", ".join(f"{reason} {count:,}" for reason, count in lost.items())
            reason = max(lost, key=lambda reason: lost[reason])
            first = next(drop for drop in log.drops if (drop.kind, drop.reason) == (kind, reason))
            found = f"; first {first.item!r}: {first.found}" if first.found else ""
            judgement.faults.append(f"{share:.0%} of the {kind}s are lost ({listed}){found}")
    holds_parts = any(log.delivered[kind] for kind in KINDS if kind not in (*_WHOLES, "row"))
    if judgement.items and not holds_parts:
        judgement.faults.append("no record has a region or a caption, no chat a turn")
    if not num_read and not judgement.faults:
        judgement.faults.append("it holds no record")
    num_words, num_chats = log.notes[NUMBERS_AS_WORDS], log.delivered["chat"]
    if num_words > MAX_DROP_SHARE * num_chats and not log.delivered["place"]:
        judgement.doubts.append("no box was read; what looks like one is words, see the note")


def _weigh_boxes(judgement: Judgement, frame: str, order: BoxOrder) -> None:
    """Checks whether the boxes lie in their images as they are read, and what else they may be."""
    cases = [Case(written(box, frame, order, size), size) for box, size in judgement.boxes]
    evidence = judgement.evidence = weigh(cases, frame, order)
    is_inside = evidence.inside >= MIN_INSIDE
    if is_inside and (evidence.reach >= _LOW_REACH or len(cases) < MIN_BOXES):
        return
    others: list[str] = []
    for other_order in sorted(ORDERS, key=lambda other: other != order):
        weighed = [
            weigh(cases, other, other_order)
            for other in FRAMES
            if other != frame or other_order != order
        ]
        fitting = [
            item for item in weighed if item.inside >= MIN_INSIDE and item.reach >= MIN_REACH
        ]
        if len(cases) >= MIN_BOXES and not others:  # try another order only if this one fits none
            others = [f"as {_said(item, other_order)}" for item in fitting]
    said = f"as {_said(evidence, order)}"
    if not is_inside:
        judgement.faults.append("; ".join([said, *others]))
    elif others and judgement.reading.is_declared:
        judgement.doubts.append("; ".join([said, *others]))


def _said(evidence: Evidence, order: BoxOrder) -> str:
    return (
        f"{evidence.frame}, {order}: {evidence.inside:.1%} of {evidence.num_boxes:,} boxes lie in "
        f"their images and reach {evidence.reach:.0%} of the way to the far borders"
    )


def _part(judgements: list[Judgement]) -> None:
    """Marks the weaker ones among readings of one file in several frames.

    All boxes lie in their images in each of them; so boxes that reach the far borders speak for
    their frame, if there are enough of them. Readings that give the same boxes count as one.
    """
    fitting: list[Judgement] = []
    for judgement in judgements:
        same = (other for other in fitting if _are_alike(other, judgement))
        twin = next(same, None) if judgement.boxes else None
        if judgement.faults or twin is None:
            fitting += [] if judgement.faults else [judgement]
        else:
            judgement.faults.append(f"it gives the same boxes as {twin.reading.frame}")
    for judgement in fitting:
        frame = judgement.reading.frame, judgement.reading.order
        rivals = [
            other
            for other in fitting
            if _are_of_one_file(other, judgement)
            and (other.reading.frame, other.reading.order) != frame
        ]
        best = max(map(_reach, rivals), default=math.nan)
        if best >= MIN_REACH > _reach(judgement):  # NaN, of too few boxes, is neither
            judgement.faults.append(f"another frame reaches {best:.0%}")


def _are_of_one_file(first: Judgement, second: Judgement) -> bool:
    return first.source == second.source and _files(first) == _files(second)


def _are_alike(first: Judgement, second: Judgement) -> bool:
    """Whether both readings have the same phrases in the same places."""
    boxes = [np.array([box for box, _ in judgement.boxes]) for judgement in (first, second)]
    return (
        _are_of_one_file(first, second)
        and first.phrases == second.phrases
        and boxes[0].shape == boxes[1].shape
        and np.allclose(boxes[0], boxes[1])
    )


def _reach(judgement: Judgement) -> float:
    """The reach of the boxes in images that are not square, in which frames differ."""
    reading = judgement.reading
    if not reading.frame:
        return math.nan
    oblong = [(box, size) for box, size in judgement.boxes if min(size) <= _OBLONG * max(size)]
    cases = [Case(written(box, reading.frame, reading.order, size), size) for box, size in oblong]
    if len(cases) < MIN_BOXES:
        return math.nan
    return weigh(cases, reading.frame, reading.order).reach


def describe_all(judgements: Sequence[Judgement]) -> str:
    """Describes the readings that fit, and says in a line each why the others do not; if none fits,
    describes all."""
    fitting = [judgement for judgement in judgements if not judgement.faults]
    if not fitting:
        return "\n\n".join(map(describe, judgements))
    others = [f"not {_named(item)}: {item.faults[0]}" for item in judgements if item.faults]
    return "\n\n".join([*map(describe, fitting), *(["\n".join(others)] if others else [])])


def _named(judgement: Judgement) -> str:
    reading = judgement.reading
    return (
        f"{judgement.source} in {reading.frame}, {reading.order}"
        if reading.frame
        else (judgement.source)
    )


def describe(judgement: Judgement) -> str:
    """Says which format a reading takes the files for, why, with what result, and the command."""
    lines = [f"{judgement.source}: {judgement.reading.why}"]
    if judgement.evidence is not None:
        lines.append(f"  boxes    {_said(judgement.evidence, judgement.reading.order)}")
    elif judgement.reading.frame:
        lines.append(
            f"  boxes    {judgement.reading.frame}, {judgement.reading.order}, as declared"
        )
    log = judgement.log
    if judgement.items:
        first = "the first " if len(judgement.items) == NUM_ITEMS else ""
        read = first + ", ".join(
            f"{log.delivered[kind]:,} {kind}s" for kind in KINDS if log.delivered[kind]
        )
        lines.append(f"  read     {read}")
    if judgement.is_blind and not judgement.reading.lacks:
        lines.append("  images   none was found; name their folder, tar or zip with --images")
    elif judgement.share_missing:
        where = judgement.options.get("images", "their folder")
        lines.append(
            f"  images   {judgement.share_missing:.0%} of them are not in {where} (where only part "
            "of them is at hand, add --max_drop_share)"
        )
    missing = (drop for drop in log.drops if drop.kind in _WHOLES and drop.reason in _NOT_THERE)
    if first_missing := next(missing, None):
        lines.append(f"           first {first_missing.item!r}: {first_missing.found}")
    notes = {
        what: count
        for what, count in log.notes.items()
        if what not in (UNNAMED_IMAGES, OTHER_FILES)
    }
    lines += [f"  {note_line(what, n, log.examples.get(what, ()))}" for what, n in notes.items()]
    lines += [f"  {line}" for line in set_aside_lines(log.set_aside, log.delivered)]
    lines += [f"  but      {fault}" for fault in judgement.faults]
    lines += [f"  doubt    {doubt}" for doubt in judgement.doubts]
    if judgement.reading.lacks:
        lines.append(f"  lacks    {judgement.reading.lacks}")
    if not judgement.faults and not judgement.reading.lacks:
        lines.append(f"  build it with\n    {judgement.command()}")
    return "\n".join(lines)


def the_one(judgements: Sequence[Judgement]) -> Judgement | None:
    """The only reading that fits, if there is one and nothing speaks against it."""
    fitting = [judgement for judgement in judgements if not judgement.faults]
    if len(fitting) != 1 or fitting[0].doubts or fitting[0].reading.lacks:
        return None
    return fitting[0]


def unknown_layout(path: str | Path, encoding: str = "") -> str:
    """Describes the content of a path that no source knows."""
    place = Place(path, encoding)
    if place.path.is_dir() and not place.names:
        return "there is no file in this folder"
    packed = [name for name in place.names or [place.path.name] if _is_packed(name)]
    if packed:
        which = packed[0] if place.names else "it"
        return f"{which} is compressed, and only zip and tar are looked into; unpack it first"
    if place.has_rows_with("question_id", "image", "text", "label"):
        return "these are POPE's questions, which `cloc-mllm eval pope` asks; they hold no box"
    keys = ", ".join(list(place.rows[0])[:8]) if place.rows else ""
    suffixes = Counter(PurePosixPath(name).suffix or "no suffix" for name in place.names)
    files = ", ".join(f"{count:,} {suffix}" for suffix, count in suffixes.most_common(5))
    holds = f" (its rows have {keys})" if keys else f" (files: {files})" if files else ""
    advice = "a table image,x1,y1,x2,y2,phrase is read by `data build csv`"
    if not place.names and place.path.suffix.lower() in (".xml", ".txt"):
        advice += "; of formats with a file per image name the folder"
    if place.path.suffix.lower() == ".parquet":
        advice += "; of Parquet, images with a column objects; save other rows as JSON lines"
    if any(map(is_image_name, place.names)):
        advice += ", and `cloc-mllm label` finds boxes in photos with sentences about them"
    return (
        f"no source of `cloc-mllm data build` has this layout{holds}; docs/how-to/data.md lists "
        f"them; {advice}"
    )


def _is_packed(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in (
        ".gz",
        ".tgz",
        ".bz2",
        ".xz",
        ".zst",
        ".7z",
        ".rar",
    )


def _are_parts(fitting: Sequence[Judgement]) -> bool:
    """Whether one source reads other files in each reading, such as a file per split."""
    files = [path for judgement in fitting for path in _files(judgement)]
    return len({item.source for item in fitting}) == 1 and 0 < len(files) == len(set(files))


def verdict(judgements: Sequence[Judgement]) -> str:
    """Says how many readings fit, and what to do unless it is one."""
    fitting = [judgement for judgement in judgements if not judgement.faults]
    if not fitting:
        return (
            "no reading fits: see what speaks against each; numbers of another frame than the "
            "layout's must be converted, or declared in the file where it can (`bbox_type`)"
        )
    if len(fitting) > 1 and _are_parts(fitting):
        return (
            f"{len(fitting)} readings fit, each of other files: if these are parts of one set, "
            "build each, then join them (`cloc-mllm data merge PART PART --prefix_ids`)"
        )
    if len(fitting) > 1:
        return f"{len(fitting)} readings fit: look at some pictures of each, and choose its command"
    if fitting[0].reading.lacks:
        return f"one reading fits; it needs {fitting[0].reading.lacks}"
    if fitting[0].doubts:
        return "one reading fits, with a doubt: if it is right, use its command"
    return f"one reading fits: {fitting[0].source}"
