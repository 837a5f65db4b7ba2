"""Every path of the project that computes, on tiny models and pretended GPUs.

    DS_ACCELERATOR=cuda python -m tests.pretended.cases OUT.json [start of a case's name]...

Runs in processes of its own, since DeepSpeed chooses its accelerator when it is imported. Writes
the error of each case, and prints where the host waited for the GPU.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cloc_mllm.config import (
    AlignmentConfig,
    ConversationConfig,
    LoraConfig,
    MllmConfig,
    PrompterConfig,
    Stage2Config,
    Stage2DataConfig,
    Stage2RunConfig,
    TinyLlmConfig,
    TowerOptimConfig,
)
from cloc_mllm.data.parquet import write_records
from cloc_mllm.data.records import Record
from cloc_mllm.data.scenes import generate_scenes
from tests.pretended.pretend_cuda import PretendCuda, pretend_cuda
from tests.tiny_mllm import TEXTS, save_tiny_cloc, tiny_shape
from tests.train import tiny_stage1

Gpu = pretend_cuda


@cache
def scenes() -> list[Record]:
    return list(generate_scenes(8, split="train", long_side=64))


@cache
def root() -> Path:
    """The folder of all inputs and outputs; ranks share one."""
    return Path(os.environ.get("PRETENDED_ROOT") or tempfile.mkdtemp(prefix="pretended_"))


def write_inputs() -> None:
    """Everything that the cases read, made without a GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from cloc_mllm.data.tokenizer import train_byte_level_bpe
    from cloc_mllm.mllm import build_mllm, merge_and_save

    tiny_stage1.write_tiny_inputs(root())
    write_records(scenes(), root() / "scenes")
    for kind in ("prompter", "roi_align", "none"):
        save_tiny_cloc(root() / f"cloc-{kind}", PrompterConfig(kind=kind))  # type: ignore[arg-type]
    save_tiny_cloc(root() / "cloc-mean", PrompterConfig(readout="mean", free_form=True))
    tokenizer = train_byte_level_bpe(TEXTS, vocab_size=300)
    torch.manual_seed(0)
    shape = LlamaConfig(**tiny_shape(tokenizer), tie_word_embeddings=True)
    LlamaForCausalLM(shape).save_pretrained(root() / "llm")
    tokenizer.save_pretrained(root() / "llm")
    for name, changes in MLLMS.items():
        torch.manual_seed(0)
        merge_and_save(*build_mllm(mllm_config(**changes)), root() / f"mllm-{name}")


MLLMS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "box_head": {"box_head": True},
    "prompter_head": {"box_head": True, "box_reader": "prompter"},
    "integers": {"box_format": "integers", "projector": "pixel_shuffle", "region_features": "roi"},
}


def mllm_config(lora: int = 0, cloc: str = "prompter", **model: Any) -> MllmConfig:
    return MllmConfig(
        cloc=str(root() / f"cloc-{cloc}"),
        language_model=str(root() / "llm"),
        projector_width=24,
        num_bins=20,
        lora=LoraConfig(rank=lora, alpha=4, variant=model.pop("variant", "lora")),
        **model,
    )


@dataclasses.dataclass
class Output:
    """A folder for one case, the same on all ranks."""

    made: int = 0

    def new(self) -> Path:
        self.made += 1
        return root() / f"out{self.made}"


OUTPUT = Output()


# ------------------------------------------------------------------------------------------ stage 1


def stage1(
    gpu: Gpu,
    *,
    prompter: dict[str, Any] | None = None,
    loss: str = "softmax",
    data: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    resume_at: int = 0,
    **run: Any,
) -> Any:
    """A run with a checkpoint at each step; with `resume_at` it stops there and goes on."""
    from cloc_mllm.train.stage1 import run_stage1

    out = OUTPUT.new()
    steps = run.setdefault("steps", 2)
    config = tiny_stage1.tiny_config(
        root(), out, **{"precision": "bf16", "save_every": 1, "log_every": 0, **run}
    )
    config.model.prompter = PrompterConfig(**(prompter or {}))
    config.model.contrastive_loss = loss  # type: ignore[assignment]
    config.data = dataclasses.replace(config.data, **(data or {}))
    config.optim = dataclasses.replace(config.optim, **(optim or {}))
    for num_steps in [resume_at] * bool(resume_at) + [steps]:
        config.run = dataclasses.replace(config.run, steps=num_steps)
        assert run_stage1(config).exit_code == 0
    assert (out / "model" / "model.safetensors").exists()


