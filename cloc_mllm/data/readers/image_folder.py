"""Images in one folder a class, as ImageNet and torchvision's `ImageFolder` lay them out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from cloc_mllm.data.readers import DEFAULTS, ReadOptions, deliver, open_photos
from cloc_mllm.data.readers.names import ids_of_names, is_image_name
from cloc_mllm.data.readers.places import Place, Reading
from cloc_mllm.data.records import DropLog, Record
from cloc_mllm.data.texts import lines_of, read_json, read_text

SOURCE = "image-folder"
_WNID = re.compile(r"n\d{8}")
_NUM_IMAGENET_CLASSES = 1000


def read_image_folder(
    images: str | Path,
    *,
    class_names: str | Path | None = None,
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per image `images/CLASS/FILE`; its only caption is the class's name.

    Args:
        images: folder, tar or zip of folders; images in folders below a class belong to it.
        class_names: what the folders mean, see `read_class_names`. Without it a folder's own name
            counts, underscores as spaces; for ImageNet's 1,000 folders (`n01440764`, ...) it is
            open_clip's list, which is in the order of the sorted folders.

    Raises:
        ValueError: no folder in `images`, a folder without a name, or `n01440764`-like folders
            that are not all 1,000 and come without `class_names`.
    """
    with open_photos(images, drop_log, options, tuple) as photos:
        paths = [path for path in photos.files.names() if is_image_name(path) and "/" in path]
        folders = sorted({path.partition("/")[0] for path in photos.files.names() if "/" in path})
        if Path(images).is_dir():  # with the empty ones: ImageNet's names go by their order
            folders = sorted(path.name for path in Path(images).iterdir() if path.is_dir())
        names = _names_of(folders, class_names, images, options)
        ids = ids_of_names(paths)
        for path in paths:
            captions = [names[path.partition("/")[0]]]
            yield from deliver(ids[path], photos.find(path), SOURCE, captions, [], drop_log)


def read_class_names(path: str | Path, options: ReadOptions = DEFAULTS) -> dict[str, str]:
    """Reads folder -> name from a JSON object or from lines `n01440764 tench, Tinca tinca`.

    Of several names, parted by commas, the first counts. Underscores become spaces.

    Raises:
        ValueError: not such a file.
    """
    if Path(path).suffix.lower() == ".json":
        table = read_json(path, options.encoding)
        pairs = list(table.items()) if isinstance(table, dict) else []
    else:
        words = [line.split() for line in lines_of(read_text(path, options.encoding))]
        pairs = [(folder[0], " ".join(folder[1:])) for folder in words if folder]
    names = {folder: _first_name(name) for folder, name in pairs}
    if not names or not all(names.values()):
        missing = [folder for folder, name in names.items() if not name]
        raise ValueError(
            f"{path}: expected a JSON object folder -> name, or lines `folder name`; got no name "
            f"for {missing or 'anything'}"
        )
    return names


def _first_name(name: object) -> str:
    return name.split(",")[0].replace("_", " ").strip() if isinstance(name, str) else ""


def _names_of(
    folders: list[str],
    class_names: str | Path | None,
    images: str | Path,
    options: ReadOptions,
) -> dict[str, str]:
    if not folders:
        raise ValueError(f"{images} has no folder; expected one folder of images per class")
    if class_names is not None:
        names = read_class_names(class_names, options)
        if unknown := [folder for folder in folders if folder not in names]:
            raise ValueError(f"{class_names} has no name for the folders {unknown[:5]}")
        return names
    if not all(map(_WNID.fullmatch, folders)):
        return {folder: _first_name(folder) or folder for folder in folders}
    if len(folders) != _NUM_IMAGENET_CLASSES:
        raise ValueError(
            f"{images} has {len(folders)} WordNet folders ({folders[0]}, ...), not ImageNet's "
            f"{_NUM_IMAGENET_CLASSES}; say what they are with --class_names"
        )
    from open_clip import IMAGENET_CLASSNAMES

    return dict(zip(folders, IMAGENET_CLASSNAMES, strict=True))


def looks_like_image_folder(place: Place) -> Iterator[Reading]:
    """Folders of images and nothing else; whether their names are classes nobody knows."""
    images = [name for name in place.names if is_image_name(name)]
    folders = {name.partition("/")[0] for name in images if "/" in name}
    are_alone = len(images) == len(place.names) and all("/" in name for name in images)
    if are_alone and len(folders) > 1:
        why = f"{place.path.resolve().name} holds nothing but images in {len(folders):,} folders"
        are_wnids = all(map(_WNID.fullmatch, folders))
        doubt = "" if are_wnids else "whether the folders are classes, nothing says"
        yield Reading(why, {"images": place.path}, needs_images=False, doubt=doubt)
