"""The `mean` readout: sums the layer's outputs at all image tokens, for every prompt.

A prompt's K tokens change the attention of image token n only by the weight they take:
`h_n = x_n + w_n o_n + sum_k p_nk u_k`. Here x are the tokens, o their attention output among
themselves, u the output of the prompt's values, and (p_n, w_n) the softmax over n's logits to the
prompt tokens and the logsumexp of its logits to the image tokens. LayerNorm scales this mixture by
the root of a quadratic form of the weights. So the MLP's first product is a mixture of the products
of x, o and u, too, and its second product commutes with the sum.

The result is exact. Matrix products are made once per image (8 N D^2); a prompt costs only the GELU
of N mixtures instead of 10 N D^2 of its own.

Letters: B images, N image tokens, D width of the layer, H = 4 D hidden width of the MLP, Q prompts
per image, K tokens of one prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cloc_mllm.models.position import at_least_float32

_TILE_PROMPTS = 8  # prompts of one image whose mixtures are in memory at a time
_GPU_TILE_NUMBERS = 2**26  # of a tile; 256 MiB, of which backward holds about four


class ImageOutputs(NamedTuple):
    """The values of the layer at the image tokens that do not depend on the prompt.

    Attributes:
        queries: float[B, N, D].
        log_sums: float[B, N], logsumexp of each token's logits over the image tokens.
        attended: float[B, N, D], o.
        centred: float[2, B, N, D], x and o less their mean over D, as LayerNorm needs them.
        hidden: float[2, B, N, H], `weight` times `centred`.
        weight, bias: float[H, D] and float[H] of the MLP's first product, with those of LayerNorm
            multiplied in.
    """

    queries: Tensor
    log_sums: Tensor
    attended: Tensor
    centred: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def compute(
        cls, tokens: Tensor, logits: Tensor, queries: Tensor, attended: Tensor, layers: MlpStart
    ) -> ImageOutputs:
        """`logits: float[B, N, N]` and `attended` are of the image tokens among themselves."""
        centred = _centred(torch.stack([tokens, attended.to(tokens.dtype)]))
        weight = layers.linear.weight * layers.norm.weight
        bias = F.linear(layers.norm.bias, layers.linear.weight, layers.linear.bias)
        hidden = F.linear(centred, weight)
        log_sums = at_least_float32(logits).logsumexp(-1)
        return cls(queries, log_sums, attended, centred, hidden, weight, bias)


class MlpStart(NamedTuple):
    """The LayerNorm before the MLP, and the MLP's first linear layer."""

    norm: nn.LayerNorm
    linear: nn.Linear


def summed_hidden(image: ImageOutputs, own: Tensor, weights: Tensor, eps: float) -> Tensor:
    """Computes sum_n GELU(linear(norm(h_n))) for every prompt: float[B, Q, H], at least float32.

    Args:
        own: float[B, Q, K, D], u.
        weights: float[B, Q, N, K + 1], p and w.
        eps: the epsilon of LayerNorm.
    """
    own = _centred(own)
    products = F.linear(own, image.weight)
    weights = at_least_float32(weights)
    to_own, to_image = weights[..., :-1], weights[..., -1]
    with torch.autocast(own.device.type, enabled=False):
        scale = _inverse_deviation(image.centred, own, to_own, to_image, eps)
        # the bias is one more vector, with weight 1
        vectors = torch.cat([products, image.bias.expand_as(products[:, :, :1])], 2)
        own_weights = torch.cat(
            [scale.unsqueeze(-1) * to_own, torch.ones_like(to_own[..., :1])], -1
        )
        return _SummedGelu.apply(
            image.hidden.to(scale.dtype),
            torch.stack([scale, scale * to_image]),
            vectors.to(scale.dtype),
            own_weights,
        )


def _centred(x: Tensor) -> Tensor:
    x = at_least_float32(x)
    return x - x.mean(-1, keepdim=True)


