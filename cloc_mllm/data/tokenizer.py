"""Turns texts into token ids for the text tower, with open_clip's BPE, any Hugging Face tokenizer,
or a small byte-level BPE of the built-in scenes' text. Texts are lower-cased, as in the paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

_BUILTIN_SAMPLES = 3000
_BUILTIN_VOCABULARY = 1024
PAD, EOS = "<pad>", "</s>"

Clean = Literal["", "whitespace", "lower", "canonicalize"]


class TextTokenizer(Protocol):
    """Maps texts to int64[P, T], padded on the right with `pad_id`; T is the longest real length,
    or always the context length."""

    vocab_size: int
    context_length: int
    pad_id: int

    def __call__(self, texts: Sequence[str]) -> Tensor: ...

    def save(self, directory: Path) -> str:
        """Writes what is needed to load it again; returns the spec to load it with."""
        ...


def load_text_tokenizer(
    spec: str,
    context_length: int = 77,
    *,
    full_length: bool = False,
    clean: Clean = "",
    strip_sep_token: bool = False,
) -> TextTokenizer:
    """Loads a tokenizer by its spec.

    Args:
        spec: `open_clip:NAME`, `huggingface:NAME_OR_DIRECTORY`, `builtin` (trained on the built-in
            scenes' text, in about a second, always the same), or a directory with
            `tokenizer.json`.
        full_length: whether every text is padded to the context length.
        clean, strip_sep_token: what open_clip's config of a tower says in `tokenizer_kwargs`; an
            `open_clip:NAME` knows its own.
    """
    kind, _, name = spec.partition(":")
    if kind == "open_clip" and name:
        return OpenClipTokenizer(name, context_length, full_length)
    if kind == "huggingface" and name:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        return HuggingFaceTokenizer(
            tokenizer, context_length, full_length, clean=clean, strip_sep_token=strip_sep_token
        )
    if spec == "builtin":
        return HuggingFaceTokenizer(_builtin_bpe(), context_length, full_length)
    if (Path(spec) / "tokenizer.json").is_file():
        return load_text_tokenizer(
            f"huggingface:{spec}",
            context_length,
            full_length=full_length,
            clean=clean,
            strip_sep_token=strip_sep_token,
        )
    raise ValueError(
        f"unknown tokenizer {spec!r}; expected open_clip:NAME, huggingface:NAME_OR_DIRECTORY, "
        "builtin, or a directory that holds tokenizer.json"
    )


def end_token_id(tokenizer: TextTokenizer) -> int:
    """The id that ends every text.

    Raises:
        ValueError: no special token ends a text, so there is nothing to pool at.
    """
    probes = [tokenizer([text])[0].tolist() for text in ("a", "two red crabs")]
    end = probes[0][-1]
    if probes[1][-1] != end or any(end in ids[:-1] for ids in probes):
        raise ValueError(
            "the tokenizer puts no end token after a text, where the text tower would pool; use "
            "one that does (T5's </s>, CLIP's <end_of_text>), or add a post-processor to it"
        )
    return int(end)


class OpenClipTokenizer:
    """open_clip's tokenizer of an architecture, cut to the longest real length of a batch."""

    def __init__(self, name: str, context_length: int, full_length: bool = False) -> None:
        import open_clip

        self.name = name
        self.tokenizer = open_clip.get_tokenizer(name, context_length=context_length)
        inner = getattr(self.tokenizer, "tokenizer", None)  # of Transformers
        self.vocab_size = self.tokenizer.vocab_size if inner is None else len(inner)
        self.pad_id = 0 if inner is None else inner.pad_token_id
        self.context_length = context_length
        self.full_length = full_length

    def __call__(self, texts: Sequence[str]) -> Tensor:
        if not texts:
            return torch.zeros(0, self.context_length if self.full_length else 1, dtype=torch.long)
        ids = self.tokenizer([text.lower() for text in texts])
        longest = int((ids != self.pad_id).sum(1).max())
        return ids if self.full_length else ids[:, :longest]

    def save(self, directory: Path) -> str:
        return f"open_clip:{self.name}"


class HuggingFaceTokenizer:
    """Any Transformers tokenizer; needs a padding token (the end token serves if it has none).

    Args:
        clean: what open_clip does to a text before; "" only lower-cases it.
        strip_sep_token: whether open_clip writes 0 in the place of the token that ends a text.
    """

    def __init__(
        self,
        tokenizer: Any,
        context_length: int,
        full_length: bool = False,
        *,
        clean: Clean = "",
        strip_sep_token: bool = False,
    ) -> None:
        from open_clip.tokenizer import get_clean_fn

        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.pad_id = int(tokenizer.pad_token_id)
        self.context_length = context_length
        self.full_length = full_length
        self.clean = get_clean_fn(clean) if clean else str
        self.stripped_id = tokenizer.sep_token_id if strip_sep_token else None

    def __call__(self, texts: Sequence[str]) -> Tensor:
        if not texts:
            return torch.zeros(0, self.context_length if self.full_length else 1, dtype=torch.long)
        encoded = self.tokenizer(
            [self.clean(text).lower() for text in texts],
            padding="max_length" if self.full_length else "longest",
            truncation=True,
            max_length=self.context_length,
            padding_side="right",
            return_tensors="pt",
        )
        ids = encoded["input_ids"]
        return ids if self.stripped_id is None else ids.masked_fill(ids == self.stripped_id, 0)

    def save(self, directory: Path) -> str:
        self.tokenizer.save_pretrained(directory / "tokenizer")
        return "tokenizer"


def train_byte_level_bpe(
    texts: Iterable[str],
    vocab_size: int = _BUILTIN_VOCABULARY,
    special_tokens: Sequence[str] = (),
) -> Any:
    """Trains a small byte-level BPE (`PreTrainedTokenizerFast`) that encodes every string.

    The padding token is id 0 and the end token has the highest id (open_clip's native text tower
    pools at the highest id).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, *special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([EOS])
    eos_id = tokenizer.token_to_id(EOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, eos_id)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


@cache
def _builtin_bpe() -> Any:
    return train_byte_level_bpe(_builtin_texts())


def _builtin_texts() -> Iterable[str]:
    from cloc_mllm.data.scenes import sample_layout, scene_rng

    for index in range(_BUILTIN_SAMPLES):
        layout = sample_layout(scene_rng(0, "train", index))
        yield from layout.captions
        yield from (thing.name for thing in layout.things)