def stage1_equals_the_cpu(gpu: Gpu) -> None:
    """The loss of a batch in float32, with neither engine nor optimizer."""
    from cloc_mllm.config import Stage1Config
    from cloc_mllm.data.collate import ClocCollator
    from cloc_mllm.data.transforms import Preprocessing
    from cloc_mllm.models.build import load_tokenizer
    from cloc_mllm.train.stage1 import stage1_step
    from tests.models.tiny import tiny_cloc, tiny_config

    model, config = tiny_cloc(), tiny_config()
    batch = ClocCollator(load_tokenizer(config), Preprocessing(64), 2)(list(enumerate(scenes())))
    step = stage1_step(Stage1Config())
    expected = step(copy.deepcopy(model), batch.to("cpu"))["loss"]
    actual = step(model.to("cuda"), batch.pin_memory().to("cuda"))["loss"]
    torch.testing.assert_close(actual.cpu(), expected)


# ------------------------------------------------------------------------------------------ stage 2


def stage2(
    gpu: Gpu,
    *,
    model: dict[str, Any] | None = None,
    conversations: dict[str, Any] | None = None,
    alignment: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    resume_at: int = 0,
    **run: Any,
) -> None:
    from cloc_mllm.train.stage2 import run_stage2

    out = OUTPUT.new()
    steps = run.pop("steps", 2)
    config = Stage2Config(
        model=mllm_config(**{"lora": 2, **(model or {})}),
        data=Stage2DataConfig(train=str(root() / "scenes"), num_workers=0, **(data or {})),
        conversations=ConversationConfig(questions_per_image=3, **(conversations or {})),
        alignment=AlignmentConfig(**(alignment or {})),
        optim=TowerOptimConfig(lr=1e-2, warmup_steps=0),
        run=Stage2RunConfig(
            output_dir=str(out),
            steps=steps,
            global_batch_size=4,
            **{"precision": "bf16", "save_every": 1, "log_every": 0, **run},
        ),
    )
    for num_steps in [resume_at] * bool(resume_at) + [steps]:
        config.run = dataclasses.replace(config.run, steps=num_steps)
        assert run_stage2(config).exit_code == 0
    assert (out / "model" / "model.safetensors").exists()


def quantized_model_is_loaded_on_its_own_gpu(gpu: Gpu) -> None:
    """bitsandbytes itself is beyond the pretence; where Transformers would load to is not."""
    from unittest import mock

    from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

    class Seen(Exception):
        pass

    def spy(quantizer: Any, device_map: Any) -> None:
        raise Seen(original(quantizer, device_map)[""])

    original = Bnb8BitHfQuantizer.update_device_map
    with mock.patch.object(Bnb8BitHfQuantizer, "update_device_map", spy):
        try:
            stage2(gpu, model={"quantization": "8bit"})
        except Seen as seen:
            assert seen.args == (1,), f"LOCAL_RANK 1 loads the language model on {seen.args[0]}"
        else:
            raise AssertionError("nothing was loaded")


def mixed_rows(gpu: Gpu) -> None:
    """Text alone, several images, points and masks, straight into the model."""
    from cloc_mllm.mllm import build_mllm

    model, processor = build_mllm(mllm_config(region_features="roi"))
    model.to("cuda").train()
    pictures = [record.load_image() for record in scenes()]
    mask = torch.zeros(pictures[2].height, pictures[2].width, dtype=torch.bool)
    mask[5:20, 5:20] = True
    one = processor(
        pictures[1:4],
        ["<image>What is in <region>?"] * 3,
        [[[0.1, 0.1, 0.5, 0.5]], [mask], [[0.5, 0.5]]],
    ).to("cuda")
    model(**one, labels=one["input_ids"]).loss.backward()
    pairs = [[pictures[1], pictures[2]], [pictures[2], pictures[4]]]
    two = processor(pairs, ["<image><image>Where is the smaller crab?"] * 2).to("cuda")
    model(**two, labels=two["input_ids"]).loss.backward()
    ids = torch.tensor([processor.tokenize("Where is the smaller crab?")], device="cuda")
    model(input_ids=ids, labels=ids).loss.backward()


