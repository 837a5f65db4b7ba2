"""What `model.init` may name beside open_clip's tags and files: directories of several layouts.

- the directory of a stage-1 model, or a shipped one by its name (`photos`, `scenes`),
- an open_clip directory (`open_clip_config.json`),
- a Hugging Face directory: `CLIPModel`, `SiglipModel`, `Tipsv2Model`, or an image model alone
  (DINOv2, DINOv3, C-RADIO), which starts with a fresh text side.

`local-dir:DIR` is DIR; `hf-hub:NAME` is fetched from the hub.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cloc_mllm.config import ModelConfig, PreprocessConfig
from cloc_mllm.hub import HUB_PREFIX
from cloc_mllm.shipped import SHIPPED_MODELS, find_model

OPEN_CLIP_CONFIG = "open_clip_config.json"
_LOCAL = "local-dir:"
_PAIRS = ("clip", "siglip", "tipsv2")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
_CLIP_BPE, _CLIP_VOCABULARY = "open_clip:ViT-B-16", 49408
_GREY = [0.5, 0.5, 0.5]
_LARGEST_SCALE = 100.0  # that CLIP's loss allows
_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_CLIP_NAMES = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "text_model.embeddings.token_embedding.": "text.token_embedding.",
    "text_model.embeddings.position_embedding.weight": "text.positional_embedding",
    "text_model.encoder.layers.": "text.transformer.resblocks.",
    "text_model.final_layer_norm.": "text.ln_final.",
}


def start_directory(init: str) -> Path | None:
    """The directory that `init` names; None if it names something else."""
    if init.startswith(HUB_PREFIX) or init in SHIPPED_MODELS:
        return find_model("cloc", init)
    directory = Path(init.removeprefix(_LOCAL) or "missing")
    return directory if directory.is_dir() else None


def is_foreign(source: Path) -> bool:
    """Whether this is an open_clip or a Hugging Face directory."""
    if (source / OPEN_CLIP_CONFIG).is_file():
        return True
    path = source / "config.json"
    return path.is_file() and "model_type" in json.loads(path.read_text())


def foreign_config(directory: Path, architecture: str) -> ModelConfig | None:
    """Reads the config of an open_clip or a Hugging Face directory; None if it is neither.

    Args:
        architecture: gives the fresh text side of an image model alone.

    Raises:
        ValueError: this Hugging Face model is no CLIP and no image model.
    """
    if not is_foreign(directory):
        return None
    if (directory / OPEN_CLIP_CONFIG).is_file():
        return _open_clip_config(directory)
    contents = json.loads((directory / "config.json").read_text())
    return _hf_config(directory, contents["model_type"], architecture)


def foreign_state(directory: Path, image_size: int) -> dict[str, Tensor]:
    """Reads all weights of a directory that `foreign_config` reads, by open_clip's names.

    An image model alone has no text weights. SigLIP's positions are interpolated to `image_size`.
    """
    if (directory / OPEN_CLIP_CONFIG).is_file():
        return _open_clip_state(directory)
    from transformers import AutoModel

    model = AutoModel.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False)
    kind = model.config.model_type
    if kind == "clip":
        return _clip_state(model.state_dict())
    if kind not in _PAIRS:
        return {f"visual.model.{name}": value for name, value in model.state_dict().items()}
    vision, text = model.vision_model.state_dict(), model.text_model.state_dict()
    state = {f"visual.model.{name}": value for name, value in vision.items()}
    state |= {f"text.model.{name}": value for name, value in text.items()}
    for name in ("logit_scale", "logit_bias"):
        if (value := getattr(model, name, None)) is not None:
            state[name] = value.detach()
    if kind == "tipsv2":  # its 198 would be cut to the loss's largest scale, with no way back
        state["logit_scale"] = (
            model.temperature.detach().reciprocal().clamp(max=_LARGEST_SCALE).log()
        )
    if kind == "siglip":
        positions = "visual.model.embeddings.position_embedding.weight"
        side = image_size // model.config.vision_config.patch_size
        state[positions] = interpolated(state[positions], side)
    return state


def as_preprocess(theirs: dict[str, Any]) -> PreprocessConfig:
    """The settings of open_clip's `preprocess_cfg`. A crop becomes a letterbox."""
    squashes = theirs.get("resize_mode") == "squash"
    fill = theirs.get("fill_color")
    return PreprocessConfig(
        resize="squash" if squashes else "letterbox",
        interpolation=theirs.get("interpolation") or "auto",
        mean=list(theirs.get("mean") or ()),
        std=list(theirs.get("std") or ()),
        padding_rgb=list(fill) if isinstance(fill, (list, tuple)) else [],
    )


