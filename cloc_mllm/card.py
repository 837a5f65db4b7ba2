"""Writes the cards of models and data sets: the `README.md` that people and the hub read.

A card says what is known when a directory is written, and names what its author has to add.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloc_mllm import __version__
from cloc_mllm.shipped import SHIPPED_MODELS

CARD_NAME = "README.md"
_LIBRARY = "cloc-mllm"
_TAGS = ["cloc", "grounding"]
_IN_CONFIG = ("clip_config", "tokenizer")  # which config.json has, without this machine's paths

_CLOC = (
    "A CLOC: CLIP plus regions. It finds the box of a phrase and the phrases closest to a region."
)
_MLLM = "A multimodal language model on a CLOC encoder. It answers in words and with boxes."
_KNOWS = (
    "What its training data show, see below. Its author has to say here what it gets wrong, and "
    "whose pictures it was tried on."
)
_LICENCE = (
    "Not chosen yet. It has to suit the licences of the weights that training started from and of "
    "the data; name it in the first lines of this file, too."
)
_CLOC_USE = """\
from cloc_mllm import ClocPredictor

predictor = ClocPredictor.from_pretrained("DIRECTORY")  # or "hf-hub:OWNER/NAME"
predictor.locate("photo.jpg", ["the brown dog"]).draw().save("found.png")
"""
_MLLM_USE = """\
from cloc_mllm import GroundingPredictor

predictor = GroundingPredictor.from_pretrained("DIRECTORY")  # or "hf-hub:OWNER/NAME"
predictor.ground("photo.jpg", ["the brown dog"]).draw().save("found.png")
print(predictor.ask("photo.jpg", "What is the dog doing?").text)
"""
_DATA_USE = """\
from cloc_mllm.data.parquet import load_set

