"""Class names as texts: sets of templates, and one embedding per class.

Letters: C classes, E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cloc_mllm.config import Templates
from cloc_mllm.data.tokenizer import TextTokenizer
from cloc_mllm.models.cloc import Cloc

_TEXT_BATCH = 256
_OWN_SETS: dict[str, tuple[str, ...]] = {
    "none": ("{}",),
    "photo": ("a photo of a {}.",),
    "small": (
        "{}",
        "a photo of a {}.",
        "a photo of one {}.",
        "a photo of many {}.",
        "a close-up of a {}.",
        "a {} in the distance.",
        "there is a {} in the scene.",
    ),
}


def templates_of(name: Templates) -> list[Callable[[str], str]]:
    """The functions name -> text of a set; `clip80` are OpenAI's 80 for ImageNet (Radford et al.
    2021), taken from open_clip."""
    if name == "clip80":
        import open_clip

        return list(open_clip.OPENAI_IMAGENET_TEMPLATES)
    if name not in _OWN_SETS:
        raise ValueError(f"unknown templates {name!r}; expected one of {[*_OWN_SETS, 'clip80']}")
    return [template.format for template in _OWN_SETS[name]]


def class_embeddings(
    model: Cloc, tokenizer: TextTokenizer, names: Sequence[str], templates: Templates
) -> Tensor:
    """Unit-length mean over the templates of unit-length text features: float[C, E]."""
    functions = templates_of(templates)
    device = next(model.parameters()).device
    step = max(1, _TEXT_BATCH // len(functions))
    parts = [torch.empty(0, device=device)]
    for start in range(0, len(names), step):
        texts = [function(name) for name in names[start : start + step] for function in functions]
        features = F.normalize(model.encode_text(tokenizer(texts).to(device)).float(), dim=-1)
        parts.append(features.unflatten(0, (-1, len(functions))).mean(1))
    return F.normalize(torch.cat(parts), dim=-1)