def tiny_llm(gpu: Gpu) -> None:
    from cloc_mllm.train.tiny_llm import run_tiny_llm

    config = TinyLlmConfig(width=32, layers=1, heads=2, mlp_width=32, num_scenes=16, num_bins=20)
    config.run = dataclasses.replace(
        config.run, output_dir=str(OUTPUT.new()), steps=2, global_batch_size=4, precision="bf16"
    )
    assert run_tiny_llm(config).exit_code == 0


# ---------------------------------------------------------------------------------------- inference


def grounding(gpu: Gpu, mllm: str = "tokens", device: str | None = None, **options: Any) -> None:
    from cloc_mllm.inference.chat import Chat, Sampling, answer_chat
    from cloc_mllm.inference.grounding_predictor import GroundingPredictor

    predictor = GroundingPredictor.from_pretrained(
        root() / f"mllm-{mllm}", device=device, **options
    )
    assert predictor.model.device == torch.device(device or "cuda:0")
    picture = scenes()[1].load_image()
    predictor.ground(picture, ["a crab", "the clock", "the smaller crab"]).boxes.to_pixels()
    predictor.refer(predictor.encode(picture), [[0.1, 0.1, 0.6, 0.6], [0.2, 0.2, 0.9, 0.9]])
    predictor.caption(picture)
    "".join(predictor.stream(picture, "Describe the image."))
    question = [{"type": "image"}, {"type": "text", "text": "Where is the crab?"}]
    chat = Chat([{"role": "user", "content": question}], [picture])
    for sampling in (
        Sampling(8),
        Sampling(8, temperature=0.7, top_p=0.9, seed=1),
        Sampling(8, stop=("a",)),
    ):
        answer_chat(predictor, chat, sampling, lambda piece: None)


def cloc(gpu: Gpu, kind: str = "prompter") -> None:
    from cloc_mllm.inference.cloc_predictor import ClocPredictor

    predictor = ClocPredictor.from_pretrained(root() / f"cloc-{kind}")
    assert isinstance(predictor.model.logit_scale, PretendCuda)
    image = predictor.encode(scenes()[0].load_image())
    boxes = [[0.1, 0.1, 0.5, 0.5], [0.4, 0.4, 0.8, 0.9]]
    predictor.embed_regions(image, boxes)
    predictor.classify(image, [*boxes, [0.3, 0.4]], ["crab", "clock"])
    predictor.locate(image, ["a crab", "a clock"]).boxes.xyxy.numpy()
    predictor.embed_image(scenes()[1].load_image())
    predictor.embed_text(["a crab"])


def evaluation(gpu: Gpu, kind: str = "prompter", **options: Any) -> None:
    from cloc_mllm.evaluation.config import EvalConfig
    from cloc_mllm.evaluation.run import evaluate

    config = EvalConfig(
        cloc=str(root() / f"cloc-{kind}"),
        mllm=str(root() / "mllm-tokens"),
        data=str(root() / "scenes"),
        output_dir=str(OUTPUT.new()),
        limit=4,
        bootstrap_samples=5,
        num_examples=0,
        **options,
    )
    evaluate(config)


def demo(gpu: Gpu) -> None:
    from cloc_mllm.demo.engine import DemoEngine
    from cloc_mllm.demo.pictures import example_pictures
    from cloc_mllm.demo.strokes import Stroke
    from cloc_mllm.inference.cloc_predictor import ClocPredictor
    from cloc_mllm.inference.grounding_predictor import GroundingPredictor

    engine = DemoEngine(
        ClocPredictor.from_pretrained(root() / "cloc-prompter"),
        GroundingPredictor.from_pretrained(root() / "mllm-tokens"),
    )
    picture, stroke = example_pictures()[0], Stroke("box", ((0.1, 0.1), (0.6, 0.6)))
    assert list(engine.ground(picture, ["a crab"])) and list(engine.name(picture, stroke, ["crab"]))


