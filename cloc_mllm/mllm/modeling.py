"""The MLLM as a Transformers model: CLOC encoder, projectors, any causal language model.

Letters: B rows of the batch, I distinct images, S canvas side, N tokens of an image, T text
tokens, R regions (packed), H width of the language model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from cloc_mllm.mllm.configuration import ClocMllmConfig
from cloc_mllm.mllm.coordinates import IMAGE_TOKEN, REGION_TOKEN
from cloc_mllm.mllm.losses import IGNORE_INDEX, answer_loss, answer_loss_of_hidden
from cloc_mllm.mllm.projector import Projector, to_original_frame
from cloc_mllm.models.build import build_cloc_vision
from cloc_mllm.models.position import token_cells

_VISION_INPUTS = (
    "pixel_values",
    "image_frame",
    "image_index",
    "region_boxes",
    "region_image_index",
)


class VisionInputs(NamedTuple):
    """What a batch shows, as the processor emits it.

    Attributes:
        pixel_values: float[I, 3, S, S].
        image_frame: float[I, 4], the canvas as a box in the original's normalised frame.
        image_index: int64[B], the image of each row.
        region_boxes: float[R, 4], canvas frame.
        region_image_index: int64[R], the row each region belongs to; a row's regions stand in the
            order of its `<region>` tokens.
    """

    pixel_values: Tensor
    image_frame: Tensor
    image_index: Tensor
    region_boxes: Tensor
    region_image_index: Tensor


class ClocMllmForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """`vision` -> `projector` (and `region_projector`) -> `language_model`.

    Image features replace the `<image>` tokens (N a row) and region features the `<region>` tokens.
    """

    config_class = ClocMllmConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(
        self, config: ClocMllmConfig, language_model: PreTrainedModel | None = None
    ) -> None:
        """`language_model` takes the place of a fresh one made from `config.text_config`."""
        super().__init__(config)
        # on a real device even where Transformers builds on "meta": what a tower computes in
        # its constructor and does not save (see `_init_weights`) would be lost
        with torch.device("cpu"):
            self.vision = build_cloc_vision(config.cloc_model_config())
        self._unsaved_buffers = {
            module: buffers
            for module in self.vision.modules()
            if (buffers := _non_persistent_buffers(module))
        }
        feature_dims = [self.vision.token_dim]
        if config.vision_features == "encoder+prompter":
            feature_dims.append(self.vision.embed_dim)
        num_boxes = len(feature_dims)
        width = config.text_config.hidden_size
        word_std = getattr(config.text_config, "initializer_range", 0.02)
        hidden = config.projector_width
        self.projector = Projector(feature_dims, width, word_std, num_boxes, hidden)
        self.region_projector = Projector(
            [self.vision.embed_dim], width, word_std, hidden_dim=hidden
        )
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        # what some language models do to logits after their head, `answer_loss` alone sees
        self._head_reads_hidden = not _changes_logits(config.text_config)
        self.post_init()

    def forward(  # noqa: PLR0913  the signature Transformers calls
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_frame: Tensor | None = None,
        image_index: Tensor | None = None,
        region_boxes: Tensor | None = None,
        region_image_index: Tensor | None = None,
        region_features: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where `labels` are given.

        Args:
            input_ids, attention_mask: int64[B, T].
            pixel_values, image_frame, image_index, region_boxes, region_image_index: see
                `VisionInputs`; `image_index` defaults to one image a row, `image_frame` to images
                without padding. None together for text alone.
            region_features: float[R, H] of `prefill`, when the images are in the cache already;
                only `region_image_index` goes with it.
            labels: int64[B, T], `IGNORE_INDEX` where nothing is learnt. In training mode the
                output then holds the last position's logits only.
            num_items_in_batch: what the summed loss is divided by; by default the number of
                labelled positions (at least 1) of this call.

        Raises:
            ValueError: a row's placeholders do not match its features.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("pass input_ids or inputs_embeds, got neither")
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("pixel_values need input_ids, to know where the features belong")
            vision = _vision_inputs(
                input_ids, pixel_values, image_frame, image_index, region_boxes, region_image_index
            )
            inputs_embeds = self._insert_vision(input_ids, inputs_embeds, vision)
        elif region_features is not None:
            assert input_ids is not None and region_image_index is not None
            inputs_embeds = self._insert_regions(
                input_ids, inputs_embeds, region_features, region_image_index
            )
        inputs = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            **{**kwargs, "return_dict": True},
        }
        if labels is None:
            return self.language_model(**inputs)
        return self._learn(inputs, labels, num_items_in_batch)

    def _learn(
        self, inputs: dict[str, Any], labels: Tensor, num_items: Tensor | int | None
    ) -> CausalLMOutputWithPast:
        """The language model's output with the loss; without most logits where it is trained."""
        few_logits = self.training and self._head_reads_hidden
        if few_logits:
            inputs = {**inputs, "output_hidden_states": True, "logits_to_keep": 1}
        outputs = self.language_model(**inputs)
        soft_bins = self.config.soft_bins()
        if few_logits:
            hidden, head = outputs.hidden_states[-1], self.get_output_embeddings()
            total = answer_loss_of_hidden(hidden, labels, head, soft_bins)
        else:
            total = answer_loss(outputs.logits, labels, soft_bins)
        if num_items is None:
            num_items = (labels[:, 1:] != IGNORE_INDEX).sum().clamp(min=1)
        outputs.loss = total / num_items
        return outputs

    def encode_vision(self, inputs: VisionInputs) -> tuple[Tensor, Tensor]:
        """Image features float[I, N, H] and region features float[R, H] for the language model."""
        dtype = self.projector.output.weight.dtype
        image = self.vision.encode_image(inputs.pixel_values.to(dtype))
        cells = token_cells(image.grid_hw, image.tokens.device).expand(len(image.tokens), -1, -1)
        features, token_boxes = [image.tokens], [cells]
        if self.config.vision_features == "encoder+prompter":
            regions, boxes = self.vision.read_tokens(image)
            features.append(regions)
            token_boxes.append(boxes)
        frame = inputs.image_frame[:, None, :]
        token_boxes = [to_original_frame(boxes, frame) for boxes in token_boxes]
        image_features = self.projector(features, token_boxes)

        region_image = inputs.image_index[inputs.region_image_index]
        z = self.vision.embed_boxes(image, inputs.region_boxes, region_image)
        boxes = to_original_frame(inputs.region_boxes, inputs.image_frame[region_image])
        return image_features, self.region_projector([z], [boxes])

    @torch.no_grad()
    def prefill(self, prefix_ids: Tensor, inputs: VisionInputs) -> tuple[DynamicCache, Tensor]:
        """Read each image and the tokens that all rows start with once; questions come after.

        Args:
            prefix_ids: int64[P], with the N image tokens and without a `<region>`.

        Returns:
            the cache of P tokens for B rows, which `generate` continues when it is given all of
            `input_ids` and `attention_mask`; region features float[R, H] for `forward`.
        """
        image_features, region_features = self.encode_vision(inputs)
        input_ids = prefix_ids.expand(len(image_features), -1)
        embeds = self._insert_images(
            input_ids, self.get_input_embeddings()(input_ids), image_features
        )
        cache = DynamicCache(config=self.config.get_text_config(decoder=True))
        # the body alone: nobody asks which token follows an image token
        self.language_model.base_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        cache.batch_select_indices(inputs.image_index)
        return cache, region_features

    def _insert_vision(self, input_ids: Tensor, embeds: Tensor, inputs: VisionInputs) -> Tensor:
        image_features, region_features = self.encode_vision(inputs)
        of_row = image_features[inputs.image_index]
        embeds = self._insert_images(input_ids, embeds, of_row)
        return self._insert_regions(input_ids, embeds, region_features, inputs.region_image_index)

    def _insert_images(self, input_ids: Tensor, embeds: Tensor, features: Tensor) -> Tensor:
        """`features`: float[B, N, H], one image a row."""
        is_image = input_ids == self.config.image_token_id
        num_tokens = torch.full_like(input_ids[:, 0], features.shape[1])
        _check_placeholders(IMAGE_TOKEN, "image features", is_image, num_tokens)
        return embeds.masked_scatter(is_image[..., None], features.flatten(0, 1).to(embeds.dtype))

    def _insert_regions(
        self, input_ids: Tensor, embeds: Tensor, features: Tensor, region_image_index: Tensor
    ) -> Tensor:
        """`features`: float[R, H], in any order of rows."""
        is_region = input_ids == self.config.region_token_id
        num_regions = torch.bincount(region_image_index, minlength=len(input_ids))
        _check_placeholders(REGION_TOKEN, "region boxes", is_region, num_regions)
        order = region_image_index.argsort(stable=True)
        return embeds.masked_scatter(is_region[..., None], features[order].to(embeds.dtype))

    def train(self, mode: bool = True) -> ClocMllmForConditionalGeneration:
        """A frozen vision encoder stays in eval mode: its batch norms must not drift either."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.vision.parameters()):
            self.vision.eval()
        return self

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Vision inputs go in with the prompt only; later steps find them in the cache."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        keep = kwargs.get("is_first_iteration") or not kwargs.get("use_cache", True)
        return {
            name: value if keep or name not in (*_VISION_INPUTS, "region_features") else None
            for name, value in inputs.items()
        }

    def _expand_inputs_for_generation(  # type: ignore[override]
        self, expand_size: int = 1, *, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat rows for beams or samples; images are not repeated, only pointed to."""
        vision = {name: kwargs.pop(name, None) for name in _VISION_INPUTS}
        if expand_size > 1 and vision["pixel_values"] is not None and input_ids is not None:
            given = _vision_inputs(input_ids, **vision)
            copies = torch.arange(expand_size, device=input_ids.device)
            rows = given.region_image_index[:, None] * expand_size + copies
            vision |= {
                "image_index": given.image_index.repeat_interleave(expand_size),
                "region_boxes": given.region_boxes.repeat_interleave(expand_size, 0),
                "region_image_index": rows.flatten(),
            }
        base: Any = super()
        input_ids, kwargs = base._expand_inputs_for_generation(
            expand_size=expand_size, input_ids=input_ids, **kwargs
        )
        return input_ids, {**kwargs, **vision}

    def _supports_logits_to_keep(self) -> bool:
        """Only the last position's logits of a prompt, where the language model can do that."""
        language_model: Any = self.language_model
        return bool(language_model._supports_logits_to_keep())

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Transformers calls this for every module that no file held all tensors of.

        Nothing is initialised here: every part does so in its constructor. But `from_pretrained`
        replaces non-persistent buffers by uninitialised memory; those get their values back.
        """
        for name, value in self._unsaved_buffers.get(module, {}).items():
            module.get_buffer(name).copy_(value)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)


def _vision_inputs(
    input_ids: Tensor,
    pixel_values: Tensor,
    image_frame: Tensor | None,
    image_index: Tensor | None,
    region_boxes: Tensor | None,
    region_image_index: Tensor | None,
) -> VisionInputs:
    """Fill in what may be left out."""
    num_rows, num_images = len(input_ids), len(pixel_values)
    if image_index is None:
        if num_images != num_rows:
            raise ValueError(
                f"got {num_images} images for {num_rows} rows of input_ids; pass image_index, "
                "the image of each row, when they are not one to one"
            )
        image_index = torch.arange(num_rows, device=input_ids.device)
    if image_frame is None:
        image_frame = pixel_values.new_tensor([0.0, 0.0, 1.0, 1.0]).expand(num_images, 4)
    if region_boxes is None or region_image_index is None:
        region_boxes = image_frame.new_zeros(0, 4)
        region_image_index = image_index.new_zeros(0)
    return VisionInputs(pixel_values, image_frame, image_index, region_boxes, region_image_index)


def _check_placeholders(token: str, features: str, found: Tensor, expected: Tensor) -> None:
    """Raise a ValueError that names the first row whose placeholders do not match its features."""
    num_found = found.sum(1)
    wrong = (num_found != expected).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"sample {row} has {int(num_found[row])} {token} tokens but {int(expected[row])} "
            f"{features}; the processor must emit one placeholder a feature (was the text cut?)"
        )


def _changes_logits(text_config: PreTrainedConfig) -> bool:
    """Whether logits are more than the head's output (soft caps of Gemma, scales of Cohere)."""
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
    return any(getattr(text_config, name, None) for name in names)


def _non_persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    saved = module.state_dict().keys()
    buffers = module.named_buffers(recurse=False)
    return {name: value.clone() for name, value in buffers if name not in saved}
