"""Writes a CLOC for other code: `cloc-mllm export --cloc DIR --to open_clip --output_dir DIR`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from cloc_mllm.card import write_export_card
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.config import ModelConfig
from cloc_mllm.data.storage import new_directory
from cloc_mllm.data.transforms import Preprocessing
from cloc_mllm.models.build import load_cloc
from cloc_mllm.models.cloc import Cloc
from cloc_mllm.models.initialize import EXPORTED
from cloc_mllm.models.vision_encoder import VisionEncoder
from cloc_mllm.shipped import find_model

# Prefixes in the file of `--to safetensors`, and what they hold (written into its JSON, too).
NAMES = {
    "visual.": "image tower, by open_clip's names",
    "text.": "text tower, by open_clip's names (CustomTextCLIP)",
    "logit_scale": "log temperature of image against text",
    "logit_bias": "bias of image against text (sigmoid loss)",
    "region.prompter.": "Prompter: image tokens and a box or text prompt to a region embedding",
    "region.box_head.": "BoxHead: region embedding of a text prompt to cxcywh before the sigmoid",
    "region.refiner.": "BoxRefiner: tokens around that box to the move of its sides (box_looks)",
    "region.projection.": "the RoI-Align head instead of the Prompter (prompter.kind roi_align)",
    "region.logit_scale": "log temperature of region against text",
    "region.logit_bias": "bias of region against text (sigmoid loss)",
    "region.": "all that CLOC adds to CLIP, by the names of its region encoder (prompter.kind)",
}

_OPEN_CLIP_USE = """\
import open_clip

model, preprocess = open_clip.create_model_from_pretrained("local-dir:DIRECTORY")
"""
_SAFETENSORS_USE = """\
from safetensors.torch import load_file

weights = load_file("DIRECTORY/cloc.safetensors")  # cloc.json says what each name holds
"""
_HF_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
# patterns of timm's names of a SigLIP tower, and Transformers' names
_SIGLIP_NAMES = {
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^pos_embed$": "embeddings.position_embedding.weight",
    r"^norm\.": "post_layernorm.",
    r"^blocks\.": "encoder.layers.",
    r"\.attn\.proj\.": ".self_attn.out_proj.",
    r"\.norm(\d)\.": r".layer_norm\1.",
    r"^attn_pool\.latent$": "head.probe",
    r"^attn_pool\.proj\.": "head.attention.out_proj.",
    r"^attn_pool\.norm\.": "head.layernorm.",
    r"^attn_pool\.": "head.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """`cloc-mllm export`: writes the towers as a drop-in replacement for CLIP's."""
    parser = ArgumentParser(
        prog="cloc-mllm export",
        description="Write the towers of a CLOC so that other code loads them as a CLIP.",
        epilog="open_clip: both towers, for create_model_from_pretrained('local-dir:DIR'). "
        "hf-clip: the image tower, for CLIPVisionModelWithProjection.from_pretrained('DIR') or, of "
        "a SigLIP, SiglipVisionModel.from_pretrained('DIR'); "
        "pad pictures to a square with the mean colour, RGB (124, 116, 104), first, as LLaVA does. "
        "safetensors: all weights in DIR/cloc.safetensors, what each name means and the settings "
        "in DIR/cloc.json. "
        "For an MLLM see `cloc-mllm export --mllm DIR --help`.",
    )
    parser.add_argument(
        "--cloc",
        default="photos",
        help="stage-1 model directory, or a shipped one: photos, scenes (default: %(default)s)",
    )
    parser.add_argument("--to", choices=EXPORTS, required=True, help="whose layout to write")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="directory to make; must be new"
    )
    arguments = parser.parse_args(argv)
    EXPORTS[arguments.to](arguments.cloc, arguments.output_dir)
    print(f"wrote {arguments.output_dir}")
    return 0


def export_open_clip(directory: str | Path, out: Path) -> None:
    """Writes what open_clip loads as `local-dir:OUT`; features stay equal bit for bit.

    Beside the configuration it saves any tokenizer but open_clip's own, and the configuration of a
    Hugging Face text tower. The latter is named by its absolute path, so do not move `out` then.

    Raises:
        ValueError: `out` is taken.
    """
    cloc, tokenizer, config = load_cloc(directory)
    if cloc.vision.encoder.is_hf:
        raise ValueError("the image tower is a model of Transformers; export it with --to hf-clip")
    clip_config = {**_clip_config(cloc, config), "custom_text": True}
    text = clip_config["text_cfg"] = dict(clip_config["text_cfg"])
    contents = {
        "model_cfg": clip_config,
        "preprocess_cfg": _preprocess_cfg(Preprocessing.of(config)),
    }
    with new_directory(out) as partial:
        if tokenizer.save(partial) == "tokenizer":  # open_clip looks beside its configuration
            for path in (partial / "tokenizer").iterdir():
                path.rename(partial / path.name)
            (partial / "tokenizer").rmdir()
            text["hf_tokenizer_name"] = out.name
        if text.get("hf_model_name"):
            cloc.text.text.config.save_pretrained(partial / "text_tower")
            text["hf_model_name"] = str((out / "text_tower").resolve())
        (partial / "open_clip_config.json").write_text(json.dumps(contents, indent=2) + "\n")
        save_file(_contiguous(_open_clip_state(cloc)), partial / "open_clip_model.safetensors")
        _write_card(partial, directory, "open_clip", _OPEN_CLIP_USE)