def serve(gpu: Gpu) -> None:
    """A request through the routes, answered in the model's own thread."""
    import base64
    import io

    from fastapi.testclient import TestClient

    from cloc_mllm.inference.grounding_predictor import GroundingPredictor
    from cloc_mllm.serve.app import build_app
    from cloc_mllm.serve.limits import Limits

    file = io.BytesIO()
    Image.new("RGB", (96, 48), "teal").save(file, "png")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "Where is the crab?"},
    ]
    predictor = GroundingPredictor.from_pretrained(root() / "mllm-tokens")
    with TestClient(build_app(predictor, "tiny", Limits())) as client:
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 7}
        response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text


def label(gpu: Gpu) -> None:
    from cloc_mllm.data.drop_log import DropLog
    from cloc_mllm.vesl.config import LabelConfig
    from cloc_mllm.vesl.shards import Shard
    from cloc_mllm.vesl.worker import ShardContent, ShardLabeller

    out = OUTPUT.new()
    out.mkdir()
    config = LabelConfig(
        images=str(root()),
        output_dir=str(out),
        detector="cloc",
        detector_model=str(root() / "cloc-prompter"),
        threshold=0.0,
    )
    ShardLabeller(config, out)(ShardContent(Shard(0, 0, len(scenes())), scenes(), DropLog()))


def export(gpu: Gpu) -> None:
    from cloc_mllm.models.build import load_cloc, save_cloc

    model, tokenizer, config = load_cloc(root() / "cloc-prompter", "cuda")
    out = OUTPUT.new()
    save_cloc(model, out, config, tokenizer)
    assert load_cloc(out)[0].logit_scale.device.type == "cpu"


# -------------------------------------------------------------------------------------------- waits


def waits_per_step(run: Callable[..., None], gpu: Gpu, **options: Any) -> float:
    """How often the host waits for the GPU in a step that neither logs nor saves."""
    counts = []
    for steps in (2, 6):
        gpu.reset()
        run(gpu, steps=steps, save_every=0, **options)
        counts.append(gpu.syncs + gpu.pageable)
    more = copy.copy(counts[1])
    more.subtract(counts[0])
    print("\n".join(f"{n / 4:6.2f}  {where}" for where, n in more.most_common() if n), flush=True)
    return sum(more.values()) / 4


def alignment(gpu: Gpu, steps: int, **run: Any) -> None:
    stage2(gpu, alignment=ALIGN | {"steps": steps}, **run)


def few_waits(gpu: Gpu, run: Callable[..., None], **options: Any) -> None:
    found = waits_per_step(run, gpu, **options)
    assert found <= 2, f"{found} waits per step"


Case = tuple[Callable[..., None], dict[str, Any]]
ALIGN = {"steps": 2, "global_batch_size": 4}
MEAN = {"readout": "mean"}