items = load_set("DIRECTORY")  # or "hf://datasets/OWNER/NAME"
"""


def write_run_card(
    directory: Path, settings: Mapping[str, Any], defaults: Mapping[str, Any], log: Path
) -> None:
    """Writes the card of a model that a training has made; of other directories none.

    Args:
        directory: holds the model's files.
        settings: of the training, nested; those that differ from `defaults` are listed.
        log: of the training, whose last evaluation gives the scores.
    """
    is_mllm = _is_mllm(directory)
    if not is_mllm and not _is_cloc(directory):
        return
    changed = json.loads(json.dumps(_changed(settings, defaults)))
    for name in _IN_CONFIG:
        changed.get("model", {}).pop(name, None)
    name = Path(settings["run"]["output_dir"]).name
    sections = {
        "What it knows": _KNOWS,
        "Scores": _scores(log, settings["data"]["validation"]),
        "Training": f"By cloc-mllm {__version__}; settings that differ from the defaults:\n\n"
        f"```yaml\n{_yaml(changed)}```",
        "Licence": _LICENCE,
    }
    code = _MLLM_USE if is_mllm else _CLOC_USE
    _write(directory, _front(is_mllm), name, _head(is_mllm), _use(code) | sections)


def write_export_card(directory: Path, source: Path, *, library: str = "", use: str = "") -> None:
    """Writes the card of a model that was made from another, whose knowledge and scores it has.

    Args:
        source: the directory of the other model, or of its training. What its card says is taken
            over.
        library: what loads the new model, by the hub's name; "" is this package.
        use: how, in Python; "" as this package does.
    """
    cards = [path for path in (source / CARD_NAME, source / "model" / CARD_NAME) if path.is_file()]
    text = cards[0].read_text(encoding="utf-8") if cards else ""
    title = re.search(r"^# (.+)$", text, re.M)
    given = re.search(r"^license: (.+)$", text, re.M)
    is_part = source.name in ("model", "cloc", "mllm")
    name = title[1] if title else (source.parent if is_part else source).name
    knows, _, _ = SHIPPED_MODELS.get(name, _KNOWS).partition("; ")
    sections = {"What it knows": knows} | _sections(text)
    sections["Made from"] = f"`{name}`, by cloc-mllm {__version__}."
    is_mllm = _is_mllm(directory)
    code = use or (_MLLM_USE if is_mllm else _CLOC_USE)
    front = _front(is_mllm, given[1] if given else "unknown", library or _LIBRARY)
    _write(directory, front, name, _head(is_mllm), _use(code) | sections)


def write_data_card(directory: Path, manifest: Mapping[str, Any], name: str) -> None:
    """Writes the card of a data set.

    Args:
        manifest: what `manifest.json` holds.
    """
    front = {
        "license": "unknown",
        "task_categories": ["zero-shot-object-detection"],
        "tags": _TAGS,
        "configs": [{"config_name": "default", "data_files": "shard-*.parquet"}],
    }
    made_from = _yaml(json.loads(json.dumps(manifest["arguments"], default=str)))
    kind = manifest.get("kind", "records")
    sections = {
        **_use(_DATA_USE),
        "How it was built": f"By cloc-mllm {__version__}, from:\n\n```yaml\n{made_from}```\n\n"
        f"Dropped, by reason: {_dropped(manifest.get('dropped', {}))}.",
        "Boxes": "x1 y1 x2 y2 in 0..1 of the upright picture.",
        "Sources and licences": "Its author has to say here where the pictures and the texts come "
        "from, and under which licences; name the licence of the whole in the first lines, too.",
        "People": "Its author has to say here whether persons can be recognised, and how somebody "
        "gets a picture removed.",
    }
    head = f"{manifest['num_records']:,} {kind} with boxes and phrases, as Parquet."
    _write(directory, front, name, head, sections)


def _front(
    is_mllm: bool, licence: str = "unknown", library: str = _LIBRARY
) -> dict[str, str | list[str]]:
    return {
        "license": licence,
        "library_name": library,
        "pipeline_tag": "image-text-to-text" if is_mllm else "zero-shot-object-detection",
        "tags": _TAGS,
    }


def _head(is_mllm: bool) -> str:
    return _MLLM if is_mllm else _CLOC


def _use(code: str) -> dict[str, str]:
    return {"Use": f"```python\n{code.strip()}\n```"}


def _sections(card: str) -> dict[str, str]:
    """The sections of a card that hold for what is made from its model, by their titles."""
    parts = [part.partition("\n") for part in re.split(r"^## ", card, flags=re.M)[1:]]
    return {title: text for title, _, text in parts if title != "Use"}


def _write(
    directory: Path, front: Mapping[str, Any], name: str, head: str, sections: Mapping[str, str]
) -> None:
    parts = [f"---\n{_yaml(front)}---", f"# {name}", head]
    parts += [f"## {title}\n\n{text.strip()}" for title, text in sections.items()]
    (directory / CARD_NAME).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _is_mllm(directory: Path) -> bool:
    return (directory / "processor_config.json").is_file()


def _is_cloc(directory: Path) -> bool:
    path = directory / "config.json"
    return path.is_file() and "fingerprint" in json.loads(path.read_text(encoding="utf-8"))


def _changed(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Keeps the settings that differ from their defaults."""
    changed: dict[str, Any] = {}
    for name, value in settings.items():
        default = defaults.get(name)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            if inner := _changed(value, default):
                changed[name] = inner
        elif value != default:
            changed[name] = value
    return changed


def _scores(log: Path, validation: str) -> str:
    """A table of the last evaluation of a training."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    rows = [row for row in map(json.loads, lines) if row["kind"] == "eval"]
    if not rows:
        return "None yet; `cloc-mllm eval` measures them."
    last = {name: value for name, value in rows[-1].items() if name not in ("step", "kind")}
    table = "\n".join(f"| {name} | {value:.4g} |" for name, value in last.items())
    return (
        f"During training, after step {rows[-1]['step']:,}, on a part of `{validation}`; no "
        f"intervals. `cloc-mllm eval` measures more.\n\n| metric | value |\n|---|---|\n{table}"
    )


def _dropped(dropped: Mapping[str, Mapping[str, int]]) -> str:
    said = [
        f"{kind} {reason} {count:,}"
        for kind, reasons in dropped.items()
        for reason, count in reasons.items()
    ]
    return ", ".join(said) or "nothing"


def _yaml(values: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
