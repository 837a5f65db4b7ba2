"""Images in one folder a class, as ImageNet and torchvision's `ImageFolder` lay them out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from cloc_mllm.data.readers.files import IMAGE_SUFFIXES, open_files, read_image, read_json
from cloc_mllm.data.records import DropLog, Record, validate_record

SOURCE = "image-folder"
_WNID = re.compile(r"n\d{8}")
_NUM_IMAGENET_CLASSES = 1000


def read_image_folder(
    images: str | Path, *, class_names: str | Path | None = None, drop_log: DropLog
) -> Iterator[Record]:
    """One record an image `images/CLASS/FILE`; its only caption is the class's name.

    Args:
        images: folder of folders.
        class_names: what the folders mean, see `read_class_names`. Without it a folder's own name
            counts, underscores as spaces; for ImageNet's 1,000 folders (`n01440764`, ...) it is
            open_clip's list, which is in the order of the sorted folders.

    Raises:
        ValueError: no folder in `images`, a folder without a name, or `n01440764`-like folders
            that are not all 1,000 and come without `class_names`.
    """
    folders = sorted(path for path in Path(images).iterdir() if path.is_dir())
    names = _names_of([path.name for path in folders], class_names, images)
    for folder in folders:
        with open_files(folder) as files:
            for file_name in files.names():
                if not file_name.lower().endswith(IMAGE_SUFFIXES):
                    drop_log.note("files that are no image by their name")
                    continue
                record = Record(
                    id=f"{folder.name}/{Path(file_name).stem}",
                    image=read_image(files, file_name),
                    width=0,  # of the image file: set by validate_record
                    height=0,
                    captions=[names[folder.name]],
                    regions=[],
                    source=SOURCE,
                )
                valid = validate_record(record, drop_log)
                if valid is not None:
                    yield valid


def read_class_names(path: str | Path) -> dict[str, str]:
    """Folder -> name, from a JSON object or from lines `n01440764 tench, Tinca tinca`.

    Of several names, parted by commas, the first counts. Underscores become spaces.

    Raises:
        ValueError: not such a file.
    """
    if Path(path).suffix == ".json":
        table = read_json(path)
        pairs = list(table.items()) if isinstance(table, dict) else []
    else:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        words = [line.split() for line in lines if line.strip()]
        pairs = [(folder, " ".join(name)) for folder, *name in words]
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
    folders: list[str], class_names: str | Path | None, images: str | Path
) -> dict[str, str]:
    if not folders:
        raise ValueError(f"{images} has no folder; expected one folder of images a class")
    if class_names is not None:
        names = read_class_names(class_names)
        if unknown := [folder for folder in folders if folder not in names]:
            raise ValueError(f"{class_names} has no name for the folders {unknown[:5]}")
        return names
    if not all(map(_WNID.fullmatch, folders)):
        return {folder: _first_name(folder) or folder for folder in folders}
    if len(folders) != _NUM_IMAGENET_CLASSES:
        raise ValueError(
            f"{images} has {len(folders)} WordNet folders ({folders[0]}, ...), not ImageNet's "
            f"{_NUM_IMAGENET_CLASSES}; say what they are with --class-names"
        )
    from open_clip import IMAGENET_CLASSNAMES

    return dict(zip(folders, IMAGENET_CLASSNAMES, strict=True))
