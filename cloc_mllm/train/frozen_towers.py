"""Stage 1 on frozen towers: what they compute of pictures and texts is computed once and kept.

Letters: P texts, W width of a text tower before its last linear map.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from cloc_mllm.config import RegionTexts, Stage1Config
from cloc_mllm.data.collate import ClocCollator, texts_of
from cloc_mllm.data.english import mirrored
from cloc_mllm.data.feature_cache import FeatureCache, identity_of, save_whole
from cloc_mllm.data.mixture import parts_of
from cloc_mllm.data.records import Record
from cloc_mllm.data.tokenizer import TextTokenizer
from cloc_mllm.distributed import all_reduce_sum, barrier, is_main, rank, world_size
from cloc_mllm.models.cloc import Cloc
from cloc_mllm.stopping import become_loader_worker
from cloc_mllm.train.data_order import DataOrder, choose_workers, iterate, sample_seed
from cloc_mllm.train.engine import start_processes

_IMAGES = 32  # encoded at a time
_TEXTS = 256
_HEADS = ("head.", "proj.", "projection.")  # the last linear maps, which `join` and `project` apply

Variant = tuple[int, bool]  # a sample's index, and whether it is mirrored


class TextFeatures:
    """Stands in for the tokenizer: texts -> float[P, W], what the frozen text tower made of them.

    Args:
        texts: all that will ever be asked for.
        features: float[len(texts), W], in their order.
    """

    def __init__(self, texts: Sequence[str], features: Tensor) -> None:
        self._row = {text: row for row, text in enumerate(texts)}
        self._features = features

    def __call__(self, texts: list[str]) -> Tensor:
        return self._features[[self._row[text] for text in texts]]


def check_towers_are_frozen(model: Cloc) -> None:
    """Checks that what the image tower computes can be kept.

    Raises:
        ValueError: a part of it learns, other than its last linear map.
    """
    if learns := _learning(model.vision.encoder.visual):
        raise ValueError(
            f"data.feature_cache keeps what the image tower computes, but {len(learns)} of its "
            f"parameters learn (vision.encoder.visual.{learns[0]}); give it the rate 0 in "
            'optim.layer_lr ({"vision.encoder.visual": 0}, or {"vision.encoder.visual.trunk": 0} '
            'of a timm tower), or set data.feature_cache to ""'
        )


def fill_tower_features(
    model: Cloc,
    tokenizer: TextTokenizer,
    dataset: Sequence[Record],
    collator: ClocCollator,
    config: Stage1Config,
) -> None:
    """Computes what the run will see of frozen towers and makes `collator` use it.

    Every rank must call this. Each encodes its share of the pictures; the main rank encodes the
    texts, if the text tower is frozen, too.
    """
    device = start_processes()
    assert config.run.precision != "auto"
    bf16 = config.run.precision == "bf16"
    directory = Path(config.data.feature_cache)
    shared = {"bf16": bf16, "device": device.type} | collator.preprocessing.fingerprint(tokenizer)
    seen = _seen(dataset, collator, config)
    was_training = model.training
    model.to(device).eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        collator.features = _fill_pictures(
            model, dataset, collator, seen, directory, shared, config
        )
        if not _learning(model.text.text):
            texts = {
                text
                for index, flip in seen
                for text in _texts_of(dataset[index], collator.region_texts, flip=flip)
            }
            collator.tokenizer = _fill_texts(model, tokenizer, sorted(texts), directory, shared)
    model.train(was_training)


def _fill_pictures(  # noqa: PLR0913  the parts of one loop
    model: Cloc,
    dataset: Sequence[Record],
    collator: ClocCollator,
    seen: list[Variant],
    directory: Path,
    shared: dict[str, Any],
    config: Stage1Config,
) -> FeatureCache:
    encoder = model.vision.encoder
    settings = shared | {"strides": encoder.token_strides, "tower": config.model.clip_config}
    settings["architecture"] = config.model.architecture
    cache = FeatureCache(directory, identity_of(settings, _kept_weights(encoder.visual)))
    start, num_encoded = time.monotonic(), 0
    loader: DataLoader[Any] = DataLoader(
        _Variants(dataset, seen[rank() :: world_size()]),  # type: ignore[arg-type]
        _IMAGES,
        collate_fn=_Missing(cache, collator),
        num_workers=choose_workers(config.data.num_workers),
        worker_init_fn=become_loader_worker,
    )
    device = next(encoder.parameters()).device
    with closing(iterate(loader)) as batches:
        for variants, canvases in batches:
            if not variants:
                continue
            # no `no_grad`: torch then chooses the attention kernel that it chooses in training
            outputs = encoder.run_tower(collator.preprocessing.normalize(canvases.to(device)))
            for place, (record, flip) in enumerate(variants):
                tensors = {f"scale{i}": tokens[place] for i, tokens in enumerate(outputs.scales)}
                cache.save(record, {"pooled": outputs.pooled[place], **tensors}, mirrored=flip)
            num_encoded += len(variants)
    total = int(all_reduce_sum(torch.tensor(num_encoded, device=device)))
    if is_main():
        seconds = time.monotonic() - start
        what = f"{total:,} pictures of {len(seen):,} (mirrored ones count by themselves)"
        print(f"{cache.root}: {what} encoded in {seconds:.0f} s, the others were there")
    barrier()
    return cache


def _fill_texts(
    model: Cloc,
    tokenizer: TextTokenizer,
    texts: list[str],
    directory: Path,
    shared: dict[str, Any],
) -> TextFeatures:
    settings = shared | {"texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest()}
    file = directory / f"texts-{identity_of(settings, _kept_weights(model.text.text))}.safetensors"
    if is_main() and not file.is_file():
        start = time.monotonic()
        by_length = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        device = next(model.text.parameters()).device
        parts = []
        for first in range(0, len(texts), _TEXTS):
            batch = [texts[index] for index in by_length[first : first + _TEXTS]]
            parts.append(model.text.run_tower(tokenizer(batch).to(device)).detach().cpu())
        in_order = torch.tensor(by_length).argsort()
        save_whole(file, {"features": torch.cat(parts)[in_order]})
        seconds = time.monotonic() - start
        print(f"{file}: {len(texts):,} texts encoded in {seconds:.0f} s")
    barrier()
    return TextFeatures(texts, load_file(file)["features"])


def _texts_of(record: Record, which: RegionTexts, *, flip: bool) -> list[str]:
    texts = [*record.captions]
    for region in record.regions:
        texts += texts_of(region, which)
    return [mirrored(text) for text in texts] if flip else texts


def _seen(dataset: Sequence[Record], collator: ClocCollator, config: Stage1Config) -> list[Variant]:
    """Lists the samples that the run sees, as they are and mirrored."""
    run = config.run
    order = DataOrder(len(dataset), run.steps * run.global_batch_size, run.seed, parts_of(dataset))
    return sorted(
        {
            (index, collator.is_mirrored(sample_seed(run.seed, epoch, index)))
            for epoch, index in order.batch(0)
        }
    )


def _learning(tower: torch.nn.Module) -> list[str]:
    return [
        name
        for name, parameter in tower.named_parameters()
        if parameter.requires_grad and not name.startswith(_HEADS)
    ]


def _kept_weights(tower: torch.nn.Module) -> dict[str, Tensor]:
    state = tower.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith(_HEADS)}


class _Variants:
    """The records of variants, each with whether it is mirrored."""

    def __init__(self, dataset: Sequence[Record], variants: list[Variant]) -> None:
        self.dataset, self.variants = dataset, variants

    def __len__(self) -> int:
        return len(self.variants)

    def __getitem__(self, place: int) -> tuple[Record, bool]:
        index, flip = self.variants[place]
        return self.dataset[index], flip


class _Missing:
    """Picks what the cache lacks and prepares it, in a loader worker.

    Returns the records, each with whether it is mirrored, and their canvases uint8[I, 3, S, S].
    """

    def __init__(self, cache: FeatureCache, collator: ClocCollator) -> None:
        self.cache, self.collator = cache, collator

    def __call__(
        self, items: list[tuple[Record, bool]]
    ) -> tuple[list[tuple[Record, bool]], Tensor]:
        missing = [item for item in items if not self.cache.has(item[0], mirrored=item[1])]
        canvases = [self.collator.canvas(record, flip=flip) for record, flip in missing]
        return missing, torch.stack(canvases) if canvases else torch.empty(0)
