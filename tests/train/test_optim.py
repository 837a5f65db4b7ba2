from __future__ import annotations

import pytest
import torch
from torch import nn

from cloc_mllm.config import OptimConfig
from cloc_mllm.train.optim import build_optimizer, freeze_by_lr, lr_factor, param_groups, set_lr
from tests.train.toy import ToyModel


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.25), (3, 1.0), (4, 1.0), (8, 0.5), (12, 0.0), (20, 0.0)],
    ids=["first", "end-of-warmup", "peak", "halfway", "end", "past-the-end"],
)
def test_lr_warms_up_linearly_then_falls_as_a_cosine(step: int, expected: float) -> None:
    assert lr_factor(step, num_steps=12, warmup_steps=4) == pytest.approx(expected)


def test_lr_without_warmup_starts_at_the_peak() -> None:
    assert lr_factor(0, num_steps=10, warmup_steps=0) == 1.0


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    model = ToyModel()
    optim = OptimConfig(layer_lr={"encoder": 1e-4, "norm": 0.0})
    freeze_by_lr(model, optim)
    grouped = [id(p) for group in param_groups(model, optim) for p in group["params"]]
    trainable = [id(p) for name, p in model.named_parameters() if not name.startswith("norm")]
    assert sorted(grouped) == sorted(trainable)


def test_groups_take_the_longest_prefix_and_decay_only_matrices() -> None:
    model = ToyModel()
    optim = OptimConfig(lr=1.0, weight_decay=0.5, layer_lr={"encoder": 0.1, "encoder.bias": 0.01})
    names = {id(p): name for name, p in model.named_parameters()}
    actual = {
        names[id(p)]: (group["peak_lr"], group["weight_decay"])
        for group in param_groups(model, optim)
        for p in group["params"]
    }
    assert actual == {
        "encoder.weight": (0.1, 0.5),
        "encoder.bias": (0.01, 0.0),
        "norm.weight": (1.0, 0.0),
        "norm.bias": (1.0, 0.0),
        "head.weight": (1.0, 0.5),
        "head.bias": (1.0, 0.0),
        "logit_scale": (1.0, 0.0),
    }


def test_a_prefix_ends_at_a_dot() -> None:
    model = nn.ModuleDict({"head": nn.Linear(1, 1), "header": nn.Linear(1, 1)})
    freeze_by_lr(model, OptimConfig(layer_lr={"head": 0.0}))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"head.weight", "head.bias"}


def test_a_prefix_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'vision_tower'.*parts are encoder, head"):
        freeze_by_lr(ToyModel(), OptimConfig(layer_lr={"vision_tower": 0.0}))


def test_a_model_with_nothing_to_train_is_refused() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter is trainable"):
        build_optimizer(model, OptimConfig())


def test_set_lr_scales_each_group_from_its_own_peak() -> None:
    optimizer = build_optimizer(ToyModel(), OptimConfig(lr=1.0, layer_lr={"head": 0.1}))
    set_lr(optimizer, 0.5)
    set_lr(optimizer, 0.5)  # does not compound
    assert {group["lr"] for group in optimizer.param_groups} == {0.5, 0.05}
    assert isinstance(optimizer, torch.optim.AdamW)


def test_muon_takes_the_matrices_but_not_the_tables() -> None:
    model = nn.ModuleDict(
        {"embed_tokens": nn.Embedding(5, 4), "layer": nn.Linear(4, 4), "conv": nn.Conv2d(3, 4, 2)}
    )
    optim = OptimConfig(optimizer="muon", lr=1e-3, muon_lr=0.02, layer_lr={"layer": 5e-4})
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {
        names[id(p)]: (group["muon"], group["peak_lr"])
        for group in param_groups(model, optim)
        for p in group["params"]
    }
    assert rates == {
        "embed_tokens.weight": (False, 1e-3),
        "layer.weight": (True, 0.01),  # half the rate, as layer_lr says
        "layer.bias": (False, 5e-4),
        "conv.weight": (False, 1e-3),
        "conv.bias": (False, 1e-3),
    }
