"""Assemble a CLOC from its config, and write and read its directory.

A model directory holds `config.json` (ModelConfig and preprocessing fingerprint),
`model.safetensors`, and what the tokenizer and a Hugging Face text tower need to be rebuilt.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cloc_mllm.config import ModelConfig, PrompterConfig
from cloc_mllm.data.tokenizer import TextTokenizer, load_text_tokenizer
from cloc_mllm.data.transforms import preprocessing_fingerprint
from cloc_mllm.models.cloc import Cloc, ClocVision
from cloc_mllm.models.text_encoder import TextEncoder
from cloc_mllm.models.vision_encoder import VisionEncoder

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def build_cloc(config: ModelConfig, tokenizer: TextTokenizer | None = None) -> Cloc:
    """A CLOC over open_clip towers: any open_clip architecture, or `clip_config`.

    Raises:
        ValueError: the architecture is unknown, or the config names none.
    """
    tokenizer = tokenizer or load_text_tokenizer(config.tokenizer, config.context_length)
    clip = _build_clip(config, tokenizer)
    encoder = VisionEncoder(clip.visual, config.image_size)
    vision = ClocVision(encoder, int(_clip_config(config)["embed_dim"]), config.prompter)
    cloc = Cloc(vision, TextEncoder(clip.text))
    with torch.no_grad():
        cloc.logit_scale.copy_(clip.logit_scale.reshape(1))
    return cloc


def build_cloc_vision(config: ModelConfig) -> ClocVision:
    """The image side alone (random weights), e.g. inside an MLLM."""
    import open_clip.model

    clip_config = _clip_config(config)
    visual = open_clip.model._build_vision_tower(
        clip_config["embed_dim"], clip_config["vision_cfg"], clip_config.get("quick_gelu", False)
    )
    encoder = VisionEncoder(visual, config.image_size)
    return ClocVision(encoder, clip_config["embed_dim"], config.prompter)


def save_cloc(
    model: Cloc,
    directory: str | Path,
    config: ModelConfig,
    tokenizer: TextTokenizer,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a model directory that `load_cloc` reads without the original tower files."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    saved = dataclasses.replace(
        config,
        architecture="",
        pretrained="",
        pretrained_image="",
        pretrained_text="",
        clip_config=_clip_config_to_save(model, config, tokenizer, directory),
        tokenizer=tokenizer.save(directory),
    )
    contents = {
        "model": dataclasses.asdict(saved),
        "fingerprint": preprocessing_fingerprint(config.image_size, tokenizer),
    }
    (directory / CONFIG_FILE).write_text(json.dumps(contents, indent=2) + "\n")
    state = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in model.state_dict().items()
    }
    save_file({k: v.contiguous() for k, v in state.items()}, directory / WEIGHTS_FILE)


def read_cloc_config(directory: str | Path) -> ModelConfig:
    """The ModelConfig of a model directory, its local paths made absolute."""
    directory = Path(directory)
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} is no CLOC model directory ({CONFIG_FILE} is missing); expected what "
            "stage 1 writes to OUTPUT_DIR/model"
        )
    contents = json.loads(path.read_text())
    if "model" not in contents or "fingerprint" not in contents:
        raise ValueError(
            f"{path} was not written by save_cloc: 'model' or 'fingerprint' is missing"
        )
    values = dict(contents["model"])
    config = ModelConfig(**{**values, "prompter": PrompterConfig(**values["prompter"])})
    if config.tokenizer == "tokenizer":
        config.tokenizer = str(directory / "tokenizer")
    text = config.clip_config.get("text_cfg", {})
    if text.get("hf_model_name") == "text_tower":
        text["hf_model_name"] = str(directory / "text_tower")
    return config


def load_cloc(
    directory: str | Path, device: torch.device | str = "cpu"
) -> tuple[Cloc, TextTokenizer, ModelConfig]:
    """Read a model directory, in float32 and eval mode.

    Raises:
        ValueError: the directory was written with another preprocessing than this version does.
    """
    config = read_cloc_config(directory)
    tokenizer = load_text_tokenizer(config.tokenizer, config.context_length)
    contents = json.loads((Path(directory) / CONFIG_FILE).read_text())
    check_fingerprint(
        contents["fingerprint"], preprocessing_fingerprint(config.image_size, tokenizer), directory
    )
    model = build_cloc(config, tokenizer)
    state = load_file(Path(directory) / WEIGHTS_FILE)
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return model.to(device).eval(), tokenizer, config


def check_fingerprint(expected: dict[str, Any], actual: dict[str, Any], source: object) -> None:
    """Raise a ValueError that names every difference between two preprocessing fingerprints."""
    different = [
        f"{key}: {source} has {expected.get(key)!r}, now {actual.get(key)!r}"
        for key in sorted(expected.keys() | actual.keys())
        if expected.get(key) != actual.get(key)
    ]
    if different:
        raise ValueError("preprocessing differs from training; " + "; ".join(different))


def _clip_config(config: ModelConfig) -> dict[str, Any]:
    """open_clip's model config with CLOC's image size and context length in it."""
    import open_clip

    if config.clip_config:
        base = config.clip_config
    elif config.architecture:
        base = open_clip.get_model_config(config.architecture)
        if base is None:
            raise ValueError(
                f"open_clip knows no architecture {config.architecture!r}; "
                "`python -c 'import open_clip; print(open_clip.list_models())'` lists them"
            )
    else:
        raise ValueError("the model config needs `architecture` or `clip_config`")
    vision = {**base["vision_cfg"], "image_size": config.image_size}
    text = {**base["text_cfg"]}
    if not text.get("hf_model_name"):
        text["context_length"] = config.context_length
    return {**base, "vision_cfg": vision, "text_cfg": text}


def _build_clip(config: ModelConfig, tokenizer: TextTokenizer) -> Any:
    """open_clip's CustomTextCLIP (so that both kinds of text tower sit at `.text`)."""
    import open_clip
    from open_clip.model import CustomTextCLIP

    if config.architecture and config.pretrained:
        return open_clip.create_model(
            config.architecture,
            pretrained=config.pretrained,
            force_custom_text=True,
            force_image_size=config.image_size,
            force_context_length=config.context_length,
        )
    clip_config = _clip_config(config)
    text = clip_config["text_cfg"]
    if not text.get("hf_model_name"):
        text["vocab_size"] = tokenizer.vocab_size
    known = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale"}
    model: Any = CustomTextCLIP(**{k: v for k, v in clip_config.items() if k in known})
    if config.pretrained_image:
        load_tower(getattr(model.visual, "trunk", model.visual), config.pretrained_image)
    if config.pretrained_text:
        load_tower(model.text.transformer, config.pretrained_text)
    return model


