import math

import pytest
import torch

from cloc_mllm.mllm.losses import (
    IGNORE_INDEX,
    SoftBins,
    answer_loss,
    answer_loss_of_hidden,
    smoothed_bins,
)


def naive(logits, labels, start, num_bins, smoothing):
    """A double loop over positions and vocabulary."""
    total = torch.zeros((), dtype=torch.float64)
    for row, row_labels in zip(logits.double(), labels.tolist(), strict=True):
        for position, label in enumerate(row_labels[1:]):
            if label == IGNORE_INDEX:
                continue
            log_probs = row[position].log_softmax(-1)
            if smoothing == 0 or not start <= label < start + num_bins:
                total -= log_probs[label]
                continue
            weights = [
                math.exp(-0.5 * ((start + b - label) / smoothing) ** 2) for b in range(num_bins)
            ]
            for b in range(num_bins):
                total -= weights[b] / sum(weights) * log_probs[start + b]
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.7, 3.0])
def test_value_and_gradient_equal_a_double_loop(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 12, generator=generator, requires_grad=True)
    labels = torch.tensor([[1, 2, 3, -100, 7, 10], [-100, -100, 5, 9, 6, -100], [-100] * 6])
    soft_bins = SoftBins(5, 5, smoothing) if smoothing else None

    actual = answer_loss(logits, labels, soft_bins)
    (actual_gradient,) = torch.autograd.grad(actual, logits)
    expected = naive(logits, labels, 5, 5, smoothing)
    (expected_gradient,) = torch.autograd.grad(expected, logits)

    torch.testing.assert_close(actual, expected.float())
    torch.testing.assert_close(actual_gradient, expected_gradient)


@pytest.mark.parametrize("soft_bins", [None, SoftBins(5, 5, 0.7)])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_logits_in_chunks_change_neither_value_nor_gradient(soft_bins, chunk):
    torch.manual_seed(0)
    head = torch.nn.Linear(4, 12)
    hidden = torch.randn(2, 6, 4, requires_grad=True)
    labels = torch.tensor([[1, 2, 3, -100, 7, 10], [-100, -100, 5, 9, 6, -100]])
    inputs = [hidden, *head.parameters()]

    actual = answer_loss_of_hidden(hidden, labels, head, soft_bins, chunk=chunk)
    actual_gradients = torch.autograd.grad(actual, inputs)
    expected = answer_loss(head(hidden), labels, soft_bins)

    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual_gradients, torch.autograd.grad(expected, inputs))


def test_half_precision_logits_are_summed_in_float32():
    logits = torch.randn(1, 4, 9).bfloat16()
    labels = torch.tensor([[0, 1, 2, 3]])

    assert answer_loss(logits, labels).dtype == torch.float32


def test_a_batch_without_labels_costs_nothing_and_has_a_gradient():
    logits = torch.randn(2, 3, 4, requires_grad=True)

    loss = answer_loss(logits, torch.full((2, 3), IGNORE_INDEX))
    loss.backward()

    assert loss == 0 and (logits.grad == 0).all()


def test_smoothing_peaks_at_the_true_bin_and_sums_to_one():
    target = smoothed_bins(torch.tensor([0, 4]), 10, 1.5)

    assert target.argmax(1).tolist() == [0, 4]
    torch.testing.assert_close(target.sum(1), torch.ones(2))
