"""The settings of every training, one dataclass per job.

`jsonargparse` turns each into a command line (`--config x.yaml --optim.lr 1e-4`), with the texts
below as its help. A job has the settings that it uses and no others: what stages share is in a base
class, what only one of them knows in a subclass.
"""

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
RegionTexts = Literal["phrase", "all"]
Quantization = Literal["none", "4bit", "8bit"]
FrozenDtype = Literal["auto", "float32", "bfloat16"]
ModelDtype = Literal["auto", "float32", "bfloat16", "float16"]
VisionFeatures = Literal["encoder", "encoder+prompter"]
RegionFeatures = Literal["prompter", "roi", "coordinates"]
BoxReader = Literal["state", "prompter"]
ImageProjection = Literal["linear", "mlp", "pixel_shuffle", "resampler"]


@dataclass
class PrompterConfig:
    """The region encoder, which turns image tokens into region embeddings (paper, section 3.3).

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
        box_looks: how often the box of a text is looked at again with the tokens around it, which
            tells better where a thing ends; 0 is the paper's BoxHead alone.
    """

    kind: RegionEncoderKind = "prompter"
    width: int = 0
    readout: Literal["mean", "prompt"] = "prompt"
    spatial_prior: SpatialPrior = "both"
    free_form: bool = False
    text_prior: TextPrior = "linear"
    box_looks: int = 0


@dataclass
class PreprocessConfig:
    """How a picture becomes the tower's pixels. What is left open is as the tower was trained.

    Args:
        resize: `letterbox` resizes the long side to the canvas and pads the short one, as in the
            paper; `squash` resizes both sides, as SigLIP does. A CLIP that was trained on crops
            gets `letterbox`, because a crop loses regions.
        interpolation: kernel of the resize.
        mean, std: three numbers each, for pixels in 0..1.
        padding_rgb: three numbers in 0..255, the colour of the padding; left open, the mean colour.
    """

    resize: Literal["auto", "letterbox", "squash"] = "auto"
    interpolation: Literal["auto", "bicubic", "bilinear", "lanczos"] = "auto"
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    padding_rgb: list[int] = field(default_factory=list)