CASES: dict[str, Case] = {
    "stage1": (stage1, {"resume_at": 1}),
    "stage1 zero 1": (stage1, {"zero_stage": 1}),
    "stage1 zero 2 resumed": (stage1, {"zero_stage": 2, "resume_at": 1}),
    "stage1 zero 3 resumed, evaluation": (
        stage1,
        {"zero_stage": 3, "resume_at": 1, "data": {"validation": "scenes"}, "eval_every": 1},
    ),
    "stage1 muon resumed": (stage1, {"optim": {"optimizer": "muon"}, "resume_at": 1}),
    "stage1 micro, checkpointing": (
        stage1,
        {"micro_batch_size": 3, "gradient_checkpointing": True},
    ),
    "stage1 sigmoid, mean": (stage1, {"loss": "sigmoid", "prompter": MEAN}),
    "stage1 looks again": (stage1, {"prompter": {"box_looks": 2}}),
    "stage1 free form, noise, flip": (
        stage1,
        {
            "prompter": {"free_form": True, **MEAN},
            "data": {"free_form_share": 0.5, "label_noise": 0.1, "flip": True},
        },
    ),
    "stage1 roi_align": (stage1, {"prompter": {"kind": "roi_align"}}),
    "stage1 none": (stage1, {"prompter": {"kind": "none"}}),
    "stage1 worker": (stage1, {"data": {"num_workers": 1}}),
    "stage1 equals the CPU": (stage1_equals_the_cpu, {}),
    "stage2": (stage2, {"resume_at": 1}),
    "stage2 zero 2": (stage2, {"zero_stage": 2, "resume_at": 1}),
    "stage2 zero 3": (stage2, {"zero_stage": 3, "resume_at": 1}),
    "stage2 zero 3, prompter head": (
        stage2,
        {"zero_stage": 3, "model": {"box_head": True, "box_reader": "prompter"}},
    ),
    "stage2 whole, encoder learns": (
        stage2,
        {"model": {"lora": 0, "freeze_vision_encoder": False}},
    ),
    "stage2 fp32": (stage2, {"precision": "fp32"}),
    "stage2 box head, DoRA": (stage2, {"model": {"box_head": True, "variant": "dora"}}),
    "stage2 resampler, roi": (
        stage2,
        {"model": {"projector": "resampler", "region_features": "roi"}},
    ),
    "stage2 integers, coordinates": (
        stage2,
        {"model": {"box_format": "integers", "region_features": "coordinates"}},
    ),
    "stage2 tiles, smoothing": (stage2, {"model": {"max_tiles": 2, "coordinate_smoothing": 1.5}}),
    "stage2 not packed": (stage2, {"conversations": {"pack": False, "absent": 1.0}}),
    "stage2 alignment": (stage2, {"alignment": ALIGN, "gradient_checkpointing": True}),
    "stage2 feature cache": (stage2, {"data": {"feature_cache": "features"}, "alignment": ALIGN}),
    "stage2 mixed rows": (mixed_rows, {}),
    "tiny llm": (tiny_llm, {}),
    "grounding": (grounding, {}),
    "grounding bf16": (grounding, {"dtype": "bfloat16"}),
    "grounding box head": (grounding, {"mllm": "box_head"}),
    "grounding prompter head": (grounding, {"mllm": "prompter_head"}),
    "grounding integers": (grounding, {"mllm": "integers"}),
    "cloc prompter": (cloc, {}),
    "cloc roi_align": (cloc, {"kind": "roi_align"}),
    "cloc none": (cloc, {"kind": "none"}),
    "cloc mean": (cloc, {"kind": "mean"}),
    "evaluation": (evaluation, {}),
    "evaluation bf16, points": (evaluation, {"precision": "bf16", "region_prompt": "point"}),
    "demo": (demo, {}),
    "serve": (serve, {}),
    "label": (label, {}),
    "export": (export, {}),
    "waits of stage1": (few_waits, {"run": stage1}),
    "waits of stage1, micro-batches": (few_waits, {"run": stage1, "micro_batch_size": 3}),
    "waits of stage1, muon resumed": (
        few_waits,
        {"run": stage1, "optim": {"optimizer": "muon"}, "resume_at": 1},
    ),
    "waits of stage2": (few_waits, {"run": stage2}),
    "waits of stage2, box head, tiles": (
        few_waits,
        {"run": stage2, "model": {"box_head": True, "max_tiles": 2}},
    ),
    "waits of stage2, prompter head, tiles": (
        few_waits,
        {"run": stage2, "model": {"box_head": True, "box_reader": "prompter", "max_tiles": 2}},
    ),
    "waits of stage2, resampler, roi": (
        few_waits,
        {"run": stage2, "model": {"projector": "resampler", "region_features": "roi"}},
    ),
    "waits of stage2, integers, coordinates": (
        few_waits,
        {
            "run": stage2,
            "model": {"box_format": "integers", "region_features": "coordinates"},
        },
    ),
    "waits of stage2, whole, not packed": (
        few_waits,
        {
            "run": stage2,
            "model": {"lora": 0, "freeze_vision_encoder": False},
            "conversations": {"pack": False},
        },
    ),
    "waits of stage2, feature cache": (
        few_waits,
        {"run": stage2, "data": {"feature_cache": "features"}},
    ),
    "waits of alignment": (few_waits, {"run": alignment}),
}
SECOND: dict[str, Case] = {
    "second GPU: stage1": (stage1, {"resume_at": 1}),
    "second GPU: stage2": (stage2, {"resume_at": 1, "data": {"feature_cache": "features"}}),
    "second GPU: quantized": (quantized_model_is_loaded_on_its_own_gpu, {}),
    "second GPU: grounding": (grounding, {"device": "cuda:1"}),
}
RANKS: dict[str, Case] = {
    "two ranks: stage1 resumed": (stage1, {"resume_at": 1}),
    "two ranks: stage1 zero 2 resumed": (stage1, {"zero_stage": 2, "resume_at": 1}),
    "two ranks: stage1 zero 3": (stage1, {"zero_stage": 3}),
    "two ranks: stage1 muon": (stage1, {"optim": {"optimizer": "muon"}, "resume_at": 1}),
    "two ranks: stage2": (stage2, {"resume_at": 1}),
    "two ranks: stage2 zero 3": (stage2, {"zero_stage": 3, "resume_at": 1}),
    "two ranks: stage2 alignment": (stage2, {"alignment": ALIGN}),
    "two ranks: waits of stage1": (few_waits, {"run": stage1}),
    "two ranks: waits of stage2": (few_waits, {"run": stage2}),
    "two ranks: waits of stage2, box head": (
        few_waits,
        {"run": stage2, "model": {"box_head": True, "box_reader": "prompter"}},
    ),
    "two ranks: waits of alignment": (few_waits, {"run": alignment}),
}


