"""What ships inside the package: weights, the default of demo, ground, refer and eval; configs."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Literal

ModelKind = Literal["cloc", "mllm"]

ASSETS = Path(__file__).resolve().parent / "assets"
CONFIGS = Path(__file__).resolve().parent / "configs"

_NAME = re.compile(r"(?:(?:training|eval)/configs/)?([\w-]+)(?:\.yaml)?")


class UnknownConfigError(ValueError):
    """Raised for the name of a config that is neither a file nor shipped."""


def shipped_directory(kind: ModelKind) -> Path:
    """Finds the directory of the shipped `cloc` or `mllm` model.

    Raises:
        FileNotFoundError: this installation carries no such weights; says what to do.
    """
    directory = ASSETS / kind
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"no shipped {kind} model in {directory}; run `make quickstart` to train one, "
            f"or pass --{kind} DIR with a model you have"
        )
    return directory


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
