"""The list of phrases that a CLOC names regions with: their words, and their embeddings on disk."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cloc_mllm.data.records import Record

PHRASES_FILE = "phrases.safetensors"
_MAX_CHARACTERS = 40
_DETERMINERS = {"a", "an", "the", "his", "her", "their", "its", "this", "that", "some", "one"}
# words that name nothing alone: they point at things named elsewhere, or are colours
_NAMELESS = {
    "he", "she", "it", "they", "him", "her", "them", "his", "hers", "its", "their", "who",
    "whom", "which", "that", "this", "these", "those", "one", "ones", "other", "others",
    "another", "something", "someone", "anything", "everything", "everyone", "himself",
    "herself", "itself", "themselves", "both", "all", "some", "several", "many", "two", "three",
    "four", "five", "each", "and", "group", "colors", "black", "white", "red", "blue", "green",
    "yellow", "orange", "pink", "purple", "brown", "tan", "gray", "grey", "silver", "gold",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Phrases:
    """Phrases and their text embeddings.

    Attributes:
        texts: P phrases.
        embeddings: float32[P, E], each of unit length.
        scale: of the contrastive logits of regions and texts, in the model that embedded them.
        counts: int64[P], how often each names a region of the training data; None if nobody knows.
        prior: how much of that the similarities know already, see `ModelConfig.phrase_prior`.
    """

    texts: list[str]
    embeddings: Tensor
    scale: float
    counts: Tensor | None = None
    prior: float = 0.0

    def log_odds(self, similarity: Tensor) -> Tensor:
        """Tells how likely each phrase names a region, up to a constant per region.

        The contrastive loss makes `scale * similarity` learn log p(text | region) / p(text) plus
        `prior` times log p(text). The rest of how often a text is said at all must be added:
        without it a rare phrase is as good a name as a usual one. Where there are no counts, all
        phrases are taken to be as usual.

        Args:
            similarity: float[R, P], cosines of regions and phrases.
        """
        logits = self.scale * similarity
        if self.counts is None:
            return logits
        return logits + (1 - self.prior) * self.counts.to(logits).log()

    def save(self, directory: Path) -> None:
        """Writes `phrases.safetensors`, the embeddings in half precision."""
        tensors = {"embeddings": self.embeddings.detach().half().cpu().contiguous()}
        tensors["scale"] = torch.tensor(self.scale)
        tensors["prior"] = torch.tensor(self.prior)
        if self.counts is not None:
            tensors["counts"] = self.counts
        save_file(tensors, directory / PHRASES_FILE, {"texts": json.dumps(self.texts)})

    @classmethod
    def load(cls, directory: Path) -> Phrases | None:
        """Reads what `save` wrote; None where a model has no list of phrases.

        Raises:
            ValueError: the file has not one embedding per phrase.
        """
        path = directory / PHRASES_FILE
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            texts = json.loads((file.metadata() or {}).get("texts", "[]"))
            embeddings = file.get_tensor("embeddings").float()
            scale = float(file.get_tensor("scale"))
            kept = file.keys()
            counts = file.get_tensor("counts") if "counts" in kept else None
            prior = float(file.get_tensor("prior")) if "prior" in kept else 0.0
        if len(texts) != len(embeddings):
            raise ValueError(
                f"{path} has {len(texts)} phrases and {len(embeddings)} embeddings; expected one "
                "embedding per phrase"
            )
        return cls(texts, torch.nn.functional.normalize(embeddings, dim=-1), scale, counts, prior)


def frequent_phrases(records: Iterable[Record], count: int) -> dict[str, int]:
    """Finds the most frequent phrases of regions and how often they occur, most frequent first.

    Phrases are lower-case, without marks at their ends. Those that differ by their first "a", "the"
    or "his" alone count as one, which is written as it occurs most. Left out are pronouns, bare
    colours and long phrases.
    """
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for region in (region for record in records for region in record.regions):
        for text in dict.fromkeys((region.phrase, *region.expressions)):
            words = re.findall(r"[a-z0-9'-]+", text.lower())
            named = words[1:] if words and words[0] in _DETERMINERS else words
            phrase = " ".join(words)
            if set(named) - _NAMELESS and len(phrase) <= _MAX_CHARACTERS:
                found[" ".join(named)][phrase] += 1
    ranked = sorted(found.values(), key=lambda forms: -forms.total())
    return {forms.most_common(1)[0][0]: forms.total() for forms in ranked[:count]}