def run_case(case: Case, num_devices: int) -> str:
    """The error of a case, "" if it has none."""
    function, options = case
    options = {key: _placed(value) for key, value in options.items()}
    try:
        with pretend_cuda(num_devices) as gpu:
            function(gpu, **options)
    except Exception:  # noqa: BLE001  a table of them is the purpose
        return traceback.format_exc()
    return ""


def _placed(options: Any) -> Any:
    """Names of folders as paths."""
    if not isinstance(options, dict):
        return options
    folders = ("validation", "feature_cache")
    return {k: str(root() / v) if k in folders else v for k, v in options.items()}


def run_all(cases: dict[str, Case], num_devices: int = 1) -> dict[str, str]:
    errors = {}
    for name, case in cases.items():
        errors[name] = run_case(case, num_devices)
        print(f"{name}: {errors[name].strip().splitlines()[-1] if errors[name] else 'ok'}")
        sys.stdout.flush()
    return errors


def run_ranks_of_two(output: Path, names: tuple[str, ...]) -> None:
    """One of two ranks, which writes what the cases came to."""
    OUTPUT.made = 1000  # the folders before are those of one rank
    errors = run_all(_named(RANKS, names), num_devices=2)
    (output.parent / f"rank{os.environ['RANK']}.json").write_text(json.dumps(errors))


def _named(cases: dict[str, Case], names: tuple[str, ...]) -> dict[str, Case]:
    return {k: v for k, v in cases.items() if not names or k.startswith(names)}


def main() -> None:
    from tests.distributed.ranks import run_ranks

    output, names = Path(sys.argv[1]), tuple(sys.argv[2:])
    os.environ["PRETENDED_ROOT"] = str(root())
    write_inputs()
    errors = run_all(_named(CASES, names))
    os.environ["LOCAL_RANK"] = "1"
    errors |= run_all(_named(SECOND, names), num_devices=2)
    if _named(RANKS, names):
        run_ranks(partial(run_ranks_of_two, output, names), num_ranks=2)
        for rank in range(2):
            found = json.loads((output.parent / f"rank{rank}.json").read_text())
            errors |= {k: errors.get(k, "") + v for k, v in found.items()}
    output.write_text(json.dumps(errors))


if __name__ == "__main__":
    main()