def _open_clip_config(directory: Path) -> ModelConfig:
    contents = json.loads((directory / OPEN_CLIP_CONFIG).read_text())
    clip_config = contents["model_cfg"]
    text = clip_config["text_cfg"]
    tokenizer = _CLIP_BPE  # open_clip ignores tokenizer files that its config does not name
    if named := text.get("hf_tokenizer_name"):
        tokenizer = _own_tokenizer(directory) or f"huggingface:{named}"
    return ModelConfig(
        clip_config=clip_config,
        image_size=int(clip_config["vision_cfg"].get("image_size", 224)),
        context_length=int(text.get("context_length", 77)),
        tokenizer=tokenizer,
        contrastive_loss="sigmoid" if "init_logit_bias" in clip_config else "softmax",
        preprocess=as_preprocess(contents.get("preprocess_cfg", {})),
    )


def _open_clip_state(directory: Path) -> dict[str, Tensor]:
    from cloc_mllm.models.initialize import read_state

    names = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    for name in (*names, "model.safetensors"):
        if (directory / name).is_file():
            return read_state(directory / name)
    raise ValueError(f"{directory} has no weights; expected one of {', '.join(names)}")


def _hf_config(directory: Path, kind: str, architecture: str) -> ModelConfig:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    is_pair = kind in _PAIRS
    vision = config.vision_config if is_pair else config
    if kind.startswith("siglip2"):
        raise ValueError(
            f"{directory} is a NaFlex SigLIP 2, whose pictures have any shape; take one of a fixed "
            "size: google/siglip2-base-patch16-224 or another whose name ends with its size (their "
            "model_type is siglip), or open_clip's ViT-B-16-SigLIP2 with init webli"
        )
    if not hasattr(vision, "patch_size"):
        raise ValueError(
            f"{directory} is a Hugging Face {kind!r}; expected {', '.join(_PAIRS)} or an image "
            "model with patches of one size (dinov2, dinov3_vit, radio)"
        )
    preprocess, size = _hf_preprocess(directory, kind)
    start = ModelConfig(
        image_size=size or int(vision.image_size),
        preprocess=preprocess,
        contrastive_loss="sigmoid" if kind == "siglip" else "softmax",
    )
    own = {"hf_config": vision.to_dict(), "image_size": start.image_size}
    if not is_pair:
        return _with_fresh_text(start, own, architecture)
    text = config.text_config
    start.context_length = int(text.max_position_embeddings)
    start.tokenizer = _own_tokenizer(directory)
    if not start.tokenizer and text.vocab_size == _CLIP_VOCABULARY:
        start.tokenizer = _CLIP_BPE
    if kind == "clip":
        start.clip_config = _clip_config(config)
    else:
        start.clip_config = {
            "embed_dim": int(vision.hidden_size),
            "vision_cfg": own,
            "text_cfg": {
                "hf_config": text.to_dict(),
                "context_length": start.context_length,
                "vocab_size": int(text.vocab_size),
            },
        }
    return start


