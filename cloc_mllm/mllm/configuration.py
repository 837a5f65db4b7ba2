"""The model's config: everything needed to rebuild it without the stage-1 directory."""

from __future__ import annotations

from typing import Any, ClassVar, get_args

from transformers import AutoConfig, PreTrainedConfig

from cloc_mllm.config import (
    BoxReader,
    ImageProjection,
    ModelConfig,
    RegionFeatures,
    VisionFeatures,
)
from cloc_mllm.mllm.coordinates import BoxFormat
from cloc_mllm.mllm.losses import SoftBins
from cloc_mllm.models.clip_config import ResolvedModel


class ClocMllmConfig(PreTrainedConfig):
    """A CLOC image encoder and its Prompter in front of any causal language model.

    Args:
        text_config: config (or its dict) of an `AutoModelForCausalLM`.
        cloc_config: `dataclasses.asdict` of the stage-1 `ModelConfig`; the text tower is not kept.
        image_token_id, region_token_id: placeholders that image and region features replace.
        location_token_start: id of `<loc_0>`; the others follow. None if boxes are integers.
        vision_features: `encoder`, or `encoder+prompter` to append each token's region embedding.
        region_features, projector, num_queries: see `MllmConfig`.
        projector_width: hidden width of the projectors; 0 takes the language model's.
        box_format, num_bins: how boxes are written, see `mllm/coordinates.py`.
        coordinate_smoothing: standard deviation in bins of the target around a location token.
        box_token_id: id of `<box>` if a head answers boxes; None if they are written.
        box_reader: what makes a box of the state that writes `<box>`, see `MllmConfig`.
        box_loss_weight: weight of the head's loss per box, against 1 of a token.
        says_not_there: whether it was taught to answer that a thing is not in the image.
        fingerprint: the processor's, see `ClocMllmProcessor`; a model does not work with a
            processor of another fingerprint.
    """

    model_type = "cloc_mllm"
    sub_configs: ClassVar[dict[str, type]] = {"text_config": AutoConfig}

    def __init__(  # noqa: PLR0913  a config is its arguments
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        cloc_config: dict[str, Any] | None = None,
        image_token_id: int = 0,
        region_token_id: int = 1,
        location_token_start: int | None = None,
        vision_features: str = "encoder+prompter",
        region_features: str = "prompter",
        projector: str = "mlp",
        num_queries: int = 64,
        projector_width: int = 0,
        box_format: str = "location_tokens",
        num_bins: int = 100,
        coordinate_smoothing: float = 0.0,
        box_token_id: int | None = None,
        box_reader: str = "state",
        box_loss_weight: float = 2.0,
        says_not_there: bool = False,
        fingerprint: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(text_config, PreTrainedConfig):
            # transformers makes an empty config of every class, to compare with its defaults
            values = dict(text_config or {"model_type": "llama"})
            text_config = AutoConfig.for_model(values.pop("model_type"), **values)
        _check_choice("vision_features", vision_features, get_args(VisionFeatures))
        _check_choice("region_features", region_features, get_args(RegionFeatures))
        _check_choice("projector", projector, get_args(ImageProjection))
        _check_choice("box_reader", box_reader, get_args(BoxReader))
        if num_queries < 1:
            raise ValueError(f"num_queries must be at least 1, got {num_queries}")
        self.text_config = text_config
        self.cloc_config = cloc_config or {}
        self.image_token_id = image_token_id
        self.region_token_id = region_token_id
        self.location_token_start = location_token_start
        self.vision_features = vision_features
        self.region_features = region_features
        self.projector = projector
        self.num_queries = num_queries
        self.projector_width = projector_width
        self.box_format = box_format
        self.num_bins = num_bins
        self.coordinate_smoothing = coordinate_smoothing
        self.box_token_id = box_token_id
        self.box_reader = box_reader
        self.box_loss_weight = box_loss_weight
        self.says_not_there = says_not_there
        self.fingerprint = fingerprint or {}
        # Transformers ties weights only if the outermost config says so, too
        kwargs["tie_word_embeddings"] = bool(getattr(text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)

    def cloc_model_config(self) -> ResolvedModel:
        return ResolvedModel(ModelConfig.from_dict(self.cloc_config))

    def coordinates(self) -> BoxFormat:
        head = self.box_token_id is not None
        return BoxFormat(self.box_format, self.num_bins, head)  # type: ignore[arg-type]

    def soft_bins(self) -> SoftBins | None:
        """The soft targets of the training loss; None if location tokens are learnt like others."""
        if self.location_token_start is None or self.coordinate_smoothing <= 0:
            return None
        return SoftBins(self.location_token_start, self.num_bins, self.coordinate_smoothing)


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
