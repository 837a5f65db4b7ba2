"""Assembles an MLLM from a stage-1 directory and a language model, ready to train."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cloc_mllm.config import ConversationConfig, LoraConfig, MllmConfig, ModelConfig
from cloc_mllm.data.conversations import tasks_beyond_first
from cloc_mllm.data.transforms import Preprocessing
from cloc_mllm.data.wordings import IMAGE_TOKEN, REGION_TOKEN, load_wordings
from cloc_mllm.devices import DTYPES, resolve_frozen_dtype
from cloc_mllm.mllm.adapter import ADAPTER_CONFIG, load_adapter
from cloc_mllm.mllm.assembled import built_on
from cloc_mllm.mllm.configuration import ClocMllmConfig
from cloc_mllm.mllm.coordinates import BOX_TOKEN, BoxFormat
from cloc_mllm.mllm.image_processing import ClocMllmImageProcessor
from cloc_mllm.mllm.language_model import (
    add_embeddings,
    attention_for_training,
    load_language_model,
    load_tokenizer,
    word_table,
)
from cloc_mllm.mllm.modeling import ClocMllmForConditionalGeneration, cast_encoder
from cloc_mllm.mllm.processing import ClocMllmProcessor, add_special_tokens, token_ids
from cloc_mllm.mllm.projector import num_image_tokens
from cloc_mllm.models.build import build_cloc_vision, check_fingerprint, load_cloc
from cloc_mllm.models.clip_config import ResolvedModel, read_cloc_config
from cloc_mllm.models.phrases import Phrases
from cloc_mllm.shipped import find_model

# settings of a training, which `model.init` does not bring
_NOT_OF_THE_FORM = ("init", "freeze_vision_encoder", "lora", "dtype")
_NOT_OF_AN_ADAPTER = ("language_model", "quantization")  # which it builds on


def build_mllm(
    config: MllmConfig, asks: ConversationConfig | None = None
) -> tuple[ClocMllmForConditionalGeneration, ClocMllmProcessor]:
    """Stage 1's encoder, fresh projectors and a language model, or a whole MLLM (`config.init`),
    with LoRA, ready to train.

    Trainable are the projectors, LoRA and the location tokens' embeddings (or the whole language
    model at `lora.rank` 0), and the vision encoder where it is not frozen.

    Args:
        asks: the questions that it is to be taught, which model and processor take down; by default
            those of a `ConversationConfig`.

    Raises:
        ValueError: settings that exclude each other; a tokenizer without an end of sequence.
        FileNotFoundError: `config.cloc` is no stage-1 model directory, or `config.init` no MLLM's.
    """
    _check_quantization(config)
    held_in = resolve_frozen_dtype("auto") if config.dtype == "auto" else config.dtype
    # with LoRA nothing of it is trained; else `hold_frozen` casts what turns out to be frozen
    dtype = DTYPES[held_in] if config.lora.rank else torch.float32
    model, processor = (_continue if config.init else _assemble)(config, dtype)
    asks = asks or ConversationConfig()
    processor.teach(load_wordings(asks.wordings), tasks_beyond_first(asks))
    model.config.fingerprint = processor.fingerprint
    model.config.says_not_there = asks.absent > 0
    model.vision.requires_grad_(not config.freeze_vision_encoder)
    if not config.freeze_vision_encoder:
        processor.phrases = None  # its regions move away from them
    if config.lora.rank and not hasattr(model.language_model, "peft_config"):
        written = new_token_ids(processor)
        model.language_model = add_lora(model.language_model, config.lora, written)
    return model, processor


def _check_quantization(config: MllmConfig) -> None:
    if config.quantization != "none" and not config.lora.rank:
        raise ValueError(
            f"a {config.quantization} language model cannot be trained whole; set model.lora.rank "
            "above 0"
        )
    dora_in_8_bits = config.quantization == "8bit" and config.lora.variant == "dora"
    if dora_in_8_bits and not torch.cuda.is_available():
        raise ValueError(
            "peft's DoRA cannot read 8-bit weights on a CPU; set model.quantization to 4bit, or "
            "model.lora.variant to lora or rslora"
        )


def new_token_ids(processor: ClocMllmProcessor) -> list[int]:
    """Returns the tokens that boxes are written with, whose embeddings LoRA trains along."""
    names = processor.coordinates.tokens() + [BOX_TOKEN] * processor.box_head
    return token_ids(processor.tokenizer, names)


def hold_frozen(
    model: ClocMllmForConditionalGeneration,
    dtype: torch.dtype,
    taught: tuple[str, ...] = (),
) -> None:
    """Casts what is frozen of the language model, and the vision encoder if all of it is frozen.

    Call it once it is decided what trains. Projectors, Prompter and box head stay as they are.

    Args:
        taught: parameters that learn later although they are frozen now, by prefixes of names.
    """
    encoder = [
        (name, p) for name, p in model.named_parameters() if name.startswith("vision.encoder.")
    ]
    if not any(p.requires_grad or name.startswith(taught) for name, p in encoder):
        cast_encoder(model, dtype)
    for parameter in model.language_model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _assemble(
    config: MllmConfig, dtype: torch.dtype
) -> tuple[ClocMllmForConditionalGeneration, ClocMllmProcessor]:
    cloc, _, cloc_config = load_cloc(config.cloc)
    processor = _processor(config, cloc_config, cloc.vision.grid_hw)
    processor.phrases = Phrases.load(find_model("cloc", config.cloc))
    tokenizer, box_format = processor.tokenizer, processor.coordinates
    language_model = load_language_model(config.language_model, config.quantization, dtype)
    model_config = _model_config(config, language_model.config, cloc_config, processor)
    model = ClocMllmForConditionalGeneration(model_config, language_model)
    model.vision.load_state_dict(cloc.vision.state_dict())
    model.generation_config = _generation_config(language_model, tokenizer)
    location = token_ids(tokenizer, box_format.tokens())
    num_old = len(load_tokenizer(config.language_model))
    add_embeddings(language_model, range(num_old, len(tokenizer)), location)
    model.config.text_config.vocab_size = language_model.config.vocab_size
    for projector in (model.projector, model.region_projector):
        projector.reset(float(word_table(language_model.get_input_embeddings()).std()))
    return model, processor


def _processor(
    config: MllmConfig, cloc_config: ResolvedModel, grid_hw: tuple[int, int]
) -> ClocMllmProcessor:
    """Makes the processor of a new MLLM, whose tokenizer has the tokens of images and boxes."""
    tokenizer = load_tokenizer(config.language_model)
    if tokenizer.eos_token is None:
        raise ValueError(
            f"the tokenizer of {config.language_model} has no eos token, so answers never end; "
            "set one and save it there"
        )
    box_format = BoxFormat(config.box_format, config.num_bins, config.box_head)
    add_special_tokens(tokenizer, box_format)
    return ClocMllmProcessor(
        tokenizer,
        ClocMllmImageProcessor.of(Preprocessing.of(cloc_config)),
        num_image_tokens=num_image_tokens(config.projector, grid_hw, config.num_queries),
        box_format=box_format.kind,
        num_bins=box_format.num_bins,
        box_head=box_format.head,
        max_tiles=config.max_tiles,
    )


def mllm_shapes(
    config: MllmConfig, asks: ConversationConfig, cloc_config: ResolvedModel | None = None
) -> tuple[ClocMllmConfig, ClocMllmProcessor]:
    """Reads what `build_mllm` would build, without any weights: of the language model only its
    config and its tokenizer are needed.

    Args:
        cloc_config: of the encoder; None reads it from the directory `config.cloc`.

    Raises:
        ValueError, FileNotFoundError: see `build_mllm`.
    """
    _check_quantization(config)
    if config.init:
        model_config, processor = _read_continued(config)
    else:
        cloc_config = cloc_config or read_cloc_config(config.cloc)
        with torch.device("meta"):
            grid_hw = build_cloc_vision(cloc_config).grid_hw
        processor = _processor(config, cloc_config, grid_hw)
        text_config = AutoConfig.from_pretrained(config.language_model, trust_remote_code=False)
        text_config.vocab_size = max(text_config.vocab_size, len(processor.tokenizer))
        model_config = _model_config(config, text_config, cloc_config, processor)
    processor.teach(load_wordings(asks.wordings), tasks_beyond_first(asks))
    return model_config, processor


def _continue(
    config: MllmConfig, dtype: torch.dtype
) -> tuple[ClocMllmForConditionalGeneration, ClocMllmProcessor]:
    """Loads an MLLM that stage 2 wrote, to train it further; of an adapter, its LoRA."""
    _, processor = _read_continued(config)
    directory = find_model("mllm", config.init)
    if _is_adapter(directory):
        language_model, cloc = built_on(directory)
        return load_adapter(
            directory,
            language_model=config.language_model or language_model,
            cloc=cloc,
            quantization=config.quantization,
            dtype=dtype,
            trainable=True,
        )
    model = ClocMllmForConditionalGeneration.from_pretrained(
        directory, dtype=dtype, attn_implementation=attention_for_training()
    )
    cast_encoder(model, torch.float32)  # it may learn; `hold_frozen` casts it if it does not
    return model, processor


def _is_adapter(directory: Path) -> bool:
    return (directory / ADAPTER_CONFIG).is_file()


def _read_continued(config: MllmConfig) -> tuple[ClocMllmConfig, ClocMllmProcessor]:
    """Reads the config and the processor of the MLLM in `config.init`, and refuses other forms."""
    directory = find_model("mllm", config.init)
    if not (directory / "processor_config.json").is_file():
        raise FileNotFoundError(
            f"model.init {config.init} is no MLLM directory (processor_config.json is missing); "
            "expected what stage 2 writes to OUTPUT_DIR/model, or `cloc-mllm export --mllm`"
        )
    model_config = ClocMllmConfig.from_pretrained(directory)
    processor = ClocMllmProcessor.from_pretrained(directory)
    check_fingerprint(model_config.fingerprint, processor.fingerprint, config.init)
    theirs = {**vars(model_config), **vars(processor)}
    chosen: tuple[str, ...] = _NOT_OF_THE_FORM
    if _is_adapter(directory):
        chosen += _NOT_OF_AN_ADAPTER
        _check_lora(config, directory)
    for field in dataclasses.fields(MllmConfig):
        given = getattr(config, field.name)
        if field.name in chosen or given == field.default:
            continue
        if field.name not in theirs or given != theirs[field.name]:
            raise ValueError(
                f"model.{field.name} is {given!r}, but model.init {config.init} "
                f"{'has ' + repr(theirs[field.name]) if field.name in theirs else 'brings its own'}"
                "; leave it out, a model that is trained further keeps its form"
            )
    return model_config, processor


def _check_lora(config: MllmConfig, adapter: Path) -> None:
    """Refuses a form of LoRA that is not the adapter's, whose own is trained further."""
    theirs = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    rank, alpha = theirs["r"], theirs["lora_alpha"]
    if config.lora not in (LoraConfig(), dataclasses.replace(config.lora, rank=rank, alpha=alpha)):
        raise ValueError(
            f"model.lora has rank {config.lora.rank} and alpha {config.lora.alpha}, but model.init "
            f"{config.init} is an adapter with {rank} and {alpha}; leave model.lora out, an "
            "adapter's own LoRA is trained further"
        )


