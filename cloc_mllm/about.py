"""`cloc-mllm models` and `cloc-mllm doctor`: what is here, and whether it works."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cloc_mllm import __version__
from cloc_mllm.extras import EXTRA_OF_PACKAGE, install_command
from cloc_mllm.shipped import ASSETS, SHIPPED_MODELS, ModelKind

_LIBRARIES = [
    "torch",
    "torchvision",
    "transformers",
    "open_clip_torch",
    "timm",
    "peft",
    "deepspeed",
    "ray",
    "gradio",
    "fastapi",
]
_GIB = 2**30


class _Shipped(NamedTuple):
    """What is listed of a shipped model; a test compares `scores` with assets/README.md."""

    name: str
    kind: ModelKind
    licence: str
    scores: str


_SHIPPED = (
    _Shipped(
        "photos",
        "cloc",
        "Apache-2.0; learnt from Flickr8k, whose photos are non-commercial",
        "247 photos of Flickr8k: text→box Acc@0.5 65.1 %, names word F1 32.2; RefCOCO 26.7 %",
    ),
    _Shipped(
        "photos",
        "mllm",
        "Apache-2.0, on SmolLM2-135M; learnt from Flickr8k, whose photos are non-commercial",
        "247 photos of Flickr8k: phrases Acc@0.5 61.2 %; never trained on: RefCOCO 27.1 %",
    ),
    _Shipped("scenes", "cloc", "Apache-2.0", "500 test scenes: text→box Acc@0.5 70.6 %"),
    _Shipped("scenes", "mllm", "Apache-2.0", "500 test scenes: expressions Acc@0.5 89.4 %"),
)


def main_models(argv: Sequence[str] | None = None) -> int:
    """`cloc-mllm models [FOLDER]`."""
    parser = argparse.ArgumentParser(
        prog="cloc-mllm models",
        description="List the models that ship and those that lie in a folder.",
    )
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path("runs"),
        metavar="FOLDER",
        help="where trainings wrote to (default: %(default)s)",
    )
    folder = parser.parse_args(argv).folder
    for model in _SHIPPED:
        directory = ASSETS / model.name / model.kind
        print(f"{model.name} ({_described(directory)})")
        print(f"  knows    {SHIPPED_MODELS[model.name]}")
        print(f"  scores   {model.scores}")
        print(f"  licence  {model.licence}")
        print(f"  path     {directory}")
    print(f"model card: {ASSETS / 'README.md'}")
    found = [*_local_models(folder)]
    print(f"\nin {folder}: {'no model' if not found else ''}".rstrip())
    for directory in found:
        print(f"  {directory}  ({_described(directory)})")
    if found:
        print('ask one with: cloc-mllm ground PHOTO "the dog" --model PATH')
    return 0


def main_doctor(argv: Sequence[str] | None = None) -> int:
    """`cloc-mllm doctor [DIRECTORY]`; exit status 2 for a model that would not load."""
    parser = argparse.ArgumentParser(
        prog="cloc-mllm doctor",
        description="Say what this machine has, which extras are missing, and whether a model's "
        "files fit this version. Annotations have a doctor of their own: cloc-mllm data doctor.",
    )
    parser.add_argument("model", nargs="?", metavar="DIRECTORY", help="a model to check, too")
    model = parser.parse_args(argv).model
    for name, value in (*_versions(), *_machine()):
        print(f"{name:<16} {value}")
    missing = _missing_extras()
    for extra, packages in missing.items():
        print(f"extra {extra:<10} lacks {', '.join(packages)}: {install_command(extra)}")
    if not missing:
        print("extras           all installed")
    if model:
        print(f"{model}: {_check_model(model)}")
    return 0


def _described(directory: Path) -> str:
    """The kind of a model and the size of its files."""
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    kind = "language model" if _is_mllm(directory) else "CLOC"
    return f"{kind}, {size / 1e6:.0f} MB"


def _is_mllm(directory: Path) -> bool:
    return (directory / "processor_config.json").is_file()


def _local_models(folder: Path) -> Iterator[Path]:
    """Finds the model directories that stage 1, stage 2 or an export wrote below a folder."""
    for path in sorted(folder.rglob("config.json")):
        if not (path.parent / "model.safetensors").is_file():
            continue
        contents = json.loads(path.read_text(encoding="utf-8"))
        if "fingerprint" in contents and ("model" in contents or _is_mllm(path.parent)):
            yield path.parent


def _versions() -> Iterator[tuple[str, str]]:
    yield "cloc-mllm", __version__
    yield "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for name in _LIBRARIES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"


def _machine() -> Iterator[tuple[str, str]]:
    import torch

    from cloc_mllm.devices import resolve_precision

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    for index, gpu in enumerate(gpus):
        yield f"GPU {index}", f"{gpu.name}, {gpu.total_memory / _GIB:.0f} GiB"
    if not gpus:
        yield "GPU", "none; everything runs on the CPU, large models slowly"
    yield "CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for torch"
    yield "precision", f"{resolve_precision('auto')} (what `auto` takes here)"
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        page = os.sysconf("SC_PAGE_SIZE") / _GIB
        total, free = (os.sysconf(f"SC_{which}_PAGES") * page for which in ("PHYS", "AVPHYS"))
        yield "memory", f"{total:.0f} GiB, {free:.0f} GiB of it unused"
    disk = shutil.disk_usage(Path.cwd())
    yield "disk", f"{disk.free / _GIB:.0f} GiB free in {Path.cwd()}"


def _missing_extras() -> dict[str, list[str]]:
    """The packages that each extra lacks, by the extra."""
    missing: dict[str, list[str]] = {}
    for package, extra in sorted(EXTRA_OF_PACKAGE.items(), key=lambda item: item[::-1]):
        if importlib.util.find_spec(package) is None:
            missing.setdefault(extra, []).append(package)
    return missing


def _check_model(named: str) -> str:
    """Compares a model's fingerprint with what this version does, and its file with its header.

    Raises:
        FileNotFoundError: there is no model.
        ValueError: the preprocessing differs, or the weights' file is not whole.
    """
    directory = ASSETS / named / "cloc" if named in SHIPPED_MODELS else Path(named)
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{named} is no model: there is no config.json; stage 1 and 2 write one into "
            "OUTPUT_DIR/model"
        )
    contents: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "fingerprint" not in contents:
        raise ValueError(f"{path} has no fingerprint; expected what stage 1 or stage 2 wrote")
    from cloc_mllm.models.build import check_fingerprint

    check_fingerprint(contents["fingerprint"], _fingerprint_now(directory), named)
    return f"fingerprint fits this version; {_count_tensors(directory)}"


def _fingerprint_now(directory: Path) -> dict[str, Any]:
    if _is_mllm(directory):
        from cloc_mllm.mllm import ClocMllmProcessor

        return dict(ClocMllmProcessor.from_pretrained(directory).fingerprint)
    from cloc_mllm.data.transforms import Preprocessing
    from cloc_mllm.models.build import load_tokenizer
    from cloc_mllm.models.clip_config import read_cloc_config

    config = read_cloc_config(directory)
    return dict(Preprocessing.of(config).fingerprint(load_tokenizer(config)))


def _count_tensors(directory: Path) -> str:
    from safetensors import SafetensorError, safe_open

    total = 0
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as weights:
                total += len(weights.keys())
        except SafetensorError as error:
            raise ValueError(f"{path} is not whole: {error}; copy or export it again") from error
    return f"{total} tensors" if total else "no weights in it"
