"""The MLLM as a Transformers model: CLOC encoder, projectors, any causal language model.

Letters: B rows of the batch, I distinct images, K blocks of `<image>` tokens (`vision_inputs`),
S canvas side, N tokens that the projector makes of an image, T text tokens, R regions (packed),
H width of the language model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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

from cloc_mllm.data.wordings import REGION_TOKEN
from cloc_mllm.earlier import RENAMED_WEIGHTS
from cloc_mllm.mllm.answer_boxes import (
    AnswerBoxHead,
    PrompterBoxHead,
    SeenImages,
    writing_states,
)
from cloc_mllm.mllm.configuration import ClocMllmConfig
from cloc_mllm.mllm.coordinates import BOX_TOKEN
from cloc_mllm.mllm.language_model import CACHE
from cloc_mllm.mllm.losses import (
    IGNORE_INDEX,
    answer_loss,
    answer_loss_of_hidden,
    chunk_of,
    loss_of_states,
)
from cloc_mllm.mllm.packing import mask_for
from cloc_mllm.mllm.places import Places
from cloc_mllm.mllm.projector import (
    Projector,
    build_image_projector,
    num_image_tokens,
    to_original_frame,
    word_std,
)
from cloc_mllm.mllm.regions import read_regions, region_dims
from cloc_mllm.mllm.vision_inputs import VisionInputs, rows_of_blocks
from cloc_mllm.models.build import build_cloc_vision
from cloc_mllm.models.position import token_cells
from cloc_mllm.models.vision_encoder import ImageFeatures

# read or write coordinates, and are small: they stay float32 whatever dtype is asked for
_PRECISE_PARTS = ("projector", "region_projector", "region_encoder", "box_head")


class ClocMllmForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """`vision` -> `projector` (and `region_projector`) -> `language_model`.

    Image features replace the `<image>` tokens (N per image), region features the `<region>` ones.
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
        # Transformers may build on "meta"; what a tower computes in its constructor and does not
        # save (see `_init_weights`) would be lost there
        with torch.device("cpu"):
            self.vision = build_cloc_vision(config.cloc_model_config())
        self._unsaved_buffers = {
            module: buffers
            for module in self.vision.modules()
            if (buffers := _non_persistent_buffers(module))
        }
        feature_dims, num_boxes = list(self.vision.token_dims), 1
        if config.vision_features == "encoder+prompter":
            feature_dims.append(self.vision.embed_dim)
            num_boxes += 1
        grid_hw, width = self.vision.grid_hw, config.text_config.hidden_size
        self.num_image_tokens = num_image_tokens(config.projector, grid_hw, config.num_queries)
        self.projector = build_image_projector(config, feature_dims, num_boxes, grid_hw)
        self.region_projector = Projector(
            region_dims(config.region_features, self.vision),
            width,
            word_std(config),
            hidden_dim=config.projector_width,
        )
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        if config.box_token_id is not None:
            self.box_head = (
                PrompterBoxHead(width, self.vision.embed_dim)
                if config.box_reader == "prompter"
                else AnswerBoxHead(width)
            )
        # some language models change logits after their head, which only `answer_loss` would see
        self._head_reads_hidden = not _changes_logits(config.text_config)
        self._keep_in_fp32_modules_strict = set(_PRECISE_PARTS)
        self.post_init()

    def forward(  # noqa: PLR0913  the signature Transformers calls
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,  # `past_key_values` by its name since Transformers 5.24
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_frame: Tensor | None = None,
        image_index: Tensor | None = None,
        region_boxes: Tensor | None = None,
        region_image_index: Tensor | None = None,
        region_masks: Tensor | None = None,
        region_features: Tensor | None = None,
        labels: Tensor | None = None,
        answer_boxes: Tensor | None = None,
        answer_image_index: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        places: Places | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Computes logits, and the loss if `labels` are given.

        Args:
            input_ids, attention_mask: int64[B, T]; or a mask bool[B, 1, T, T] of packed rows.
            pixel_values, image_frame, image_index, region_boxes, region_image_index, region_masks:
                see `VisionInputs`; `image_index` defaults to one image per block, `image_frame` to
                images without padding. All None for text alone.
            region_features: float[R, H] of `prefill`, if the images are in the cache already;
                `region_image_index` then holds the row of each region.
            labels: int64[B, T], `IGNORE_INDEX` where nothing is learnt. In training mode the
                output then holds the last position's logits only.
            answer_boxes: float[K, 4] of the labels' `<box>` tokens, in their order, normalised to
                the original image; for a model with a box head.
            answer_image_index: int64[K], the image of each; for a box head that prompts CLOC.
            num_items_in_batch: divisor of the summed loss; by default the labelled positions here.
            places: where placeholders and labels are; None looks, and so waits for a GPU.

        Raises:
            ValueError: a row's placeholders do not match its features; an unknown kind of region.
        """
        seen = None
        embeds = self._embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if pixel_values is not None:
            regions = region_boxes, region_image_index, region_masks
            given = pixel_values, image_frame, image_index, *regions
            embeds, seen = self._insert_vision(input_ids, embeds, given, places)
        elif region_features is not None:
            assert input_ids is not None and region_image_index is not None
            embeds = self._insert_regions(input_ids, embeds, region_features, region_image_index)
        elif self.training:
            embeds = embeds + self._unseen()
        cache = past_key_values if cache is None else cache
        inputs = kwargs | {"inputs_embeds": embeds, "position_ids": position_ids, CACHE: cache}
        inputs["attention_mask"] = self._mask(attention_mask)
        if labels is None:
            return self.language_model(**{**inputs, "return_dict": True})
        answers = (answer_boxes, answer_image_index, seen)
        return self._learn(inputs, labels, answers, num_items_in_batch, places)

    def _mask(self, attention_mask: Tensor | None) -> Tensor | None:
        if attention_mask is None or attention_mask.ndim < 4:
            return attention_mask
        kernel: Any = self.language_model.config._attn_implementation
        return mask_for(kernel, attention_mask)

    def _embed_tokens(self, input_ids: Tensor | None) -> Tensor:
        if input_ids is None:
            raise ValueError("pass input_ids or inputs_embeds, got neither")
        return self.get_input_embeddings()(input_ids)

    def _learn(
        self,
        inputs: dict[str, Any],
        labels: Tensor,
        answers: tuple[Tensor | None, Tensor | None, SeenImages | None],
        num_items: Tensor | int | None,
        places: Places | None,
    ) -> CausalLMOutputWithPast:
        """Computes the language model's output with the loss; in training without most logits."""
        few_logits = self.training and self._head_reads_hidden
        if few_logits:
            inputs = {**inputs, "logits_to_keep": 1}
        inputs = {**inputs, "output_hidden_states": True, "return_dict": True}
        outputs = self.language_model(**inputs)
        soft_bins = self.config.soft_bins()
        if few_logits:
            hidden, head = outputs.hidden_states[-1], self.get_output_embeddings()
            chunk = chunk_of(self.config.text_config.vocab_size)
            if places:
                states = hidden.flatten(0, 1).index_select(0, places.learnt)
                total = loss_of_states(states, places.targets, head, soft_bins, chunk=chunk)
            else:
                total = answer_loss_of_hidden(hidden, labels, head, soft_bins, chunk=chunk)
        else:
            total = answer_loss(outputs.logits, labels, soft_bins)
        if self.config.box_token_id is not None:
            hidden = outputs.hidden_states[-1]
            total = total + self._box_loss(hidden, labels, answers, places)
        if num_items is None:
            num_items = (labels[:, 1:] != IGNORE_INDEX).sum().clamp(min=1)
        outputs.loss = total / num_items
        return outputs

    def _box_loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        answers: tuple[Tensor | None, Tensor | None, SeenImages | None],
        places: Places | None,
    ) -> Tensor:
        answer_boxes, image_index, images = answers
        if places:
            states = hidden.flatten(0, 1).index_select(0, places.boxes)
        else:
            states = writing_states(hidden, labels, self.config.box_token_id)
        boxes = states.new_zeros(0, 4) if answer_boxes is None else answer_boxes
        if len(states) != len(boxes):
            raise ValueError(
                f"the labels have {len(states)} {BOX_TOKEN} tokens but answer_boxes has "
                f"{len(boxes)} boxes; pass one per token, in their order"
            )
        if isinstance(self.box_head, AnswerBoxHead):
            loss = self.box_head.loss(states, boxes)
        elif (images is None or image_index is None) and len(boxes):
            raise ValueError(
                f"{len(boxes)} answer_boxes need pixel_values and answer_image_index, because this "
                "model's box head looks for them in the images"
            )
        else:
            most = places and places.most_answers
            seen = None
            if images is not None and image_index is not None:
                seen = images._replace(image_index=image_index, most=most)
            loss = self.box_head.loss(states, boxes, self.vision, seen)
        return self.config.box_loss_weight * loss

    def read_answer_boxes(self, hidden: Tensor, images: SeenImages | None) -> tuple[Tensor, Tensor]:
        """Reads the boxes of `<box>` tokens.

        Args:
            hidden: float[K, H], the hidden states that wrote them.
            images: needed by a head that prompts CLOC (`looks_for_boxes`).

        Returns:
            boxes float[K, 4], normalised to the original image, and logits float[K] of confidence.
        """
        if isinstance(self.box_head, AnswerBoxHead):
            return self.box_head(hidden)
        assert images is not None
        read = self.box_head.near.dtype
        tokens = images.features.tokens.to(read)
        images = images._replace(features=images.features._replace(tokens=tokens))
        return self.box_head(hidden, self.vision, images)

    @property
    def looks_for_boxes(self) -> bool:
        """Whether its box head needs the image, too."""
        return self.config.box_token_id is not None and self.config.box_reader == "prompter"

    @contextmanager
    def hidden_states_of_answers(self) -> Iterator[list[Tensor]]:
        """Gives a list that `generate` fills with the hidden states float[B, H] that write each
        token; without a box head it stays empty."""
        states: list[Tensor] = []
        if self.config.box_token_id is None:
            yield states
            return
        head = self.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][:, -1]))
        try:
            yield states
        finally:
            hook.remove()

    def encode_vision(
        self, inputs: VisionInputs, most_regions: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Makes image features float[I, N, H] and region features float[R, H] for the language
        model.

        `most_regions` is the most that any image has; None reads it from the indices.
        """
        return self._encode_vision(inputs, most_regions)[1:]

    def _encode_vision(
        self, inputs: VisionInputs, most_regions: int | None = None
    ) -> tuple[ImageFeatures, Tensor, Tensor]:
        image, image_features = self.read_images(inputs.pixel_values, inputs.image_frame)
        return image, image_features, self._project_regions(image, inputs, most_regions)

    def encode_regions(self, inputs: VisionInputs) -> Tensor:
        """Makes region features float[R, H] alone, of images that the language model has read."""
        return self._project_regions(self.encode_for_reading(inputs.pixel_values), inputs)

    def _project_regions(
        self, image: ImageFeatures, inputs: VisionInputs, most_regions: int | None = None
    ) -> Tensor:
        region_image = inputs.image_index[inputs.region_image_index]
        features = read_regions(
            self.config.region_features, self.vision, image, inputs, most_regions
        )
        boxes = to_original_frame(inputs.region_boxes, inputs.image_frame[region_image])
        return self.region_projector(features, [boxes])

    def read_images(self, pixel_values: Tensor, frames: Tensor) -> tuple[ImageFeatures, Tensor]:
        """Encodes images, see `VisionInputs`; also returns their projected features
        float[I, N, H]."""
        image = self.encode_for_reading(pixel_values)
        cells = token_cells(image.grid_hw, image.tokens.device).expand(len(image.tokens), -1, -1)
        features, token_boxes = [*self.vision.split_scales(image.tokens)], [cells]
        if self.config.vision_features == "encoder+prompter":
            regions, boxes = self.vision.read_tokens(image)
            features.append(regions)
            token_boxes.append(boxes)
        token_boxes = [to_original_frame(boxes, frames[:, None, :]) for boxes in token_boxes]
        return image, self.projector(features, token_boxes)

    def encode_for_reading(self, pixel_values: Tensor) -> ImageFeatures:
        """Encodes images, with tokens in the precision of the projectors."""
        image = self.encode_images(pixel_values)
        held, read = (next(p.parameters()).dtype for p in (self.vision.encoder, self.projector))
        return image if held == read else image._replace(tokens=image.tokens.to(read))

    def encode_images(self, pixel_values: Tensor) -> ImageFeatures:
        """Encodes images float[I, 3, S, S]; tokens float[I, N, D] are encoded already."""
        if pixel_values.ndim == 3:  # nothing here reads the pooled features
            unread = pixel_values.new_zeros(len(pixel_values), 0)
            return ImageFeatures(unread, pixel_values, self.vision.grid_hw)
        held = next(self.vision.encoder.parameters()).dtype
        return self.vision.encode_image(pixel_values.to(held))

    @torch.no_grad()
    def prefill(self, prefix_ids: Tensor, inputs: VisionInputs) -> tuple[DynamicCache, Tensor]:
        """Reads images and the tokens that all rows start with once; questions come after.

        Args:
            prefix_ids: int64[P], with the N tokens of each image and without a `<region>`.

        Returns:
            the cache of P tokens for B rows, which `generate` continues if it gets the whole
            `input_ids` and `attention_mask`; region features float[R, H] for `forward`.
        """
        image_features, region_features = self.encode_vision(inputs)
        num_blocks = int((prefix_ids == self.config.image_token_id).sum()) // self.num_image_tokens
        starts, start_of_row = inputs.image_index.view(-1, num_blocks).unique(
            dim=0, return_inverse=True
        )
        input_ids = prefix_ids.expand(len(starts), -1)
        embeds = self._insert_images(
            input_ids, self.get_input_embeddings()(input_ids), image_features[starts.flatten()]
        )
        cache = DynamicCache(config=self.config.get_text_config(decoder=True))
        # the body alone: nobody asks which token follows an image token
        self.language_model.base_model(inputs_embeds=embeds, use_cache=True, **{CACHE: cache})
        cache.batch_select_indices(start_of_row)
        return cache, region_features

    def _insert_vision(
        self,
        input_ids: Tensor | None,
        embeds: Tensor,
        given: Sequence[Tensor | None],
        places: Places | None,
    ) -> tuple[Tensor, SeenImages]:
        """Puts image and region features into the embeddings of their tokens; also returns the
        images.

        Args:
            given: the fields of `VisionInputs`; all but the first may be None.
        """
        if input_ids is None:
            raise ValueError("pixel_values need input_ids, to know where the features belong")
        if places and self._fit(places, given):
            inputs = VisionInputs(*given)  # type: ignore[arg-type]
            image, image_features, region_features = self._encode_vision(
                inputs, places.most_regions
            )
            features = torch.cat(
                [image_features[inputs.image_index].flatten(0, 1), region_features]
            )
            at = torch.cat([places.images, places.regions])
            joined = embeds.flatten(0, 1).index_copy(0, at, features.to(embeds.dtype))
            return joined.view_as(embeds), SeenImages(image, inputs.image_frame)
        block_rows = self._block_rows(input_ids)
        inputs = VisionInputs.filled(len(block_rows), *given)  # type: ignore[arg-type]
        image, image_features, region_features = self._encode_vision(inputs)
        embeds = self._insert_images(input_ids, embeds, image_features[inputs.image_index])
        region_rows = block_rows[inputs.region_image_index]
        embeds = self._insert_regions(input_ids, embeds, region_features, region_rows)
        return embeds, SeenImages(image, inputs.image_frame)

    def _fit(self, places: Places, given: Sequence[Tensor | None]) -> bool:
        """Whether there are as many features as places; otherwise a slower look names the row."""
        _, image_frame, image_index, _, region_image_index, _ = given
        if image_frame is None or image_index is None or region_image_index is None:
            return False
        num_features = len(image_index) * self.num_image_tokens, len(region_image_index)
        return (len(places.images), len(places.regions)) == num_features

    def _block_rows(self, input_ids: Tensor) -> Tensor:
        return rows_of_blocks(input_ids == self.config.image_token_id, self.num_image_tokens)

    def _insert_images(self, input_ids: Tensor, embeds: Tensor, features: Tensor) -> Tensor:
        """Puts the features of the blocks, float[K, N, H], into the embeddings."""
        is_image = input_ids == self.config.image_token_id
        if int(is_image.sum()) != features.shape[0] * features.shape[1]:
            num_blocks = torch.bincount(self._block_rows(input_ids), minlength=len(input_ids))
            raise ValueError(
                f"the rows have room for {num_blocks.tolist()} images, but {len(features)} are "
                "given in image_index"
            )
        return embeds.masked_scatter(is_image[..., None], features.flatten(0, 1).to(embeds.dtype))

    def _insert_regions(
        self, input_ids: Tensor, embeds: Tensor, features: Tensor, region_rows: Tensor
    ) -> Tensor:
        """Puts features float[R, H], whose rows `region_rows` names in any order, into the
        embeddings."""
        is_region = input_ids == self.config.region_token_id
        expected = torch.bincount(region_rows, minlength=len(input_ids))
        found = is_region.sum(1)
        if wrong := (found != expected).nonzero().flatten().tolist():
            raise ValueError(
                f"sample {wrong[0]} has {int(found[wrong[0]])} {REGION_TOKEN} tokens but "
                f"{int(expected[wrong[0]])} region boxes; write one per box"
            )
        order = region_rows.argsort(stable=True)
        return embeds.masked_scatter(is_region[..., None], features[order].to(embeds.dtype))

    def _unseen(self) -> Tensor:
        """A zero computed from a blank image. If all rows of a rank are text, its trained vision
        parts must still take part in backward, or the other ranks wait for it for ever."""
        parameters = [*self.projector.parameters(), *self.region_projector.parameters()]
        if not any(parameter.requires_grad for parameter in parameters):
            return parameters[0].new_zeros(())
        side = self.config.cloc_model_config().image_size
        pixels = parameters[0].new_zeros(1, 3, side, side)
        whole = pixels.new_tensor([[0.0, 0.0, 1.0, 1.0]])
        block = torch.zeros(1, dtype=torch.long, device=pixels.device)
        features = self.encode_vision(VisionInputs(pixels, whole, block, whole, block))
        return sum((feature.sum() * 0.0 for feature in features), pixels.new_zeros(()))

    def train(self, mode: bool = True) -> ClocMllmForConditionalGeneration:
        """Keeps a frozen vision encoder in eval mode, even if the Prompter learns: its batch norms
        must not drift, and its tokens must stay the same."""
        super().train(mode)
        for part in (self.vision, self.vision.encoder):
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Passes vision inputs with the prompt only; later steps find them in the cache."""
        # its types fit this class since Transformers 5.24
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc, unused-ignore]
        keep = kwargs.get("is_first_iteration") or not kwargs.get("use_cache", True)
        return {
            name: value if keep or name not in (*VisionInputs._fields, "region_features") else None
            for name, value in inputs.items()
        }

    def _expand_inputs_for_generation(  # type: ignore[override]
        self, expand_size: int = 1, *, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeats rows for beams or samples; images are not repeated, only pointed to."""
        vision = {name: kwargs.pop(name, None) for name in VisionInputs._fields}
        if expand_size > 1 and vision["pixel_values"] is not None and input_ids is not None:
            block_rows = self._block_rows(input_ids)
            given = VisionInputs.filled(len(block_rows), **vision)
            vision = given.repeated(expand_size, block_rows, len(input_ids))._asdict()
        base: Any = super()
        input_ids, kwargs = base._expand_inputs_for_generation(
            expand_size=expand_size, input_ids=input_ids, **kwargs
        )
        return input_ids, {**kwargs, **vision}

    def _supports_logits_to_keep(self) -> bool:
        """Whether the language model can compute a prompt's logits at its last position only."""
        language_model: Any = self.language_model
        return bool(language_model._supports_logits_to_keep())

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Loads a model as Transformers does, also from a directory of an earlier version."""
        key_mapping = {f"^{old}": new for old, new in RENAMED_WEIGHTS.items()}
        kwargs["key_mapping"] = key_mapping | (kwargs.get("key_mapping") or {})
        return super().from_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Restores buffers. Transformers calls this for each module with tensors in no file.

        Every part is initialised in its constructor. But `from_pretrained` replaces non-persistent
        buffers by uninitialised memory; here they get their values back.
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


def cast_encoder(model: ClocMllmForConditionalGeneration, dtype: torch.dtype) -> None:
    """Casts weights and saved buffers of the vision encoder; what it computes in its constructor
    stays as it is, as it does in `from_pretrained`."""
    encoder = model.vision.encoder
    saved = encoder.state_dict().keys()
    buffers = {name: buffer for name, buffer in encoder.named_buffers() if name in saved}
    for tensor in (*encoder.parameters(), *buffers.values()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _changes_logits(text_config: PreTrainedConfig) -> bool:
    """Whether the head's output is changed into logits (soft caps of Gemma, scales of Cohere)."""
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
    return any(getattr(text_config, name, None) for name in names)


def _non_persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    saved = module.state_dict().keys()
    buffers = module.named_buffers(recurse=False)
    return {name: value.clone() for name, value in buffers if name not in saved}
