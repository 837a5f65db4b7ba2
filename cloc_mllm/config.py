"""One dataclass per job. `jsonargparse` turns each into `--config x.yaml --optim.lr 1e-4`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from cloc_mllm.earlier import current_model_settings

RegionEncoderKind = Literal["prompter", "roi_align", "none"]
Precision = Literal["auto", "fp32", "bf16"]
Templates = Literal["none", "photo", "small", "clip80"]
RegionPrompt = Literal["box", "point", "scribble", "mask"]
SpatialPrior = Literal["both", "box", "text", "none"]
TextPrior = Literal["region", "linear"]
BoxLoss = Literal["mse", "l1_giou"]
Quantization = Literal["none", "4bit", "8bit"]
VisionFeatures = Literal["encoder", "encoder+prompter"]
RegionFeatures = Literal["prompter", "roi", "coordinates"]
ImageProjection = Literal["linear", "mlp", "pixel_shuffle", "resampler"]


@dataclass
class PrompterConfig:
    """How image tokens become region embeddings (section 3.3 of the paper).

    Args:
        kind: `prompter` is the paper's; `roi_align` and `none` (mean of the tokens under the
            box, no region loss) are its ablations.
        width: of the Prompter's layer; 0 takes the tower's token width, as in the paper.
        readout: `mean` pools all output tokens as in the paper; `prompt` pools only the prompt's.
        spatial_prior: of which prompts a learnable gate times the token's overlap with the box
            (box prompts) or its similarity to the text (text prompts) is added to the attention
            logits.
        free_form: learn points, scribbles, masks and sets of boxes as prompts too; needs
            `data.free_form_share`.
        text_prior: what a text is compared with at each image token: `region` is the token read
            out as if it were a region, `linear` leaves the readout's MLP out, which is most of
            what the Prompter costs.
    """

    kind: RegionEncoderKind = "prompter"
    width: int = 0
    readout: Literal["mean", "prompt"] = "prompt"
    spatial_prior: SpatialPrior = "both"
    free_form: bool = False
    text_prior: TextPrior = "linear"


@dataclass
class ModelConfig:
    """The towers and what CLOC adds to them.

    Args:
        architecture: an open_clip model name (`ViT-B-16`); "" if `clip_config` or `init` says it.
        clip_config: open_clip's own model config (`embed_dim`, `vision_cfg`, `text_cfg`).
        init: weights to start from: an open_clip tag of `architecture`, a file (open_clip state
            dict or training checkpoint; .safetensors, .pt, .pth, .bin), or a directory that stage 1
            wrote, whose region parts come along where name and shape fit (a table says which).
            "" starts from scratch.
        pretrained_image, pretrained_text: safetensors of one tower alone; they replace `init`'s.
        image_size: side of the square canvas in pixels; 0 takes the architecture's, or `init`'s.
        tokenizer: `open_clip:NAME`, `huggingface:NAME_OR_DIR`, `builtin` (a small BPE of the
            built-in scenes' text), or a directory with `tokenizer.json`; "" takes the
            architecture's, or `init`'s.
        context_length: longest text in tokens (longer texts are cut); 0 takes the architecture's.
        contrastive_loss: of L_CLIP and L_CLOC: `softmax` is CLIP's and the paper's; `sigmoid` is
            SigLIP's, with a learnable bias for each of the two.
    """

    architecture: str = ""
    clip_config: dict[str, Any] = field(default_factory=dict)
    init: str = ""
    pretrained_image: str = ""
    pretrained_text: str = ""
    image_size: int = 0
    tokenizer: str = ""
    context_length: int = 0
    contrastive_loss: Literal["softmax", "sigmoid"] = "softmax"
    prompter: PrompterConfig = field(default_factory=PrompterConfig)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse of `dataclasses.asdict`, also of what earlier versions wrote."""
        values = current_model_settings(values)
        return cls(**values | {"prompter": PrompterConfig(**values["prompter"])})


@dataclass
class DataConfig:
    """Where records come from and how a batch is cut from them.

    Args:
        train: directory (or file) of Parquet records, or its URL (`s3://bucket/set`).
        mixture: instead of `train`, several of them, each with the weight of its share of the
            samples: `{DIR_A: 2, DIR_B: 1}` takes two of every three from DIR_A.
        validation: the same for the periodic evaluation; "" skips it.
        cache_dir: keeps the shards of a URL on this disk, each fetched when first needed; "" reads
            them in place, a few requests a record.
        feature_cache: stage 2 with a frozen encoder only: keeps the tokens of each picture in this
            directory, so that no step decodes a picture or runs the encoder (docs/stage2.md). All
            ranks must see it. "" is off.
        num_workers: loader processes per rank.
        regions_per_image: M of equation 2, drawn at random each time an image is seen.
        flip: mirror half of the images (leave off when phrases name left and right).
        free_form_share: share of regions that are prompted not by their box but by a point, a
            scribble or a rough mask drawn in it, or, if one phrase names several, by all boxes.
        label_noise: spoil the training labels as a detector might: standard deviation of each box
            corner in sides of its box, and share of regions that get a wrong phrase.
    """

    train: str = ""
    mixture: dict[str, float] = field(default_factory=dict)
    validation: str = ""
    cache_dir: str = ""
    feature_cache: str = ""
    num_workers: int = 1
    regions_per_image: int = 4
    flip: bool = False
    free_form_share: float = 0.0
    label_noise: float = 0.0


@dataclass
class OptimConfig:
    """Linear warm-up, then cosine decay to zero.

    Args:
        optimizer: `adamw`, or `muon` for the matrices inside the network (embeddings, vectors and
            convolutions stay with AdamW). From scratch Muon learns about three times as fast
            (docs/results.md); it needs whole matrices, so `run.zero_stage` 0.
        lr: peak learning rate of AdamW.
        new_lr: of what CLOC adds to CLIP (Prompter, BoxHead, RoI head, temperature of regions),
            which starts new when `model.init` brings the towers; 0 is `lr`. Stage 1 only.
        muon_lr: peak learning rate of Muon, for parameters whose AdamW rate would be `lr`.
        layer_lr: overrides by parameter-name prefix, e.g. `{"vision.encoder.visual": 1e-4}`; the
            longest matching prefix wins and 0 freezes. A tower frozen whole keeps no activations.
        layer_decay: multiplies the rate of a tower's layer by layer_decay ** (depth - layer), also
            one from `layer_lr`: 0 are the embeddings, then the blocks, then at full rate what
            follows them. 1 is off; 0.65 to 0.9 keeps the early layers of a finished CLIP.
        grad_clip: largest global gradient norm; 0 turns clipping off.
    """

    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    new_lr: float = 0.0
    muon_lr: float = 0.02
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_steps: int = 50
    grad_clip: float = 1.0
    layer_lr: dict[str, float] = field(default_factory=dict)
    layer_decay: float = 1.0


@dataclass
class RunConfig:
    """One training run.

    Args:
        output_dir: everything the run writes: checkpoints, `log.jsonl`, TensorBoard, the model.
        steps: optimizer steps.
        global_batch_size: images a step over all ranks; must divide by the number of ranks.
        precision: of autocast; weights stay float32. `auto` is bf16 where the hardware multiplies
            bf16 matrices natively (on other CPUs bf16 is 30 times slower than fp32).
        zero_stage: what the ranks share out: 1 the optimizer state, 2 also the gradients, 3 also
            the weights (docs/scale.md). A run may resume at another stage.
        gradient_checkpointing: recompute activations of the towers in backward.
        micro_batch_size: stage 1 only: images (then texts) that a rank holds the activations of
            at a time, each forwarded once more in backward; the loss sees the whole batch. 0: all.
        compile: torch.compile the two towers (some minutes at the start; not with zero_stage 3).
        save_every, eval_every, log_every: in steps; 0 means only at the end.
        keep_checkpoints: how many of the latest checkpoints stay on disk (at least 2).
        resume: continue from the newest whole checkpoint in `output_dir`.
        max_seconds: stop cleanly (with a checkpoint) after this wall time; 0 is no limit.
    """

    output_dir: str = "runs/run"
    steps: int = 300
    global_batch_size: int = 128
    seed: int = 0
    precision: Precision = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 0
    gradient_checkpointing: bool = False
    micro_batch_size: int = 0
    compile: bool = False
    save_every: int = 100
    eval_every: int = 0
    log_every: int = 10
    keep_checkpoints: int = 2
    resume: bool = True
    max_seconds: float = 0.0


@dataclass
class LossConfig:
    """The loss of stage 1, equation 4.

    Args:
        region_weight: lambda is this times the share of images that have regions.
        grounding_weight: of L_grounding beside L_CLOC.
        same_text_threshold: L_CLOC leaves pairs out whose texts are more similar (cosine); 1.0 or
            more turns the filter off.
        box: of L_grounding: `mse` is equation 3; `l1_giou` is L1 plus generalised IoU.
    """

    region_weight: float = 1.0
    grounding_weight: float = 1.0
    same_text_threshold: float = 0.9
    box: BoxLoss = "l1_giou"


@dataclass
class Stage1Config:
    """CLOC pre-training: `deepspeed training/stage1.py --config training/configs/...yaml`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass
class LoraConfig:
    """peft LoRA on the language model. `rank` 0 trains the language model whole.

    `variant`: `dora` also learns the length of each weight's columns; `rslora` scales by
    alpha / sqrt(rank) instead of alpha / rank, for high ranks.
    """

    variant: Literal["lora", "dora", "rslora"] = "lora"
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str = "all-linear"


@dataclass
class MllmConfig:
    """How the CLOC encoder enters the language model.

    Args:
        init: an MLLM that stage 2 wrote, to be trained further in the place of `cloc`,
            `language_model` and fresh projectors; settings of its form stay as they are there.
        cloc: directory of a stage-1 model.
        language_model: a Hugging Face name or a local directory of an `AutoModelForCausalLM`.
        vision_features: `encoder` gives the LLM the tower's tokens f_I'(x); `encoder+prompter`
            appends each token's region embedding (the Prompter's readout) to it.
        region_features: what a region token is made of, beside its box: `prompter` is stage 1's
            region embedding; `roi` is RoI-Align of the image tokens; `coordinates` is nothing.
        projector: of image tokens: `linear`; `mlp`; `pixel_shuffle`, an MLP of 2 x 2 neighbours, so
            a quarter of the tokens; `resampler`, `num_queries` learnt queries that attend to them.
        projector_width: hidden width of the projectors; 0 takes the language model's. A small
            language model wants it wider (docs/results.md).
        max_tiles: at most so many tiles of a picture larger than the encoder's canvas follow the
            whole picture, each at its own resolution and with as many tokens (AnyRes).
        freeze_vision_encoder: train only projector and LoRA when true.
        box_format: how boxes are written, see `mllm/coordinates.py`.
        num_bins: number of location tokens; integers always use 1000.
        coordinate_smoothing: standard deviation, in bins, of the soft target around the true
            location token; 0 is plain cross-entropy. Location tokens only.
        box_head: answer a box with one `<box>` token, from whose hidden state a head reads the four
            numbers and a confidence (`mllm/answer_boxes.py`), instead of writing them.
        box_loss_weight: of the head's loss for a box beside that of a token.
        quantization: of the frozen language model's linear layers, by bitsandbytes: `4bit` (nf4) or
            `8bit` (LLM.int8). Everything else, and all that is trained, stays float32.
    """

    init: str = ""
    cloc: str = ""
    language_model: str = ""
    vision_features: VisionFeatures = "encoder+prompter"
    region_features: RegionFeatures = "prompter"
    projector: ImageProjection = "mlp"
    num_queries: int = 64
    projector_width: int = 0
    max_tiles: int = 0
    freeze_vision_encoder: bool = True
    box_format: Literal["integers", "location_tokens"] = "location_tokens"
    num_bins: int = 100
    coordinate_smoothing: float = 0.0
    box_head: bool = False
    box_loss_weight: float = 2.0
    quantization: Quantization = "none"
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class ConversationConfig:
    """Which questions a record becomes, and how they are laid into sequences.

    Args:
        questions_per_image: drawn anew each time an image is seen.
        ground, refer, caption: weights of the tasks, which need not add up to one.
        locate: asks for the box of a region token. A small language model learns grounding several
            times faster with it (docs/results.md).
        absent: asks for what is not there, to be answered "not in the image".
        max_length: longest sequence in tokens; questions that do not fit behind their image are
            left out and counted.
        pack: several images may share a sequence where that saves padding, each seeing itself
            alone. Loss and gradient stay what they are, up to rounding.
    """

    questions_per_image: int = 6
    ground: float = 1.0
    refer: float = 1.0
    caption: float = 0.2
    locate: float = 0.0
    absent: float = 0.0
    max_length: int = 512
    pack: bool = True


@dataclass
class AlignmentConfig:
    """Before stage 2: the projectors learn to write the language model's own embeddings of what
    the records say is there (`train/alignment.py`). Only for a language model that
    `training/tiny_llm.py` made.

    Args:
        steps: 0 leaves it out.
        optimizer: as in `OptimConfig`.
        vision_lr: above 0 trains the vision encoder, too: its tokens then learn to tell the name
            and the box of the thing they show.
    """

    steps: int = 0
    global_batch_size: int = 64
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 2e-3
    vision_lr: float = 0.0


@dataclass
class Stage2Config:
    """MLLM tuning: `deepspeed training/stage2.py --config training/configs/...yaml`."""

    model: MllmConfig = field(default_factory=MllmConfig)
    data: DataConfig = field(default_factory=DataConfig)
    conversations: ConversationConfig = field(default_factory=ConversationConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass
class TinyLlmConfig:
    """The small language model of the built-in data: `python training/tiny_llm.py --config ...`.

    Args:
        width, layers, heads, mlp_width: of the Llama.
        num_scenes: how many different scenes it reads about (training split).
        image_size, num_image_tokens: of the encoder and the projector it will read from.
        noise: standard deviation of what is added to scene tokens, in units of their own.
        coordinate_smoothing: as in `MllmConfig`.
    """

    width: int = 128
    layers: int = 4
    heads: int = 4
    mlp_width: int = 256
    max_length: int = 1024
    num_scenes: int = 100_000
    image_size: int = 128
    num_image_tokens: int = 64
    noise: float = 0.3
    num_bins: int = 100
    coordinate_smoothing: float = 1.5
    conversations: ConversationConfig = field(default_factory=ConversationConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