def load_tower(tower: nn.Module, path: str) -> None:
    """Load a safetensors state dict into a tower; classifier heads it lacks are left out.

    Raises:
        ValueError: a weight of the tower is missing from the file or has another shape.
    """
    state = load_file(path)
    wanted = tower.state_dict()
    wrong = [
        name
        for name, tensor in wanted.items()
        if not name.endswith("num_batches_tracked")
        and (name not in state or state[name].shape != tensor.shape)
    ]
    if wrong:
        raise ValueError(
            f"{path} does not fit {type(tower).__name__}: {len(wrong)} weights are missing or of "
            f"another shape, first {wrong[0]!r}"
        )
    tower.load_state_dict({k: v for k, v in state.items() if k in wanted}, strict=False)


def _clip_config_to_save(
    model: Cloc, config: ModelConfig, tokenizer: TextTokenizer, directory: Path
) -> dict[str, Any]:
    clip_config = _clip_config(config)
    clip_config["vision_cfg"]["timm_model_pretrained"] = False
    text = clip_config["text_cfg"]
    if text.get("hf_model_name"):
        model.text.text.config.save_pretrained(directory / "text_tower")
        text |= {"hf_model_name": "text_tower", "hf_model_pretrained": False}
    else:
        text["vocab_size"] = tokenizer.vocab_size
    return clip_config
