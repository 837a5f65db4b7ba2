"""Texts in buckets by length: the features of each text alone, in order, for fewer tokens."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from cloc_mllm.models import text_encoder
from cloc_mllm.models.text_encoder import TextEncoder, bucket_bounds

LENGTHS = ([9, 3, 12, 4], [2, 3, 2, 11, 2, 5, 3])
END = 50


def native_tower(**options: object) -> nn.Module:
    torch.manual_seed(0)
    size = {"width": 16, "heads": 2, "layers": 2, "output_dim": 12}
    return TextTransformer(context_length=12, vocab_size=END + 1, **size, **options)


def hugging_face_tower(folder: Path) -> nn.Module:
    from transformers import BertConfig

    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertConfig(vocab_size=END + 1, intermediate_size=32, **size).save_pretrained(folder)
    torch.manual_seed(0)
    return HFTextEncoder(
        str(folder), 12, pooler_type="mean_pooler", proj_type="linear", pretrained=False
    )


@pytest.fixture(params=["native", "pools_eos", "hugging_face", "pools_last"])
def encoder(request: pytest.FixtureRequest, tmp_path: Path) -> TextEncoder:
    """One of the towers; the one that pools at the last token must not be cut or padded."""
    if request.param == "native":
        return TextEncoder(native_tower()).eval()
    if request.param == "pools_eos":
        return TextEncoder(native_tower(pool_type="eos", eos_id=END)).eval()
    if request.param == "hugging_face":
        return TextEncoder(hugging_face_tower(tmp_path)).eval()
    return TextEncoder(native_tower(pool_type="last")).eval()


def texts(lengths: list[int]) -> Tensor:
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, : length - 1] = torch.randint(1, END, (length - 1,), generator=generator)
        ids[row, length - 1] = END
    return ids


@pytest.mark.parametrize("call_tokens", [0, 10, 1000], ids=["each length", "some", "one call"])
def test_features_and_gradient_equal_those_of_one_call_a_group(
    encoder: TextEncoder, call_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(text_encoder._CALL_TOKENS, "cpu", call_tokens)
    encoder.double()  # bit-equal it cannot be: other sizes of product sum in another order
    groups = [texts(lengths) for lengths in LENGTHS]
    weights = [torch.randn(len(group), 12, dtype=torch.float64) for group in groups]
    variables = [p for p in encoder.parameters() if p.requires_grad]
    grads = []
    for features in (encoder.encode_groups(*groups), [encoder(group) for group in groups]):
        loss = sum((f * w).sum() for f, w in zip(features, weights, strict=True))
        grads.append(torch.autograd.grad(loss, variables, allow_unused=True))
        grads[-1] += tuple(features)
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("sizes", [(0, 0), (0, 3), (2, 0)])
def test_groups_may_be_empty(encoder: TextEncoder, sizes: tuple[int, int]) -> None:
    groups = [texts([4, 2, 3])[:size] for size in sizes]
    features = encoder.encode_groups(*groups)
    assert [f.shape for f in features] == [(size, 12) for size in sizes]
    torch.cat(features).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)


@pytest.mark.parametrize("call_tokens", [0, 7, 20, 500])
def test_no_other_buckets_are_cheaper(call_tokens: int) -> None:
    lengths = [3, 4, 4, 4, 5, 5, 6, 8, 17, 17, 18, 20, 28]

    def cost(bounds: tuple[int, ...]) -> int:
        first_that_fits = [min(b for b in bounds if b >= length) for length in lengths]
        return sum(first_that_fits) + call_tokens * len(bounds)

    shorter = sorted(set(lengths))[:-1]
    every_choice = [
        (*chosen, 28) for size in range(len(shorter) + 1) for chosen in combinations(shorter, size)
    ]
    actual = bucket_bounds(lengths, call_tokens)
    assert cost(tuple(actual)) == min(map(cost, every_choice))


def test_fast_attention_of_bf16_training_rounds_like_torchs_and_leaves_no_trace() -> None:
    """Distance from float32, of features and gradient."""
    encoder, ids = TextEncoder(native_tower()), texts(LENGTHS[0])
    variables = [encoder.text.token_embedding.weight]

    def step(call: Callable[[Tensor], Tensor], *, bf16: bool) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            features = call(ids).float()
        return features, torch.autograd.grad(features.square().sum(), variables)[0]

    exact = step(encoder, bf16=False)
    torch_kernel = step(encoder._forward_any_length, bf16=True)
    fast = step(encoder, bf16=True)
    assert not torch.equal(fast[0], torch_kernel[0])  # it is another kernel
    for actual, usual, expected in zip(fast, torch_kernel, exact, strict=True):
        assert (actual - expected).norm() < 1.3 * (usual - expected).norm()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()


def test_checkpointed_layers_train_in_bf16() -> None:
    encoder = TextEncoder(native_tower())
    encoder.text.set_grad_checkpointing(True)
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder(texts(LENGTHS[0]))
    features.sum().backward()