def add_lora(language_model: PreTrainedModel, lora: LoraConfig, new_tokens: list[int]) -> Any:
    """`language_model` as a frozen `PeftModel` with trainable LoRA and `new_tokens` embeddings."""
    import peft

    from cloc_mllm.mllm.new_tokens import keep_rows_beside_table

    indices = {
        _module_name(language_model, embeddings): new_tokens
        for embeddings in (
            language_model.get_input_embeddings(),
            language_model.get_output_embeddings(),
        )
    }
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_dora=lora.variant == "dora",
        use_rslora=lora.variant == "rslora",
        target_modules=lora.target_modules,
        trainable_token_indices=indices if new_tokens else None,
    )
    adapted = peft.get_peft_model(language_model, config)
    keep_rows_beside_table(adapted)
    return adapted


def _model_config(
    config: MllmConfig,
    text_config: PreTrainedConfig,
    cloc_config: ModelConfig,
    processor: ClocMllmProcessor,
) -> ClocMllmConfig:
    tokenizer, box_format = processor.tokenizer, processor.coordinates
    location = token_ids(tokenizer, box_format.tokens())
    if config.coordinate_smoothing > 0 and not location:
        raise ValueError(
            f"coordinate_smoothing {config.coordinate_smoothing} needs location tokens, but "
            "box_format is 'integers'; set it to 0"
        )
    if config.box_reader == "prompter":
        if not config.box_head:
            raise ValueError("model.box_reader is prompter; set model.box_head to true")
        if cloc_config.prompter.kind != "prompter":
            raise ValueError(
                f"model.box_reader prompter needs a CLOC that learnt boxes, but model.cloc has the "
                f"prompter.kind {cloc_config.prompter.kind!r}; set model.box_reader to state"
            )
    image_token_id, region_token_id = token_ids(tokenizer, [IMAGE_TOKEN, REGION_TOKEN])
    # the text tower stays behind, and with it every path of the machine that trained it
    clip_config = {**cloc_config.clip_config, "text_cfg": {}}
    vision_only = dataclasses.replace(cloc_config, clip_config=clip_config, tokenizer="")
    return ClocMllmConfig(
        # a copy: Transformers changes the attention setting of a config that joins another
        text_config=copy.deepcopy(text_config),
        cloc_config=dataclasses.asdict(vision_only),
        image_token_id=image_token_id,
        region_token_id=region_token_id,
        location_token_start=location[0] if location else None,
        vision_features=config.vision_features,
        region_features=config.region_features,
        projector=config.projector,
        num_queries=config.num_queries,
        projector_width=config.projector_width,
        box_format=box_format.kind,
        num_bins=box_format.num_bins,
        coordinate_smoothing=config.coordinate_smoothing,
        box_token_id=token_ids(tokenizer, [BOX_TOKEN])[0] if config.box_head else None,
        box_reader=config.box_reader,
        box_loss_weight=config.box_loss_weight,
        fingerprint=processor.fingerprint,
    )


def _generation_config(
    language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """Greedy, ending where the language model or its tokenizer says answers end."""
    eos = language_model.generation_config.eos_token_id
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    return GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted({*ends, tokenizer.eos_token_id}),
        pad_token_id=tokenizer.pad_token_id,
    )


def _module_name(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)
