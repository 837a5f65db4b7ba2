"""How well models predict the answers of chats: loss per token and perplexity.

    cloc-mllm eval perplexity runs/data/held-out runs/smollm2 runs/stage2/model

A model is an MLLM that stage 2 wrote or, for chats of text alone, any language model. Each answer
is predicted from the chat before it. What counts are the tokens of the answers and the end of each;
a box counts as the model writes it, so the four numbers of a box head do not. Intervals are over
chats; the change against the first model is paired, so small ones show.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.config import ConversationConfig
from cloc_mllm.data.chats import Chat
from cloc_mllm.data.parquet import load_chats
from cloc_mllm.devices import choose_device
from cloc_mllm.evaluation.stats.bootstrap import (
    Interval,
    QueryScores,
    bootstrap_interval,
    difference_interval,
)
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.mllm.collate import ConversationCollator
from cloc_mllm.mllm.configuration import ClocMllmConfig
from cloc_mllm.mllm.losses import IGNORE_INDEX
from cloc_mllm.mllm.processing import ClocMllmProcessor
from cloc_mllm.shipped import find_model

_MAX_LENGTH = 2048  # tokens of a chat; what a longer one says behind them is left out


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a row per model, each with its change against the first."""
    parser = ArgumentParser(
        prog="cloc-mllm eval perplexity", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("chats", metavar="CHATS", help="a set that `cloc-mllm data build` made")
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="an MLLM, photos or scenes, or a language model"
    )
    parser.add_argument("--limit", type=int, default=0, help="the first so many chats; 0 is all")
    parser.add_argument("--max_length", type=int, default=_MAX_LENGTH, help="tokens of a chat")
    parser.add_argument("--batch_size", type=int, default=8, help="chats at a time")
    parser.add_argument("--device", default="auto", help="auto takes a GPU if there is one")
    options = parser.parse_args(argv)
    for name, least in (("limit", 0), ("batch_size", 1), ("max_length", 2)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name}: expected {least} or more, got {getattr(options, name)}")
    dataset = load_chats(options.chats)
    chats = dataset[: options.limit] if options.limit else dataset[:]
    if not chats:
        raise ValueError(f"{options.chats} has no chats")
    first: QueryScores | None = None
    for directory in options.models:
        model, processor = _load(directory, chats, choose_device(options.device))
        losses = token_losses(
            model, processor, chats, max_length=options.max_length, batch_size=options.batch_size
        )
        if first is None:
            print(f"{len(chats):,} chats, {len(losses.values):,} tokens of answers")
        print(f"{directory}: {_row(losses, first)}", flush=True)
        first = first or losses
    return 0


def _load(directory: str, chats: Sequence[Chat], device: torch.device) -> tuple[Any, Any]:
    """The model of a directory and the processor of its texts.

    Raises:
        ValueError: chats with images and a language model that cannot see them.
        FileNotFoundError: no model is there.
    """
    config = find_model("mllm", directory) / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{directory} holds no model (no config.json)")
    if json.loads(config.read_text())["model_type"] == ClocMllmConfig.model_type:
        predictor = GroundingPredictor.from_pretrained(directory, device=device)
        return predictor.model, predictor.processor
    if seen := next((chat.id for chat in chats if chat.images), ""):
        raise ValueError(
            f"chat {seen} shows an image, which the language model {directory} cannot see; name an "
            "MLLM, or chats of text alone"
        )
    model: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    return model.to(device).eval(), ClocMllmProcessor(tokenizer)


@torch.inference_mode()
def token_losses(
    model: nn.Module,
    processor: ClocMllmProcessor,
    chats: Sequence[Chat],
    *,
    max_length: int = _MAX_LENGTH,
    batch_size: int = 8,
) -> QueryScores:
    """Computes the cross-entropy in nats of each token of each answer; the chat is its `image_id`.

    The model keeps its mode (train or eval); a language model takes chats of text alone.

    Raises:
        ValueError: the first question and answer of a chat do not fit into `max_length` tokens.
    """
    collator = ConversationCollator(
        processor, ConversationConfig(max_length=max_length, pack=False)
    )
    device = next(model.parameters()).device
    by_length = sorted(chats, key=lambda chat: sum(len(turn.text) for turn in chat.turns))
    values, ids = [], []
    for start in range(0, len(by_length), batch_size):
        batch = collator([(0, chat) for chat in by_length[start : start + batch_size]]).to(device)
        inputs = dict(batch.inputs)
        for name in ("answer_boxes", "answer_image_index", "places"):  # of training alone
            inputs.pop(name, None)
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs).logits[:, :-1]
        learnt = labels != IGNORE_INDEX
        losses = F.cross_entropy(logits[learnt].float(), labels[learnt], reduction="none")
        values.append(losses.double().cpu().numpy())
        ids += [batch.ids[row] for row in learnt.nonzero()[:, 0].tolist()]
    return QueryScores(np.concatenate(values), ids)


def _row(losses: QueryScores, first: QueryScores | None) -> str:
    loss = bootstrap_interval(losses)
    text = f"loss {_shown(loss)}, perplexity {_shown(_exponential(loss), 2)}"
    if first is None:
        return text
    if len(losses.values) != len(first.values):
        return f"{text} (other tokens than the first model: {len(losses.values):,})"
    change = _exponential(difference_interval(losses, first))
    low, high = 100 * (change.ci_low - 1), 100 * (change.ci_high - 1)
    return f"{text}, {100 * (change.value - 1):+.1f} % [{low:+.1f}, {high:+.1f}]"


def _exponential(interval: Interval) -> Interval:
    value, low, high = map(math.exp, (interval.value, interval.ci_low, interval.ci_high))
    return Interval(value, low, high, interval.n, interval.n_images)


def _shown(interval: Interval, digits: int = 3) -> str:
    low, high = interval.ci_low, interval.ci_high
    return f"{interval.value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