def _with_fresh_text(start: ModelConfig, vision: dict[str, Any], architecture: str) -> ModelConfig:
    import open_clip

    base = open_clip.get_model_config(architecture or "ViT-B-16")
    start.clip_config = {**base, "vision_cfg": vision}
    start.context_length = int(base["text_cfg"].get("context_length", 77))
    start.tokenizer = f"open_clip:{architecture or 'ViT-B-16'}"
    return start


def _clip_config(config: Any) -> dict[str, Any]:
    """open_clip's model config of a `CLIPConfig`."""

    def shape(tower: Any) -> dict[str, Any]:
        return {
            "width": tower.hidden_size,
            "layers": tower.num_hidden_layers,
            "mlp_ratio": tower.intermediate_size / tower.hidden_size,
            "norm_kwargs": {"eps": tower.layer_norm_eps},
        }

    vision, text = config.vision_config, config.text_config
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": vision.hidden_act == "quick_gelu",
        "vision_cfg": shape(vision)
        | {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
        },
        "text_cfg": shape(text)
        | {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "heads": text.num_attention_heads,
        },
    }


def _clip_state(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a `CLIPModel` by the names of open_clip's `CustomTextCLIP`."""
    state = {
        "visual.proj": theirs["visual_projection.weight"].T,
        "text.text_projection": theirs["text_projection.weight"].T,
        "logit_scale": theirs["logit_scale"],
    }
    for name, value in theirs.items():
        if "q_proj" in name:
            parts = [theirs[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            name, value = name.replace("self_attn.q_proj.", "attn.in_proj_"), torch.cat(parts)
        elif "k_proj" in name or "v_proj" in name:
            continue
        old = next((old for old in _CLIP_NAMES if name.startswith(old)), None)
        if old is None:
            continue
        ours = _CLIP_NAMES[old] + name.removeprefix(old)
        for before, after in _CLIP_LAYER.items():
            ours = ours.replace(f".{before}.", f".{after}.")
        state[ours] = value
    return state


def _hf_preprocess(directory: Path, kind: str) -> tuple[PreprocessConfig, int]:
    """The settings of a directory's image processor, and its size in pixels; 0 if it has none."""
    theirs: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (directory / name).is_file():
            theirs = json.loads((directory / name).read_text())
            theirs = theirs.get("image_processor", theirs)
            break
    if not theirs and kind == "siglip":
        return PreprocessConfig("squash", "bicubic", _GREY, _GREY), 0
    if not theirs:
        return PreprocessConfig(), 0
    size = theirs.get("size") or {}
    size = {"shortest_edge": size} if isinstance(size, int) else size
    crops = theirs.get("do_center_crop", False)
    side = (theirs.get("crop_size") if crops else None) or size
    if not isinstance(side, int):
        side = side.get("height") or side.get("shortest_edge") or 0
    normalizes = theirs.get("do_normalize", True)
    kernel = Image.Resampling(int(theirs.get("resample", Image.Resampling.BICUBIC))).name.lower()
    preprocess = PreprocessConfig(
        resize="letterbox" if crops or "height" not in size else "squash",
        interpolation=kernel,  # type: ignore[arg-type]
        mean=list(theirs.get("image_mean") or ()) if normalizes else [0.0] * 3,
        std=list(theirs.get("image_std") or ()) if normalizes else [1.0] * 3,
    )
    return preprocess, int(side)


def _own_tokenizer(directory: Path) -> str:
    has_files = any((directory / name).is_file() for name in _TOKENIZER_FILES)
    return f"huggingface:{directory.resolve()}" if has_files else ""


def interpolated(positions: Tensor, side: int) -> Tensor:
    """Brings a table of the positions of a square grid, float[N, D], to `side` x `side`."""
    own = round(len(positions) ** 0.5)
    if own == side:
        return positions
    grid = positions.T.unflatten(1, (own, own))[None]
    resized = F.interpolate(grid, (side, side), mode="bicubic", antialias=True, align_corners=False)
    return resized[0].flatten(1).T