@dataclass
class ModelConfig:
    """The towers and what CLOC adds to them.

    Args:
        architecture: an open_clip model name (`ViT-B-16`); "" if `clip_config` or `init` says it.
        clip_config: open_clip's own model config (`embed_dim`, `vision_cfg`, `text_cfg`).
        init: weights to start from: an open_clip tag of `architecture`, a file (open_clip state
            dict or training checkpoint; .safetensors, .pt, .pth, .bin), or a directory: of
            stage 1, whose region parts come along where name and shape fit (a table says which),
            of open_clip, or of Hugging Face (docs/how-to/encoders.md); `photos` and `scenes` are
            the shipped models of stage 1. "" starts from scratch.
        pretrained_image, pretrained_text: safetensors of one tower alone; they replace `init`'s.
        image_size: side of the square canvas in pixels; 0 takes the architecture's, or `init`'s.
        token_strides: pixels per token side that image tokens are taken at, for a tower of several
            scales (ConvNeXt, ResNet, EfficientNet): [16, 32] gives 14 x 14 tokens at 224 px, which
            hold both scales side by side. Empty takes the tower's last scale alone (or `init`'s).
        tokenizer: `open_clip:NAME`, `huggingface:NAME_OR_DIR`, `builtin` (a small BPE of the
            built-in scenes' text), or a directory with `tokenizer.json`; "" takes the
            architecture's, or `init`'s.
        context_length: longest text in tokens (longer texts are cut); 0 takes the architecture's.
        contrastive_loss: of L_CLIP and L_CLOC: `softmax` is CLIP's and the paper's; `sigmoid` is
            SigLIP's, with a learnable bias for each of the two; `auto` is what the tower was
            trained with.
        phrase_prior: how much of how often a phrase is said in the training data the similarity of
            region and phrase learns. 0 (the paper) is none: a rare phrase is as good a name as a
            usual one. 1 is all: the likeliest name is the most similar. None is `init`'s, or 0.
    """

    architecture: str = ""
    clip_config: dict[str, Any] = field(default_factory=dict)
    init: str = ""
    pretrained_image: str = ""
    pretrained_text: str = ""
    image_size: int = 0
    token_strides: list[int] = field(default_factory=list)
    tokenizer: str = ""
    context_length: int = 0
    contrastive_loss: Literal["auto", "softmax", "sigmoid"] = "auto"
    phrase_prior: float | None = None
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    prompter: PrompterConfig = field(default_factory=PrompterConfig)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse of `dataclasses.asdict`, also of what earlier versions wrote."""
        values = current_model_settings(values)
        parts = {
            "preprocess": PreprocessConfig(**values["preprocess"]),
            "prompter": PrompterConfig(**values["prompter"]),
        }
        return cls(**values | parts)


@dataclass
class DataConfig:
    """The training data.

    Args:
        train: directory or file of Parquet records, or its URL (`s3://bucket/set`).
        mixture: several such data sets in the place of `train`, each with a weight:
            `{DIR_A: 2, DIR_B: 1}` takes two of every three samples from DIR_A.
        validation: records for the periodic evaluation (see `run.eval_every`), for stage 2 also
            chats, whose answers' perplexity is computed; "" skips it.
        cache_dir: keeps the shards of a URL on this disk, each fetched when it is first needed;
            "" reads them in place, with a few requests per record.
        num_workers: loader processes per rank; -1 is as many as the cores allow on a machine with
            GPUs (all but one core per rank, at most 16), and 1 without.
    """

    train: str = ""
    mixture: dict[str, float] = field(default_factory=dict)
    validation: str = ""
    cache_dir: str = ""
    num_workers: int = -1


@dataclass
class Stage1DataConfig(DataConfig):
    """The training data of stage 1, and how a batch is cut from it.

    Args:
        regions_per_image: how many regions are drawn at random each time an image is seen, M of
            equation 2; 0 takes all of them.
        flip: mirrors half of the images; `left` and `right` change places in their texts.
        region_texts: what a region is paired with each time it is seen: its `phrase`, or one drawn
            from `all`, its phrase and its expressions.
        free_form_share: share of the regions that are prompted not by their box but by a point, a
            scribble or a rough mask drawn in it, or by all boxes of a phrase that names several.
        allow_no_regions: trains on captions alone where no record has a region; off refuses such
            a set before the first step.
        allow_no_captions: the same for regions alone where no record has a caption.
        label_noise: spoils the training labels as a detector might: the standard deviation by
            which box corners move, in sides of their box, and the share of regions that get a
            wrong phrase.
        feature_cache: directory that keeps what frozen towers compute of each image and text, so
            that no step decodes an image or runs the image tower, nor a frozen text tower
            (docs/lab/photos.md). All ranks must see it. "" is off.
    """

    regions_per_image: int = 4
    flip: bool = False
    region_texts: RegionTexts = "phrase"
    free_form_share: float = 0.0
    allow_no_regions: bool = False
    allow_no_captions: bool = False
    label_noise: float = 0.0
    feature_cache: str = ""


@dataclass
class Stage2DataConfig(DataConfig):
    """The training data of stage 2.

    Args:
        feature_cache: directory that keeps the frozen encoder's tokens of each image, so that no
            step decodes an image or runs the encoder (docs/how-to/stage2.md). All ranks must see
            it. "" is off.
        skip_chats: leaves out the chats that the model cannot learn from (a first question and
            answer longer than `conversations.max_length`, words that the model reserves, roles
            that its chat template refuses) and lists them with their reasons in
            `run.output_dir/skipped_chats.jsonl`. Off refuses to start with such a chat.
    """

    feature_cache: str = ""
    skip_chats: bool = False


@dataclass
class OptimConfig:
    """The optimizer. The learning rate warms up linearly, then decays to zero as a cosine.

    Args:
        optimizer: `adamw`, or `muon` for the matrices inside the network (embeddings, vectors and
            convolutions stay with AdamW). From scratch Muon learns about three times as fast
            (docs/lab/results.md); it needs whole matrices, so `run.zero_stage` 0.
        lr: peak learning rate of AdamW.
        muon_lr: peak learning rate of Muon, for matrices whose AdamW rate would be `lr`.
        weight_decay: decay of matrices; vectors (biases, norms, temperatures) do not decay.
        betas: AdamW's two decay rates of its moments.
        warmup_steps: steps until the peak is reached.
        grad_clip: largest norm of the whole gradient; 0 turns clipping off.
        spike_bound: a step whose loss or gradient norm lies more than this many deviations above
            the median of the last 200 steps is skipped, as one that is not finite; 0 skips none.
        layer_lr: other peak rates by prefix of the parameter's name, for instance
            `{"vision.encoder": 1e-4}`. The longest matching prefix wins, and 0 freezes. A tower
            that is frozen as a whole keeps no activations.
    """

    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    muon_lr: float = 0.02
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_steps: int = 50
    grad_clip: float = 1.0
    spike_bound: float = 20.0
    layer_lr: dict[str, float] = field(default_factory=dict)


@dataclass
class TowerOptimConfig(OptimConfig):
    """The optimizer. The learning rate warms up linearly, then decays to zero as a cosine.

    Args:
        layer_decay: multiplies the rate of a tower's layer by layer_decay ** (depth - layer), also
            a rate from `layer_lr`. The embeddings are layer 0, the blocks come next, and what
            follows the last block keeps its full rate. 1 is off; 0.65 to 0.9 keeps the early
            layers of a finished CLIP.
    """

    layer_decay: float = 1.0


@dataclass
class Stage1OptimConfig(TowerOptimConfig):
    """The optimizer. The learning rate warms up linearly, then decays to zero as a cosine.

    Args:
        new_lr: peak rate of what CLOC adds to CLIP (Prompter, BoxHead, RoI head, temperature and
            bias of regions), which starts untrained when `model.init` brings the towers; 0 takes
            `lr`.
    """

    new_lr: float = 0.0


@dataclass
class RunConfig:
    """The training run: its length, where it computes, and what it writes.

    Args:
        output_dir: directory for everything the run writes: checkpoints, `log.jsonl`, TensorBoard
            and the finished model.
        steps: number of optimizer steps.
        global_batch_size: images per step over all ranks; a multiple of the number of ranks.
        seed: decides the initial weights, the order of the data and all random choices.
        precision: what autocast computes in; weights stay float32. `auto` is `bf16` where the
            hardware multiplies bf16 matrices natively (other CPUs are 30 times slower in bf16 than
            in fp32), else `fp32`.
        zero_stage: what the ranks share out among them: 1 the optimizer state, 2 also the
            gradients, 3 also the weights (docs/how-to/scale.md). A run may resume at another stage.
        save_every: steps between checkpoints; 0 saves only at the end. They are written in the
            background; only the copy to the host's memory holds up the training.
        log_every: steps between rows of the log; 0 writes only the last.
        keep_checkpoints: how many of the latest checkpoints stay on disk, at least 2.
        resume: continues from the newest whole checkpoint in `output_dir`.
        max_seconds: stops cleanly, with a checkpoint, after this wall time; 0 is no limit.
        step_timeout: seconds after which a step is taken to hang, and the run ends with a message;
            0 is 10 times the median step, at least 60, and on one rank a warning is all. Saving and
            evaluating have 30 minutes.
    """

    output_dir: str = "runs/run"
    steps: int = 300
    global_batch_size: int = 128
    seed: int = 0
    precision: Precision = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 0
    save_every: int = 1000
    log_every: int = 10
    keep_checkpoints: int = 2
    resume: bool = True
    max_seconds: float = 0.0
    step_timeout: float = 0.0


@dataclass
class TowerRunConfig(RunConfig):
    """The training run: its length, where it computes, and what it writes.

    Args:
        gradient_checkpointing: computes activations again in the backward pass, which saves memory.
        compile: compiles the image and the text tower with torch.compile (some minutes at the
            start; not with zero_stage 3).
        eval_every: steps between evaluations on `data.validation`; 0 evaluates only at the end.
    """

    gradient_checkpointing: bool = False
    compile: bool = False
    eval_every: int = 0


@dataclass
class Stage1RunConfig(TowerRunConfig):
    """The training run: its length, where it computes, and what it writes.

    Args:
        micro_batch_size: how many images (then texts) a rank holds the activations of at a time;
            each is forwarded once more in the backward pass. The loss still sees the whole batch.
            0 takes all at once.
    """

    micro_batch_size: int = 0


@dataclass
class Stage2RunConfig(TowerRunConfig):
    """The training run: its length, where it computes, and what it writes.

    Args:
        eval_questions: how many questions of each kind (where is a phrase, what is in a box) an
            evaluation asks, drawn once, by `seed`; or how many chats, from the first on, it reads.
    """

    eval_questions: int = 300


@dataclass
class LossConfig:
    """The loss of stage 1, equation 4.

    Args:
        region_weight: lambda is this times the share of images that have regions.
        grounding_weight: of L_grounding beside L_CLOC.
        same_text_threshold: L_CLOC leaves pairs out whose texts are more similar (cosine); 1.0 or
            more turns the filter off.
        box: of L_grounding: `mse` is equation 3; `l1_giou` is L1 plus generalised IoU.
        box_target: the box that L_grounding wants for a phrase: the region's `own`, or the
            `nearest` of all boxes that the phrase names in the image. With `own`, a phrase of two
            people is answered between the two.
    """

    region_weight: float = 1.0
    grounding_weight: float = 1.0
    same_text_threshold: float = 0.9
    box: BoxLoss = "l1_giou"
    box_target: Literal["own", "nearest"] = "own"


@dataclass
class Stage1Config:
    """CLOC pre-training: `cloc-mllm stage1 --config stage1_openmoji`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: Stage1DataConfig = field(default_factory=Stage1DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: Stage1OptimConfig = field(default_factory=Stage1OptimConfig)
    run: Stage1RunConfig = field(default_factory=Stage1RunConfig)


@dataclass
class LoraConfig:
    """LoRA on the language model, by peft.

    Args:
        variant: `dora` also learns the length of each weight's columns; `rslora` scales by
            alpha / sqrt(rank) instead of alpha / rank, which suits high ranks.
        rank: rank of the added matrices; 0 trains the language model whole.
        alpha: numerator of their scale.
        dropout: probability of dropping an input of the added matrices.
        target_modules: the layers that get them, as peft names them.
    """

    variant: Literal["lora", "dora", "rslora"] = "lora"
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str = "all-linear"


@dataclass
class MllmConfig:
    """The connection of the CLOC encoder and the language model.

    Args:
        init: an MLLM that stage 2 wrote, or a shipped one (`photos`, `scenes`), to train further.
            It takes the place of `cloc`, `language_model` and new projectors; settings of its form
            stay as they are there. Of an adapter (`photos`, or what `cloc-mllm export --mllm`
            writes) the LoRA itself is trained further, and an adapter can be saved again.
        cloc: directory of a stage-1 model, or a shipped one by its name: `photos`, `scenes`.
        language_model: a Hugging Face name or a local directory of an `AutoModelForCausalLM`.
        vision_features: `encoder` gives the language model the tower's tokens f_I'(x);
            `encoder+prompter` appends each token's region embedding (the Prompter's readout) to it.
        region_features: what a region token is made of, beside its box: `prompter` is stage 1's
            region embedding; `roi` is RoI-Align of the image tokens; `coordinates` is nothing.
        projector: how image tokens are projected: `linear`; `mlp`; `pixel_shuffle`, an MLP of 2 x 2
            neighbours, which leaves a quarter of the tokens; `resampler`, `num_queries` learnt
            queries that attend to them.
        num_queries: number of queries of the `resampler`.
        projector_width: hidden width of the projectors; 0 takes the language model's. A small
            language model wants it wider (docs/lab/results.md).
        max_tiles: an image larger than the encoder's canvas is shown whole, followed by at most
            this many tiles of it at their own resolution, each with as many tokens (AnyRes).
        freeze_vision_encoder: trains only the projectors and LoRA.
        box_format: how boxes are written, see `mllm/coordinates.py`.
        num_bins: number of location tokens; integers always use 1000.
        coordinate_smoothing: standard deviation, in bins, of the soft target around the true
            location token; 0 is plain cross-entropy. For location tokens only.
        box_head: answers a box with one `<box>` token, from whose hidden state a head makes the
            four numbers and a confidence (`mllm/answer_boxes.py`), instead of writing them.
        box_reader: how the box head does so: `state` reads them off the hidden state; `prompter`
            makes a text prompt of it, which CLOC's Prompter finds in the image. Where CLOC knows
            the pictures, it is right far more often (docs/lab/photos.md).
        box_loss_weight: weight of the head's loss for a box; the loss of a token has weight 1.
        quantization: quantises the frozen language model's linear layers by bitsandbytes: `4bit`
            (nf4) or `8bit` (LLM.int8).
        dtype: what the frozen language model and the frozen vision encoder are held in. All that
            is trained, the Prompter and the projectors stay float32. `auto` is `bfloat16` on a GPU
            that trains in bf16 (`run.precision`), else `float32`.
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
    box_reader: BoxReader = "state"
    box_loss_weight: float = 2.0
    quantization: Quantization = "none"
    dtype: FrozenDtype = "auto"
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class ConversationConfig:
    """Which questions a record becomes, and how they and chats are laid into sequences.

    Args:
        questions_per_image: how many questions are drawn each time an image is seen.
        ground: weight of the task "where is a phrase?". Weights need not add up to one.
        refer: weight of the task "what is in a box?".
        caption: weight of the task "describe the image".
        locate: weight of the task "where is a region token?". A small language model learns
            grounding several times faster with it (docs/lab/results.md).
        absent: weight of the task that asks for what is not there, to be answered "not in the
            image".
        several: weight of the task "where are the boxes that one phrase names?" ("the two dogs").
        all: weight of the task "where is every thing of a category?".
        count: weight of the task "how many are there?", answered with the boxes and their number.
        exists: weight of the task "is it there?", answered with yes or no, each as often.
        grounded_caption: weight of the task "describe the image with boxes".
        region_caption: weight of the task "which one is in this box?", answered with words that
            mean it alone.
        point: weight of the task "point to it".
        wordings: the words of the questions: `single`, one wording per task; `pools`, the package's
            20 and more per task (`assets/wordings.yaml`), drawn by the sample's seed; or a YAML
            file of that layout. A finished model keeps its wordings.
        first_wording: share of the questions that are asked in the first wording of their pool, in
            0..1; the others are drawn from all of it. A short training learns more with it.
        region_tokens: writes a region token behind each box that a question of a chat mentions.
        max_length: longest sequence in tokens; questions that do not fit behind their image are
            left out and counted, and so is what does not fit behind the start of a chat.
        pack: lets several images share a sequence where that saves padding, each seeing itself
            alone. Loss and gradient stay the same, up to rounding.
    """

    questions_per_image: int = 6
    ground: float = 1.0
    refer: float = 1.0
    caption: float = 0.2
    locate: float = 0.0
    absent: float = 0.0
    several: float = 0.0
    all: float = 0.0
    count: float = 0.0
    exists: float = 0.0
    grounded_caption: float = 0.0
    region_caption: float = 0.0
    point: float = 0.0
    wordings: str = "single"
    first_wording: float = 0.0
    region_tokens: bool = True
    max_length: int = 512
    pack: bool = True


@dataclass
class AlignmentConfig:
    """Alignment, before stage 2: the projectors learn to write what the records say is there.

    They write it in the language model's own embeddings (`train/alignment.py`), so this is for a
    language model that `training/tiny_llm.py` made.

    Args:
        steps: number of optimizer steps; 0 leaves the alignment out.
        global_batch_size: images per step over all ranks.
        optimizer: as in `optim`.
        lr: peak learning rate of the projectors.
        vision_lr: peak learning rate of the vision encoder, whose tokens then learn to tell the
            name and the box of the thing they show; 0 leaves it as it is.
    """

    steps: int = 0
    global_batch_size: int = 64
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 2e-3
    vision_lr: float = 0.0


@dataclass
class Stage2Config:
    """MLLM tuning: `cloc-mllm stage2 --config stage2_openmoji`."""

    model: MllmConfig = field(default_factory=MllmConfig)
    data: Stage2DataConfig = field(default_factory=Stage2DataConfig)
    conversations: ConversationConfig = field(default_factory=ConversationConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    optim: TowerOptimConfig = field(default_factory=TowerOptimConfig)
    run: Stage2RunConfig = field(default_factory=Stage2RunConfig)


@dataclass
class TinyLlmConfig:
    """The small language model of the built-in data: `python training/tiny_llm.py --config ...`.

    Args:
        width: width of the Llama.
        layers: number of its layers.
        heads: number of its attention heads.
        mlp_width: hidden width of its MLPs.
        max_length: longest sequence it can ever read, in tokens.
        num_scenes: number of different scenes it reads about (training split).
        image_size: side of the canvas, in pixels, of the encoder it will read from.
        num_image_tokens: tokens per image of the projector it will read from.
        noise: standard deviation of the noise added to scene tokens, in units of their own.
        num_bins: number of location tokens.
        coordinate_smoothing: standard deviation, in bins, of the soft target around the true
            location token; 0 is plain cross-entropy.
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
