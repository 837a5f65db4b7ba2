"""The losses against double loops written out from the paper's equations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from cloc_mllm.config import BoxLoss, LossConfig, Stage1Config
from cloc_mllm.losses.cloc_loss import cloc_loss
from cloc_mllm.losses.contrastive import contrastive_loss
from cloc_mllm.losses.grounding import grounding_loss
from cloc_mllm.train.stage1 import warn_of_collapse
from tests.models.batches import random_batch
from tests.models.tiny import tiny_cloc


def naive_contrastive(
    z: torch.Tensor,
    texts: torch.Tensor,
    scale: torch.Tensor,
    threshold: float,
    log_prior: torch.Tensor,
) -> torch.Tensor:
    """Equation 2 with its filter, one exponential at a time."""
    z, texts, scale = F.normalize(z, dim=1), F.normalize(texts, dim=1), scale.exp()
    total = torch.zeros((), dtype=z.dtype)
    for i in range(len(z)):
        kept = [
            j
            for j in range(len(z))
            if j == i or float(texts[i].detach() @ texts[j].detach()) <= threshold
        ]
        to_text = sum((scale * z[i] @ texts[j] - log_prior[j]).exp() for j in kept)
        to_region = sum((scale * texts[i] @ z[j]).exp() for j in kept)
        right = (scale * z[i] @ texts[i]).exp()
        total = total - (right * (-log_prior[i]).exp() / to_text).log() - (right / to_region).log()
    return (total / (2 * len(z))).squeeze()


def naive_sigmoid(
    z: torch.Tensor,
    texts: torch.Tensor,
    scale: torch.Tensor,
    threshold: float,
    log_prior: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """Equation 1 of SigLIP with the filter, one pair at a time."""
    z, texts, scale = F.normalize(z, dim=1), F.normalize(texts, dim=1), scale.exp()
    total = torch.zeros((), dtype=z.dtype)
    for i in range(len(z)):
        for j in range(len(z)):
            if j != i and float(texts[i].detach() @ texts[j].detach()) > threshold:
                continue
            sign = 1 if i == j else -1
            total = (
                total + (1 + (-sign * (scale * z[i] @ texts[j] - log_prior[j] + bias)).exp()).log()
            )
    return (total / len(z)).squeeze()


@pytest.mark.parametrize("tile_rows", [1, 3, 64], ids="tile {}".format)
@pytest.mark.parametrize("threshold", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("rows", [7, 17])  # fewer than the eight flags of a byte, and more
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("with_prior", [False, True], ids=["", "prior"])
def test_contrastive_loss_equals_the_double_loop(
    with_prior: bool, kind: str, rows: int, threshold: float, tile_rows: int
) -> None:
    torch.manual_seed(0)
    z = torch.randn(rows, 5, requires_grad=True)
    base = torch.randn(rows, 5)
    base[3], base[5] = base[1] * 2, base[1] + 0.01  # the same text, nearly the same text
    texts = base.requires_grad_()
    scale = torch.tensor([math.log(5.0)], requires_grad=True)
    bias = torch.tensor([-2.0], requires_grad=True)
    log_prior = torch.randn(rows) if with_prior else torch.zeros(rows)
    more = {"text_log_prior": log_prior} if with_prior else {}
    if kind == "softmax":
        inputs = (z, texts, scale)
        expected = naive_contrastive(*inputs, threshold, log_prior)
        actual = contrastive_loss(*inputs, threshold, tile_rows=tile_rows, **more)
    else:
        inputs = (z, texts, scale, bias)
        expected = naive_sigmoid(z, texts, scale, threshold, log_prior, bias)
        actual = contrastive_loss(
            z, texts, scale, threshold, logit_bias=bias, tile_rows=tile_rows, **more
        )
    torch.testing.assert_close(actual, expected)
    for tensor in inputs:
        got, wanted = (
            torch.autograd.grad(loss, tensor, retain_graph=True)[0] for loss in (actual, expected)
        )
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_prior_makes_logits_learn_how_often_a_text_is_said(power: float) -> None:
    """Nothing is known of the picture, so how often a text is said is all there is to learn."""
    often = 1 / torch.arange(5.0, 45.0)
    drawn = torch.multinomial(often, 800, replacement=True, generator=torch.manual_seed(0))
    log_prior = drawn.bincount().clamp(min=1).log()
    z = torch.eye(41)[[0]].expand(len(drawn), 41)
    along = torch.zeros(40, requires_grad=True)
    optimizer = torch.optim.Adam([along], lr=0.03)
    for _ in range(100):
        texts = torch.cat([along[:, None], torch.eye(40)], 1)
        loss = contrastive_loss(
            z, texts[drawn], torch.tensor([2.0]), 0.99, text_log_prior=power * log_prior[drawn]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logits = math.exp(2.0) * (along / (1 + along**2).sqrt()).detach()
    centred = log_prior - log_prior.mean()
    slope = ((logits * centred).sum() / (centred**2).sum()).item()
    assert slope == pytest.approx(power, abs=0.1)


def test_filter_matters_and_keeps_the_true_pair() -> None:
    z = torch.eye(4)[[0, 0]]
    texts = torch.eye(4)[[0, 0]]
    scale = torch.tensor([0.0])
    assert contrastive_loss(z, texts, scale, 0.9).item() == pytest.approx(0.0)
    assert contrastive_loss(z, texts, scale, 1.0).item() == pytest.approx(math.log(2))


def test_order_does_not_matter() -> None:
    z, texts, scale = torch.randn(6, 4), torch.randn(6, 4), torch.tensor([2.0])
    order = torch.randperm(6)
    torch.testing.assert_close(
        contrastive_loss(z, texts, scale, 0.5), contrastive_loss(z[order], texts[order], scale, 0.5)
    )


def test_a_confident_sigmoid_stays_finite() -> None:
    """Logits of 100 and -200: the logarithm of a sigmoid computed as such would be -inf."""
    z = torch.eye(4)[[0, 1]].requires_grad_()
    texts, bias = torch.eye(4)[[1, 0]], torch.tensor([-100.0])
    loss = contrastive_loss(z, texts, torch.tensor([math.log(100.0)]), 1.0, logit_bias=bias)
    loss.backward()
    assert loss.item() == pytest.approx(100 + math.log(2), abs=1e-4)
    assert z.grad is not None and z.grad.isfinite().all()


@pytest.mark.parametrize("rows", [0, 1])
def test_nothing_to_contrast_is_zero_with_a_gradient(rows: int) -> None:
    z = torch.randn(rows, 4, requires_grad=True)
    scale = torch.tensor([2.0], requires_grad=True)
    loss = contrastive_loss(z, torch.randn(rows, 4), scale, 1.0)
    loss.backward()
    assert loss.item() == 0 and scale.grad is not None


def test_grounding_mse_is_the_mean_over_all_box_numbers() -> None:
    located, boxes = torch.rand(5, 4), torch.rand(5, 4)
    expected = sum(
        float((located[r, k] - boxes[r, k]) ** 2) for r in range(5) for k in range(4)
    ) / (4 * 5)
    assert grounding_loss(located, boxes, 5, "mse").item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["mse", "l1_giou"])
def test_grounding_is_zero_only_when_right(kind: str) -> None:
    boxes = torch.tensor([[0.1, 0.1, 0.4, 0.5]])
    assert grounding_loss(boxes, boxes, 1, kind).item() == pytest.approx(0)  # type: ignore[arg-type]
    assert grounding_loss(boxes + 0.1, boxes, 1, kind).item() > 0  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["mse", "l1_giou"])
def test_of_several_boxes_of_a_phrase_the_nearest_counts(kind: BoxLoss) -> None:
    located = torch.tensor([[0.1, 0.1, 0.4, 0.5], [0.5, 0.5, 0.9, 0.9]], requires_grad=True)
    boxes = torch.tensor([[0.6, 0.1, 0.9, 0.5], [0.1, 0.1, 0.4, 0.6], [0.5, 0.4, 0.9, 0.9]])
    region = torch.tensor([0, 0, 1])
    actual = grounding_loss(located, boxes, 2, kind, region)
    expected = grounding_loss(located, boxes[1:], 2, kind)
    torch.testing.assert_close(actual, expected)
    (of_all,) = torch.autograd.grad(actual, located)
    (of_nearest,) = torch.autograd.grad(expected, located)
    torch.testing.assert_close(of_all, of_nearest)
    nothing = located[:0]
    assert grounding_loss(nothing, boxes[:0], 0, kind, region[:0]).item() == 0


def test_lambda_is_the_share_of_images_with_regions() -> None:
    cloc = tiny_cloc()
    batch = random_batch(cloc, (2, 0, 3, 0))
    outputs = cloc(batch)
    terms = cloc_loss(outputs, batch, LossConfig())
    expected = terms["clip"] + 0.5 * (terms["cloc"] + terms["grounding"])
    torch.testing.assert_close(terms["loss"].detach(), expected)


@pytest.mark.parametrize("regions", [(0, 0), (1, 0)], ids=["no region", "one region"])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_few_regions_train_clip_and_stay_finite(kind: str, regions: tuple[int, ...]) -> None:
    cloc = tiny_cloc(contrastive_loss=kind).train()  # type: ignore[arg-type]
    batch = random_batch(cloc, regions)
    terms = cloc_loss(cloc(batch), batch, LossConfig())
    terms["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in cloc.parameters())


def test_plain_clip_has_only_the_clip_term() -> None:
    cloc = tiny_cloc(kind="none")
    batch = random_batch(cloc)
    terms = cloc_loss(cloc(batch), batch, LossConfig())
    assert set(terms) == {"loss", "clip"}


def test_the_share_of_filtered_pairs_is_among_the_terms() -> None:
    """All texts alike: the filter leaves nothing to tell apart, and the share says so."""
    cloc = tiny_cloc()
    batch = random_batch(cloc)
    outputs = cloc(batch)
    assert outputs.region_text_features is not None
    alike = outputs._replace(
        region_text_features=torch.ones_like(outputs.region_text_features)
        + 0.01 * outputs.region_text_features
    )
    terms = cloc_loss(alike, batch, LossConfig())
    assert terms["same_text"] == 1 and terms["cloc"].abs() < 1e-6
    different = torch.eye(len(batch.boxes), outputs.region_text_features.shape[1])
    different[1] = different[0]  # two of five, so 2 of 20 pairs
    terms = cloc_loss(outputs._replace(region_text_features=different), batch, LossConfig())
    assert terms["same_text"].item() == pytest.approx(2 / 20)


def test_a_run_whose_texts_collapsed_is_warned() -> None:
    config = Stage1Config()
    collapsed = {"same_text": 0.97, "cloc": 0.0}
    assert "leaves out 97% of the pairs" in warn_of_collapse(config, 500, collapsed)
    assert warn_of_collapse(config, 10, collapsed) == ""  # in warm-up
    assert warn_of_collapse(config, 500, {"same_text": 0.2}) == ""
    assert warn_of_collapse(config, 500, {}) == ""  # a plain CLIP
