"""Names of regions: the language model's words, weighed by what CLOC makes of the region.

A language model that stage 2 taught on some thousand photos reads less out of a region token than
CLOC's own match of regions and phrases does; CLOC in turn knows no words beside its list. So each
next token has the product of both probabilities, that of the language model, which is the weaker
witness, to the power of a half. CLOC's is the share of all phrases of its list that go on with that
token (docs/lab/photos.md).

Letters: R regions, P phrases, N nodes of the tree of their tokens, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from cloc_mllm.mllm.modeling import ClocMllmForConditionalGeneration
from cloc_mllm.mllm.processing import ClocMllmProcessor
from cloc_mllm.mllm.regions import read_regions, takes_masks
from cloc_mllm.mllm.vision_inputs import VisionInputs
from cloc_mllm.models.phrases import Phrases

_KIND = "prompter"
_LANGUAGE = 0.5  # the power of the language model's probability
_UNLISTED = math.log(0.25)  # about the share of the training data's names that the list leaves out


class PhraseTree:
    """The phrases of a list as a tree of tokens, whose root is the start of an answer.

    Args:
        phrases: each may be written with a capital letter or a leading space, too, as the
            tokenizers of some chat templates want it.
        tokenizer: the language model's.
    """

    def __init__(self, phrases: Phrases, tokenizer: PreTrainedTokenizerBase) -> None:
        self.phrases = phrases
        self.children: list[dict[int, int]] = [{}]
        on_path: list[tuple[int, int]] = []
        forms = [
            f"{space}{text}"
            for phrase in phrases.texts
            for text in (phrase, phrase[:1].upper() + phrase[1:])
            for space in ("", " ")
        ]
        ids = tokenizer(forms, add_special_tokens=False)["input_ids"]
        for number in range(len(phrases.texts)):
            for path in {(*tokens, tokenizer.eos_token_id) for tokens in ids[4 * number :][:4]}:
                on_path += [(node, number) for node in self._grow(path)]
        self._node, self._phrase = torch.tensor(on_path).reshape(-1, 2).unbind(1)

    @classmethod
    def of(cls, processor: ClocMllmProcessor) -> PhraseTree | None:
        """The tree of a model's own phrases; None if it has none."""
        if processor.phrases is None:
            return None
        return cls(processor.phrases, processor.tokenizer)

    def _grow(self, path: Sequence[int]) -> list[int]:
        nodes = [0]
        for token in path:
            following = self.children[nodes[-1]]
            if token not in following:
                following[token] = len(self.children)
                self.children.append({})
            nodes.append(following[token])
        return nodes[1:]

    def log_shares(self, regions: Tensor) -> Tensor:
        """How likely a phrase that begins with the tokens of each node names each region.

        Args:
            regions: float[R, E], each of unit length.

        Returns:
            float64[R, N] on the CPU: logarithms, up to a constant per region.
        """
        regions = regions.float().cpu()
        odds = self.phrases.log_odds(regions @ self.phrases.embeddings.T).double()
        likely = odds.softmax(-1)[:, self._phrase]
        shares = likely.new_zeros(len(regions), len(self.children))
        shares[:, 0] = 1  # of all, in whichever form
        return shares.index_add(1, self._node, likely).log()

    def node_of(self, answer: Sequence[int]) -> int | None:
        """The node that the tokens of an answer lead to; None beside the tree."""
        node: int | None = 0
        for token in answer:
            node = None if node is None else self.children[node].get(token)
        return node


class NamingLogitsProcessor(LogitsProcessor):
    """Adds CLOC's logarithms to those of the next token: `generate(logits_processor=[...])`.

    Args:
        regions: of rows of the batch that name one, float[E] of unit length by row.
        prompt_length: tokens of the (padded) prompt, in front of the answers.
    """

    def __init__(self, tree: PhraseTree, regions: dict[int, Tensor], prompt_length: int) -> None:
        self.tree = tree
        self.prompt_length = prompt_length
        self.shares = dict(
            zip(regions, tree.log_shares(torch.stack([*regions.values()])), strict=True)
        )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Weighs the scores float[B, V]."""
        weighed = scores.clone()
        answers = input_ids[:, self.prompt_length :].tolist()
        for row, shares in self.shares.items():
            node = self.tree.node_of(answers[row])
            if node is not None and (following := self.tree.children[node]):
                weights = torch.full_like(scores[row], _UNLISTED)
                known = shares[[*following.values()]] - shares[node]
                weights[[*following]] = known.to(weights)
                weighed[row] = _LANGUAGE * scores[row] + weights
        return weighed


def embed_regions_of(
    model: ClocMllmForConditionalGeneration, rows: Sequence[int], inputs: Mapping[str, Any]
) -> dict[int, Tensor]:
    """Embeds the regions of some rows of a batch as CLOC does: float[E] of unit length by row.

    Left out is what the encoder cannot embed: points and masks, where it knows boxes alone.

    Args:
        rows: with one region each.
        inputs: what `ClocMllmProcessor` returned.
    """
    if not rows or ("region_masks" in inputs and not takes_masks(_KIND, model.vision)):
        return {}
    vision = VisionInputs(**{name: inputs[name] for name in VisionInputs._fields if name in inputs})
    image = model.encode_for_reading(vision.pixel_values)
    (embedded,) = read_regions(_KIND, model.vision, image, vision)
    embedded = F.normalize(embedded.float(), dim=-1)
    per_row = (inputs["input_ids"] == model.config.region_token_id).sum(1)
    ends = per_row.cumsum(0).tolist()
    return {row: embedded[ends[row] - 1] for row in rows}