def _inverse_deviation(
    centred: Tensor, own: Tensor, to_own: Tensor, to_image: Tensor, eps: float
) -> Tensor:
    """Computes 1 / sqrt(var(h_n) + eps) from the scalar products of x, o and u: float[B, Q, N]."""
    x, o = centred
    flat = own.flatten(1, 2).transpose(1, 2)
    x_u, o_u = ((v @ flat).unflatten(-1, own.shape[1:3]).transpose(1, 2) for v in (x, o))
    x_x, x_o, o_o = ((a * b).sum(-1).unsqueeze(1) for a, b in ((x, x), (x, o), (o, o)))
    among_own = to_own @ (own @ own.transpose(2, 3))
    with_own = to_own * (2 * (x_u + to_image.unsqueeze(-1) * o_u) + among_own)
    squared = x_x + to_image * (2 * x_o + to_image * o_o) + with_own.sum(-1)
    return (squared.clamp(min=0) / own.shape[-1] + eps).rsqrt()


class _SummedGelu(torch.autograd.Function):
    """Computes sum_n GELU(sum_j shared_weights_jqn shared_jn + sum_k own_weights_qnk own_qk).

    It takes a few images and prompts at a time, and again for the gradient, so that
    float[B, Q, N, H] never exists as a whole.

    Args:
        shared: float[2, B, N, H]; shared_weights: float[2, B, Q, N].
        own: float[B, Q, K, H]; own_weights: float[B, Q, N, K].
    """

    @staticmethod
    def forward(
        ctx: Any, shared: Tensor, shared_weights: Tensor, own: Tensor, own_weights: Tensor
    ) -> Tensor:
        ctx.save_for_backward(shared, shared_weights, own, own_weights)
        summed = own.new_empty(own.shape[0], own.shape[1], own.shape[3])
        for images, prompts, mixtures in _tiles(shared, shared_weights, own, own_weights):
            summed[images, prompts] = F.gelu(mixtures).sum(2)
        return summed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        inputs = ctx.saved_tensors
        grads = tuple(torch.zeros_like(tensor) for tensor in inputs)
        to_shared, to_shared_weights, to_own, to_own_weights = grads
        shared, shared_weights, own, own_weights = inputs
        with torch.autocast(grad.device.type, enabled=False):
            for images, prompts, mixtures in _tiles(*inputs):
                at = images, prompts
                # contiguous: on an expanded gradient the CPU's kernel is 8 times slower
                error = grad[at].unsqueeze(2).expand_as(mixtures).contiguous()
                error = torch.ops.aten.gelu_backward(error, mixtures)
                for j in range(2):
                    weighted = error * shared_weights[j][at].unsqueeze(-1)
                    to_shared[j, images] += weighted.sum(1)
                    to_shared_weights[j][at] = (error * shared[j, images].unsqueeze(1)).sum(-1)
                to_own[at] = own_weights[at].transpose(2, 3) @ error
                to_own_weights[at] = error @ own[at].transpose(2, 3)
        return grads


def _tiles(
    shared: Tensor, shared_weights: Tensor, own: Tensor, own_weights: Tensor
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields the inputs of GELU: slices of images and of their prompts, and
    float[images, prompts, N, H]."""
    num_images, num_prompts, num_own, _ = own.shape
    step = _images_per_tile(shared)
    for i, q in product(range(0, num_images, step), range(0, num_prompts, _TILE_PROMPTS)):
        images, prompts = at = slice(i, i + step), slice(q, q + _TILE_PROMPTS)
        mixed = shared[0, images].unsqueeze(1) * shared_weights[0][at].unsqueeze(-1)
        mixed.addcmul_(shared[1, images].unsqueeze(1), shared_weights[1][at].unsqueeze(-1))
        for k in range(num_own):
            mixed.addcmul_(own[at][:, :, None, k], own_weights[at][..., k, None])
        yield images, prompts, mixed


def _images_per_tile(shared: Tensor) -> int:
    """One on a CPU, whose cache holds a small tile; on a GPU as many as make a few kernels long."""
    if shared.device.type == "cpu":
        return 1
    num_tokens, hidden_width = shared.shape[-2:]
    return max(1, _GPU_TILE_NUMBERS // (_TILE_PROMPTS * num_tokens * hidden_width))