def export_hf_clip(directory: str | Path, out: Path) -> None:
    """Writes a Transformers `CLIPVisionModelWithProjection` with its image processor.

    A tower that is a model of Transformers (SigLIP, DINOv2 ...) is written as what it is, a SigLIP
    of open_clip as a `SiglipVisionModel`.

    Raises:
        ValueError: the image tower is none of these and not a plain CLIP ViT; or `out` is taken.
    """
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    cloc, _, config = load_cloc(directory)
    encoder = cloc.vision.encoder
    if encoder.is_hf:
        model = encoder.visual.model
    elif _is_siglip(encoder.visual):
        model = _siglip_model(encoder)
    else:
        model = CLIPVisionModelWithProjection(_hf_config(cloc, config.clip_config))
        model.load_state_dict(_hf_state(encoder))
    images = CLIPImageProcessor(**_hf_image_processing(Preprocessing.of(config)))
    with new_directory(out) as partial:
        model.save_pretrained(partial)
        images.save_pretrained(partial)
        use = f"from transformers import {type(model).__name__}\n\n"
        use += f'model = {type(model).__name__}.from_pretrained("DIRECTORY")'
        _write_card(partial, directory, "transformers", use)


def export_safetensors(directory: str | Path, out: Path) -> None:
    """Writes all weights as one file for code that has nothing but `safetensors`.

    `cloc.json` beside it says what each prefix holds, and the settings: open_clip's model config,
    the region encoder's, the preprocessing and the tokenizer.

    Raises:
        ValueError: `out` is taken.
    """
    cloc, tokenizer, config = load_cloc(directory)
    state = _open_clip_state(cloc)
    for name, tensor in cloc.state_dict().items():
        prefix = next((ours for ours in EXPORTED if name.startswith(ours)), None)
        if prefix is not None:
            state[EXPORTED[prefix] + name.removeprefix(prefix)] = tensor
    with new_directory(out) as partial:
        save_file(_contiguous(state), partial / "cloc.safetensors", {"format": "pt"})
        contents = {
            "names": {
                name: what
                for name, what in NAMES.items()
                if any(key.startswith(name) for key in state)
            },
            "clip_config": _clip_config(cloc, config),
            "prompter": dataclasses.asdict(config.prompter),
            "token_strides": list(cloc.vision.encoder.token_strides),
            "preprocess": _preprocess_cfg(Preprocessing.of(config)) | {"size": config.image_size},
            "box_frame": "xyxy, 0..1, of the padded square",
            "tokenizer": tokenizer.save(partial),
            "context_length": config.context_length,
        }
        (partial / "cloc.json").write_text(json.dumps(contents, indent=2) + "\n")
        _write_card(partial, directory, "safetensors", _SAFETENSORS_USE)


EXPORTS: dict[str, Callable[[str | Path, Path], None]] = {
    "open_clip": export_open_clip,
    "hf-clip": export_hf_clip,
    "safetensors": export_safetensors,
}


def _write_card(directory: Path, source: str | Path, library: str, use: str) -> None:
    write_export_card(directory, find_model("cloc", source), library=library, use=use)


def _clip_config(cloc: Cloc, config: ModelConfig) -> dict[str, Any]:
    """open_clip's model config. open_clip builds a bias only if it is told where one starts."""
    bias = cloc.logit_bias
    return config.clip_config | ({} if bias is None else {"init_logit_bias": bias.item()})


def _preprocess_cfg(preprocessing: Preprocessing) -> dict[str, Any]:
    """The preprocessing by open_clip's names."""
    return {
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "interpolation": preprocessing.interpolation,
        "resize_mode": "squash" if preprocessing.resize == "squash" else "longest",
        "fill_color": preprocessing.padding_rgb,
    }


