"""Learnt rows beside the word table: what peft computes, without its copies of the table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cloc_mllm.config import LoraConfig, MllmConfig
from cloc_mllm.mllm import build_mllm, new_tokens

pytest.importorskip("peft")


@contextmanager
def pefts_own_layers() -> Iterator[None]:
    with mock.patch.object(new_tokens, "keep_rows_beside_table", lambda model: None):
        yield


def model_of(config: MllmConfig, *, tied: bool) -> Any:
    """A model whose learnt rows differ from the table's."""
    torch.manual_seed(0)
    config.lora = LoraConfig(rank=2)
    model, _ = build_mllm(config)
    if not tied:
        model.get_output_embeddings().original_module.weight = torch.nn.Parameter(
            torch.randn_like(model.get_input_embeddings().original_module.weight), False
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name:
                parameter += torch.randn_like(parameter)
    return model.train()


def learn(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    start = model.config.location_token_start
    ids = torch.tensor([[1, start, 5, start + 3], [start + 19, 2, start, 7]])
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_values_and_gradients_are_pefts(mllm_config: MllmConfig, tied: bool) -> None:
    with pefts_own_layers():
        expected, expected_gradients = learn(model_of(mllm_config, tied=tied))
    actual, gradients = learn(model_of(mllm_config, tied=tied))

    torch.testing.assert_close(actual, expected)
    assert gradients.keys() == expected_gradients.keys()
    assert any("trainable_tokens" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], msg=name)


def test_tokens_in_any_order_keep_their_rows(mllm_config: MllmConfig) -> None:
    model = model_of(mllm_config, tied=True)
    layer = model.get_input_embeddings().token_adapter
    ids = layer.token_indices["default"]
    expected = model(input_ids=torch.tensor([ids])).logits

    shuffled = torch.randperm(len(ids))
    ids[:] = [ids[index] for index in shuffled.tolist()]
    with torch.no_grad():
        rows = layer.trainable_tokens_delta["default"]
        rows.copy_(rows[shuffled])
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.token_adapter.__dict__.pop("_ids_on_device", None)

    in_order = torch.tensor([sorted(ids)])
    assert torch.equal(model(input_ids=in_order).logits, expected)


class Shapes(TorchDispatchMode):
    """The shapes of all results of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.Size] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function not in (torch.ops.aten.detach.default, torch.ops.aten.t.default):  # views
            self.seen |= {leaf.shape for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        return result


@pytest.mark.parametrize("pefts_own", [False, True], ids=["ours", "peft"])
def test_no_copy_of_the_word_table_is_made(mllm_config: MllmConfig, pefts_own: bool) -> None:
    """peft's own layers make some, so the test would see them."""
    with pefts_own_layers() if pefts_own else nullcontext():
        model = model_of(mllm_config, tied=True)
    table = model.get_input_embeddings().original_module.weight

    with Shapes() as shapes:
        learn(model)

    assert (table.shape in shapes.seen) == pefts_own
    assert len(shapes.seen) > 20


def test_a_large_vocabulary_has_the_logits_of_fewer_positions_at_a_time() -> None:
    from cloc_mllm.mllm.losses import chunk_of

    assert chunk_of(49_152) == 512
    assert chunk_of(151_936) == 220
    assert chunk_of(2**26) == 1
