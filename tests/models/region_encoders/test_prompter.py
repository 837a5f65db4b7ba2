"""The Prompter's shared work against one whole transformer layer for each prompt."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cloc_mllm.models.position import cell_coverage, token_cells
from cloc_mllm.models.region_encoders import mean_readout
from cloc_mllm.models.region_encoders.prompter import Prompter
from cloc_mllm.models.vision_encoder import ImageFeatures

GRID_HW, TOKEN_DIM, EMBED_DIM = (3, 4), 16, 12
# ragged and out of order; the second of four images has no prompt, the last has the most
IMAGE_INDEX = torch.tensor([3, 0, 2, 3, 0, 3, 3, 3, 3, 3, 3, 3])
FORMS = [
    (readout, prior, text_prior, width)
    for readout in ("mean", "prompt")
    for prior, text_prior, width in (
        ("none", "linear", 16),
        ("both", "linear", 16),
        ("both", "region", 16),
        ("both", "region", 24),
    )
]


def naive_layer(prompter: Prompter, prompt: Tensor, tokens: Tensor, bias: Tensor) -> Tensor:
    """z of one prompt: `prompt: float[K, D]`, `tokens: float[N, D]`, `bias: float[N]` or 0."""
    x = torch.cat([prompt, tokens])
    normed = prompter.norm_attention(x)
    logits = prompter.query(normed) @ prompter.key(normed).T / math.sqrt(x.shape[1])
    logits[: len(prompt), len(prompt) :] += bias
    x = x + prompter.output(logits.softmax(-1) @ prompter.value(normed))
    x = x + prompter.mlp(prompter.norm_mlp(x))
    pooled = x if prompter.readout == "mean" else x[: len(prompt)]
    return prompter.projection(pooled.mean(0))


def naive_boxes(prompter: Prompter, image: ImageFeatures, boxes: Tensor) -> Tensor:
    bias = torch.zeros(len(boxes), 1)
    if prompter.box_gate is not None:
        bias = prompter.box_gate * cell_coverage(boxes, token_cells(GRID_HW, boxes.device))
    prompts = prompter.corners(prompter._code(boxes)).unflatten(-1, (2, -1))
    tokens = prompter.prepare(image).tokens[IMAGE_INDEX]
    return torch.stack(
        [naive_layer(prompter, *one) for one in zip(prompts, tokens, bias, strict=True)]
    )


def naive_texts(prompter: Prompter, image: ImageFeatures, texts: Tensor) -> Tensor:
    bias = torch.zeros(len(texts), 1)
    context = prompter.prepare(image)
    if prompter.text_gate is not None:
        embeddings = prompter.projection(prompter.output(context.values))
        if prompter.text_prior == "region":
            embeddings = prompter.embed_tokens(context)
        embeddings = embeddings[IMAGE_INDEX]
        bias = prompter.text_gate * torch.cosine_similarity(embeddings, texts[:, None], dim=-1)
    prompts = prompter.text_token(prompter.text_norm(texts)).unsqueeze(1)
    tokens = context.tokens[IMAGE_INDEX]
    return torch.stack(
        [naive_layer(prompter, *one) for one in zip(prompts, tokens, bias, strict=True)]
    )


def inputs(dtype: torch.dtype) -> tuple[ImageFeatures, Tensor, Tensor]:
    torch.manual_seed(1)
    corner, side = torch.rand(2, len(IMAGE_INDEX), 2, dtype=dtype) / 2
    tokens = torch.randn(4, math.prod(GRID_HW), TOKEN_DIM, dtype=dtype)
    texts = torch.randn(len(IMAGE_INDEX), EMBED_DIM, dtype=dtype)
    image = ImageFeatures(torch.empty(0), tokens.requires_grad_(), GRID_HW)
    return image, torch.cat([corner, corner + side + 0.1], 1), texts.requires_grad_()


def make_prompter(
    readout: str, prior: str, width: int, dtype: torch.dtype, text_prior: str = "linear"
) -> Prompter:
    torch.manual_seed(0)
    prompter = Prompter(
        [TOKEN_DIM],
        EMBED_DIM,
        width,
        readout=readout,  # type: ignore[arg-type]
        spatial_prior=prior,  # type: ignore[arg-type]
        text_prior=text_prior,  # type: ignore[arg-type]
        free_form=False,
    )
    for norm in (prompter.norm_attention, prompter.norm_mlp, prompter.text_norm):
        torch.nn.init.normal_(norm.weight, 1.0, 0.3)  # ones and zeros would hide a mistake
        torch.nn.init.normal_(norm.bias, 0.0, 0.3)
    return prompter.to(dtype)


@pytest.mark.parametrize(("readout", "prior", "text_prior", "width"), FORMS)
@pytest.mark.parametrize("kind", ["box", "text"])
def test_value_and_gradient_equal_a_whole_layer_for_each_prompt(
    kind: str, readout: str, prior: str, text_prior: str, width: int
) -> None:
    prompter = make_prompter(readout, prior, width, torch.float64, text_prior)
    image, boxes, texts = inputs(torch.float64)
    context = prompter.prepare(image)
    if kind == "box":
        actual = prompter.embed_boxes(context, boxes, IMAGE_INDEX)
        expected = naive_boxes(prompter, image, boxes)
    else:
        actual = prompter.embed_texts(context, texts, IMAGE_INDEX)
        expected = naive_texts(prompter, image, texts)
    torch.testing.assert_close(actual, expected)
    variables = [image.tokens, texts, *prompter.parameters()]
    weighted = torch.randn_like(actual)
    actual_grads, expected_grads = (
        torch.autograd.grad((z * weighted).sum(), variables, allow_unused=True)
        for z in (actual, expected)
    )
    for got, wanted in zip(actual_grads, expected_grads, strict=True):
        if wanted is not None or (got is not None and got.any()):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(("readout", "prior", "text_prior", "width"), FORMS)
def test_float32_is_as_close(readout: str, prior: str, text_prior: str, width: int) -> None:
    prompter = make_prompter(readout, prior, width, torch.float32, text_prior)
    image, boxes, texts = inputs(torch.float32)
    context = prompter.prepare(image)
    z = prompter.embed_boxes(context, boxes, IMAGE_INDEX)
    torch.testing.assert_close(z, naive_boxes(prompter, image, boxes))
    z = prompter.embed_texts(context, texts, IMAGE_INDEX)
    torch.testing.assert_close(z, naive_texts(prompter, image, texts))


@pytest.mark.parametrize("readout", ["mean", "prompt"])
def test_bf16_autocast_is_close(readout: str) -> None:
    """Forward and backward. Measured: 4.4 % of a standard deviation at worst, by the gradient of
    the `prompt` readout; a term left out would change whole ones."""
    prompter = make_prompter(readout, "both", 16, torch.float32)
    image, boxes, _ = inputs(torch.float32)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            z = prompter.embed_boxes(prompter.prepare(image), boxes, IMAGE_INDEX)
        (grad,) = torch.autograd.grad(z.float().square().sum(), [image.tokens])
        results.append((z.float().detach(), grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=0.08 * expected.detach().std().item()
        )


def test_linear_text_prior_compares_texts_with_what_attention_to_a_token_adds() -> None:
    prompter = make_prompter("prompt", "both", 16, torch.float32)
    image, _, texts = inputs(torch.float32)
    context = prompter.prepare(image)
    actual = prompter.similarity(texts.expand(4, -1, -1), context)
    added = prompter.projection(prompter.output(context.values)).unsqueeze(1)
    expected = torch.cosine_similarity(added, texts[None, :, None], dim=-1)
    torch.testing.assert_close(actual, expected)
    z = prompter.embed_texts(context, texts, IMAGE_INDEX)
    prompter.text_prior = "region"
    assert not torch.allclose(z, prompter.embed_texts(context, texts, IMAGE_INDEX))


@pytest.mark.parametrize("readout", ["mean", "prompt"])
def test_a_batch_without_prompts_still_reaches_every_parameter(readout: str) -> None:
    prompter = make_prompter(readout, "both", 24, torch.float32)
    image, boxes, texts = inputs(torch.float32)
    context, none = prompter.prepare(image), IMAGE_INDEX[:0]
    z = prompter.embed_boxes(context, boxes[:0], none)
    text_z = prompter.embed_texts(context, texts[:0], none)
    assert z.shape == text_z.shape == (0, EMBED_DIM)
    (z.sum() + text_z.sum()).backward()
    without = [name for name, p in prompter.named_parameters() if p.grad is None]
    assert without == []


@pytest.mark.parametrize("images_per_tile", [2, 3, 100])
def test_images_share_tiles_of_the_mean_readout(
    monkeypatch: pytest.MonkeyPatch, images_per_tile: int
) -> None:
    """As on a GPU; on a CPU each image has tiles of its own."""
    results = []
    for step in (1, images_per_tile):
        monkeypatch.setattr(mean_readout, "_images_per_tile", lambda _, step=step: step)
        torch.manual_seed(0)
        prompter = Prompter(
            [TOKEN_DIM],
            EMBED_DIM,
            16,
            readout="mean",
            spatial_prior="both",
            text_prior="linear",
            free_form=False,
        )
        image = ImageFeatures(torch.zeros(4, EMBED_DIM), torch.randn(4, 12, TOKEN_DIM), GRID_HW)
        boxes = torch.rand(len(IMAGE_INDEX), 4).sort(-1).values
        z = prompter.embed_boxes(prompter.prepare(image), boxes, IMAGE_INDEX, most=9)
        z.square().sum().backward()
        gradients = {n: p.grad for n, p in prompter.named_parameters() if p.grad is not None}
        results.append({"z": z.detach(), **gradients})
    expected, actual = results
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=name)