def _hf_image_processing(preprocessing: Preprocessing) -> dict[str, Any]:
    """The preprocessing as arguments of an image processor of Transformers. None of them pads, so
    pictures for a letterbox must be padded to a square before, as LLaVA does."""
    side = {"height": preprocessing.size, "width": preprocessing.size}
    squashes = preprocessing.resize == "squash"
    return {
        "size": side if squashes else {"shortest_edge": preprocessing.size},
        "crop_size": side,
        "do_center_crop": not squashes,
        "resample": int(Image.Resampling[preprocessing.interpolation.upper()]),
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


def _open_clip_state(cloc: Cloc) -> dict[str, Tensor]:
    state = {f"visual.{k}": v for k, v in cloc.vision.encoder.visual.state_dict().items()}
    state |= {f"text.{k}": v for k, v in cloc.text.text.state_dict().items()}
    temperature = {"logit_scale": cloc.logit_scale, "logit_bias": cloc.logit_bias}
    return state | {k: v.detach().reshape(()) for k, v in temperature.items() if v is not None}


def _hf_config(cloc: Cloc, clip_config: dict[str, Any]) -> Any:
    from transformers import CLIPVisionConfig

    encoder = cloc.vision.encoder
    vision = clip_config["vision_cfg"]
    if encoder.is_timm or encoder.visual.attn_pool is not None or encoder.visual.proj is None:
        raise ValueError(
            "Transformers' CLIP vision model is a ViT with a class token and a projection, its "
            "SigLIP one a ViT with attention pooling; this image tower is another one. Export it "
            "with --to open_clip"
        )
    width = int(vision["width"])
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=round(width * vision.get("mlp_ratio", 4.0)),
        num_hidden_layers=int(vision["layers"]),
        num_attention_heads=width // int(vision.get("head_width", 64)),
        image_size=encoder.image_size,
        patch_size=int(vision["patch_size"]),
        projection_dim=cloc.vision.embed_dim,
        hidden_act="quick_gelu" if clip_config.get("quick_gelu") else "gelu",
        layer_norm_eps=encoder.visual.ln_post.eps,
    )


def _hf_state(encoder: VisionEncoder) -> dict[str, Tensor]:
    """The weights of a ViT by Transformers' names and in its shapes."""
    ours = encoder.visual.state_dict()
    embeddings = "vision_model.embeddings."
    state = {
        f"{embeddings}class_embedding": ours["class_embedding"],
        f"{embeddings}position_embedding.weight": ours["positional_embedding"],
        f"{embeddings}patch_embedding.weight": ours["conv1.weight"],
        "visual_projection.weight": ours["proj"].T.contiguous(),
    }
    for end in ("weight", "bias"):
        state[f"vision_model.pre_layrnorm.{end}"] = ours[f"ln_pre.{end}"]
        state[f"vision_model.post_layernorm.{end}"] = ours[f"ln_post.{end}"]
        for layer in range(len(encoder.visual.transformer.resblocks)):
            source = f"transformer.resblocks.{layer}."
            target = f"vision_model.encoder.layers.{layer}."
            for name, theirs in _HF_LAYER.items():
                state[f"{target}{theirs}.{end}"] = ours[f"{source}{name}.{end}"]
            parts = ours[f"{source}attn.in_proj_{end}"].chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                state[f"{target}self_attn.{name}_proj.{end}"] = part
    return state


def _is_siglip(visual: Any) -> bool:
    """Whether this is a tower of timm that Transformers has as `SiglipVisionModel`."""
    from timm.layers import AttentionPoolLatent, PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    trunk = getattr(visual, "trunk", None)
    return (
        isinstance(trunk, VisionTransformer)
        and isinstance(trunk.patch_embed, PatchEmbed)
        and isinstance(trunk.attn_pool, AttentionPoolLatent)
        and not trunk.num_prefix_tokens
        and isinstance(trunk.head, nn.Identity)
        and not len(visual.head)
    )


def _siglip_model(encoder: VisionEncoder) -> Any:
    """A SigLIP of timm as a model of Transformers."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    trunk = encoder.visual.trunk
    block = trunk.blocks[0]
    model = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=trunk.embed_dim,
            intermediate_size=block.mlp.fc1.out_features,
            num_hidden_layers=len(trunk.blocks),
            num_attention_heads=block.attn.num_heads,
            image_size=encoder.image_size,
            patch_size=trunk.patch_embed.patch_size[0],
            hidden_act="gelu_pytorch_tanh" if block.mlp.act.approximate == "tanh" else "gelu",
            layer_norm_eps=trunk.norm.eps,
        )
    )
    state = {}
    for name, tensor in trunk.state_dict().items():
        for pattern, theirs in _SIGLIP_NAMES.items():
            name = re.sub(pattern, theirs, name)
        if ".attn.qkv." in name:
            for part, values in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace("attn.qkv", f"self_attn.{part}_proj")] = values
        else:
            state[name] = tensor
    for end in ("weight", "bias"):
        parts = state.pop(f"head.q.{end}"), state.pop(f"head.kv.{end}")
        state[f"head.attention.in_proj_{end}"] = torch.cat(parts)
    positions = "embeddings.position_embedding.weight"
    state[positions] = state[positions][0]
    model.load_state_dict(state)
    return model


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
