"""Finds what ships inside the package: models by name (`photos`, `scenes`), configs by name."""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path
from typing import Literal

from cloc_mllm.hub import HUB_PREFIX, download_model

ModelKind = Literal["cloc", "mllm"]
# what the shipped models know, said by every command that uses one
SHIPPED_MODELS = {
    "photos": "everyday photos; for the built-in drawings use --model scenes",
    "scenes": "the 112 things of the built-in drawings; for photos use --model photos",
}
DEFAULT_MODELS: dict[ModelKind, str] = {"cloc": "photos", "mllm": "scenes"}

ASSETS = Path(__file__).resolve().parent / "assets"
CONFIGS = Path(__file__).resolve().parent / "configs"

_NAME = re.compile(r"(?:(?:training|eval)/configs/)?([\w-]+)(?:\.yaml)?")


class UnknownConfigError(ValueError):
    """Raised for the name of a config that is neither a file nor shipped."""


def find_model(kind: ModelKind, named: str | Path | None = "") -> Path:
    """Finds the directory of a model: a shipped one by its name, one of the hub by
    `hf-hub:OWNER/NAME` (`download_model`), or any other path as it came.

    `photos` and `scenes` are the shipped ones; "" and None take `photos` for a CLOC and `scenes`
    for an MLLM. The MLLM of photos is an adapter (see `mllm/assembled.py`). A folder of such a name
    in the current folder does not hide the shipped model, since `photos` is what people call
    theirs: write `./photos` for the folder. A `Path` is never a name.

    Raises:
        FileNotFoundError: no such model ships; says what to do.
    """
    name = named or DEFAULT_MODELS[kind]
    if isinstance(name, str) and name.startswith(HUB_PREFIX):
        return download_model(name)
    if isinstance(name, Path) or name not in SHIPPED_MODELS:
        return Path(name)
    directory = ASSETS / name / kind
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"no {kind} ships by the name {name}: there is none in {directory}; pass a directory "
            f"with a model you have, or run `make quickstart` to train one"
        )
    return directory


def say_what_it_knows(name: str | Path, option: str = "--model") -> None:
    """Says on standard error what a shipped model knows; nothing of any other.

    Args:
        option: of this command, that takes another model.
    """
    if name in SHIPPED_MODELS:
        known = SHIPPED_MODELS[str(name)].replace("--model", option)
        print(f"the model {name} knows {known}", file=sys.stderr)


def find_config(named: str) -> str:
    """Path of a config: of the file itself, or of a shipped one named by its bare name.

    `training/configs/NAME.yaml` and `eval/configs/NAME.yaml`, where a clone of the repository shows
    the shipped ones, name them from any folder, also where a clone has no symbolic links. Anything
    else is returned as it came.

    Raises:
        UnknownConfigError: there is neither a file nor a shipped config of that name; lists those.
    """
    match = _NAME.fullmatch(named.replace("\\", "/"))
    if Path(named).is_file() or match is None:
        return named
    shipped = {path.stem: path for path in sorted(CONFIGS.glob("*/*.yaml"))}
    if match[1] not in shipped:
        close = difflib.get_close_matches(match[1], shipped, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UnknownConfigError(
            f"no file and no shipped config is called {named}{hint} (shipped: {', '.join(shipped)})"
        )
    return str(shipped[match[1]])
