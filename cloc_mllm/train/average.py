"""Averages the weights of CLOCs that were trained from the same start, see `training/average.py`.

Source: Wortsman et al., Model soups (arXiv 2203.05482).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.data.storage import new_directory
from cloc_mllm.models.build import load_cloc, save_cloc
from cloc_mllm.models.cloc import Cloc


def main(argv: Sequence[str] | None = None) -> int:
    """`python training/average.py MODEL MODEL... --output_dir DIR`."""
    parser = ArgumentParser(
        prog="average",
        description="Write the mean of the weights of CLOCs. It is often better than each of them "
        "where one was trained on from the other, or all from one (docs/lab/photos.md).",
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="what stage 1 wrote, or a shipped model"
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="directory to make; must be new"
    )
    arguments = parser.parse_args(argv)
    first, *others = arguments.models
    if not others:
        raise ValueError(f"expected two models or more, got {first} alone")
    model, tokenizer, config = load_cloc(first)
    total = {name: tensor.double() for name, tensor in model.state_dict().items()}
    priors = [config.phrase_prior or 0.0]
    for name in others:
        other, _, its_config = load_cloc(name)
        priors.append(its_config.phrase_prior or 0.0)
        _check_same_form(model, other, first, name)
        for key, tensor in other.state_dict().items():
            total[key] += tensor.double()
    model.load_state_dict(
        {
            key: (total[key] / len(arguments.models)).to(held.dtype)
            for key, held in model.state_dict().items()
        }
    )
    config = dataclasses.replace(config, phrase_prior=sum(priors) / len(priors))
    with new_directory(arguments.output_dir) as partial:
        save_cloc(model, partial, config, tokenizer)
    print(f"wrote {arguments.output_dir}, the mean of {', '.join(arguments.models)}")
    return 0


def _check_same_form(model: Cloc, other: Cloc, first: str, name: str) -> None:
    """
    Raises:
        ValueError: the two have parameters of other names or shapes.
    """
    shapes, theirs = (
        {key: tuple(tensor.shape) for key, tensor in each.state_dict().items()}
        for each in (model, other)
    )
    different = sorted(dict(shapes.items() ^ theirs.items()))
    if different:
        key = different[0]
        raise ValueError(
            f"{first} and {name} differ in form: {len(different)} parameters, the first {key}: "
            f"{shapes.get(key, 'none')} and {theirs.get(key, 'none')}"
        )
