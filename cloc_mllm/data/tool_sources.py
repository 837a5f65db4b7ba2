"""The annotation tools whose own formats `cloc-mllm data build` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cloc_mllm.data.readers.cvat import read_cvat
from cloc_mllm.data.readers.label_studio import read_label_studio
from cloc_mllm.data.readers.labelme import read_labelme
from cloc_mllm.data.readers.via import read_via

_IMAGES = "folder, tar or zip"


def add_tools(sources: Any, add: Any) -> None:
    """Adds a parser for each tool, with `sources._add`, which adds a source that reads files."""
    _add_cvat(sources, add)
    _add_label_studio(sources, add)
    _add_labelme(sources, add)
    _add_via(sources, add)


def _add_cvat(sources: Any, add: Any) -> None:
    parser = add(
        sources,
        "cvat",
        "CVAT for images 1.1: annotations.xml",
        lambda args, options, drop_log: read_cvat(
            args.annotations,
            args.images,
            expression_attribute=args.expression_attribute,
            options=options,
            drop_log=drop_log,
        ),
        "--annotations task.zip --expression_attribute words",
        annotations="annotations.xml, or the folder or zip that holds it",
    )
    parser.add_argument(
        "--images", metavar="PATH", type=Path, help=f"{_IMAGES} (default: where the XML lies)"
    )
    parser.add_argument(
        "--expression_attribute",
        metavar="NAME",
        default="",
        help="attribute of a shape that holds a referring expression",
    )


def _add_label_studio(sources: Any, add: Any) -> None:
    parser = add(
        sources,
        "label-studio",
        "Label Studio's JSON or JSON-MIN export",
        lambda args, options, drop_log: read_label_studio(
            args.annotations,
            args.images,
            image_key=args.image_key,
            all_annotations=args.all_annotations,
            options=options,
            drop_log=drop_log,
        ),
        "--annotations export.json --images media/upload",
        annotations="the exported JSON",
        images=_IMAGES,
    )
    parser.add_argument(
        "--image_key",
        metavar="KEY",
        default="",
        help="of a task's data (default: `image`, or the only text that names an image)",
    )
    parser.add_argument(
        "--all_annotations",
        action="store_true",
        help="keep the shapes of every annotator (default: the ground truth, else the first)",
    )


def _add_labelme(sources: Any, add: Any) -> None:
    parser = add(
        sources,
        "labelme",
        "LabelMe and X-AnyLabeling: a JSON file per image",
        lambda args, options, drop_log: read_labelme(
            args.annotations,
            args.images,
            descriptions=args.descriptions,
            options=options,
            drop_log=drop_log,
        ),
        "--annotations photos",
        annotations="folder, tar or zip of NAME.json, or one of them",
    )
    parser.add_argument(
        "--images", metavar="PATH", type=Path, help=f"{_IMAGES} (default: where the JSON lies)"
    )
    parser.add_argument(
        "--descriptions",
        action="store_true",
        help="the description of a shape is a referring expression",
    )


def _add_via(sources: Any, add: Any) -> None:
    parser = add(
        sources,
        "via",
        "VGG Image Annotator 2 (or 1): project, or annotations as JSON or CSV",
        lambda args, options, drop_log: read_via(
            args.annotations,
            args.images,
            phrase_attribute=args.phrase_attribute,
            options=options,
            drop_log=drop_log,
        ),
        "--annotations via_project.json --images photos --phrase_attribute label",
        annotations="via_project.json, or the exported JSON or CSV",
        images=_IMAGES,
    )
    parser.add_argument(
        "--phrase_attribute",
        metavar="NAME",
        default="",
        help="attribute of a region that says what is in it (default: the only one)",
    )
