"""A training step of CLOC (M = 4) and of our plain CLIP against open_clip's own CLIP step, on the
same weights, images and texts; and the regions' text at its real length against padded.

    python eval/bench/step.py --data runs/data/flickr8k-val --output runs/bench/step.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.config import ModelConfig, OptimConfig, PrompterConfig, Stage1Config
from cloc_mllm.data.collate import ClocBatch, ClocCollator
from cloc_mllm.data.parquet import load_records
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.data.tokenizer import TextTokenizer, load_text_tokenizer
from cloc_mllm.data.transforms import Preprocessing
from cloc_mllm.models.build import build_cloc
from cloc_mllm.models.clip_config import ResolvedModel, resolve_model
from cloc_mllm.models.cloc import Cloc
from cloc_mllm.train.optim import build_optimizer, param_groups
from cloc_mllm.train.stage1 import stage1_step
from ratio import interleaved_ratio, machine_state, report, save_samples

_OPTIM = OptimConfig(lr=1e-5)
# by device; the kernels of a GPU sum in another order (not measured yet)
_LOSS_TOLERANCE = {"cpu": 1e-5, "cuda": 1e-4}
_PROMPTERS = {"clip": PrompterConfig(kind="none"), "cloc": PrompterConfig()}


def read_batch(
    data: str, num_images: int, tokenizer: TextTokenizer, image_size: int, device: str = "cpu"
) -> ClocBatch:
    """The first records of `data` that have a caption and a region, or of the built-in scenes."""
    source = load_records(data) if data else generate_scenes(num_images, split="train", seed=0)
    records = (record for record in source if record.captions and record.regions)
    items = list(zip(range(num_images), records, strict=False))
    collator = ClocCollator(tokenizer, Preprocessing(image_size), regions_per_image=4)
    return collator(items).to(device)


class OpenClipStep:
    """One step in the order of open_clip's trainer, captions padded to the context length."""

    def __init__(self, architecture: str, batch: ClocBatch, *, bf16: bool) -> None:
        import open_clip

        assert isinstance(batch.pixel_values, Tensor)
        self.device = batch.pixel_values.device
        model: Any = open_clip.create_model(architecture, output_dict=True)
        self.model = model.to(self.device).train()
        self.loss = open_clip.ClipLoss()
        self.optimizer = torch.optim.AdamW(param_groups(self.model, _OPTIM), betas=_OPTIM.betas)
        self.pixel_values, self.bf16 = batch.pixel_values, bf16
        self.texts = pad_texts(batch.caption_input_ids, self.model.context_length)

    def forward(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.loss(**self.model(self.pixel_values, self.texts))

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.forward().backward()
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, 4.6052)


class ClocStep:
    """One step of stage 1, with the check that the gradient is finite."""

    def __init__(
        self, config: ResolvedModel, tokenizer: TextTokenizer, batch: ClocBatch, *, bf16: bool
    ) -> None:
        self.device = batch.pixel_values.device
        self.model = build_cloc(config, tokenizer).to(self.device).train()
        self.step_fn = stage1_step(Stage1Config(model=config))
        self.optimizer = build_optimizer(self.model, _OPTIM)
        self.batch, self.bf16 = batch, bf16

    def forward(self) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.step_fn(self.model, self.batch)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.forward()["loss"].backward()
        nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.optimizer.step()


def copy_towers(theirs: Any, ours: Cloc) -> None:
    """The weights of an open_clip CLIP into a CLOC's two towers."""
    from open_clip.model import convert_to_custom_text_state_dict

    state = convert_to_custom_text_state_dict(theirs.state_dict())
    for prefix, tower in (("visual.", ours.vision.encoder.visual), ("text.", ours.text.text)):
        tower.load_state_dict(
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        )


def matched_steps(
    architecture: str, batch: ClocBatch, tokenizer: TextTokenizer, prompter: str, *, bf16: bool
) -> tuple[ClocStep, OpenClipStep]:
    """Both sides with the same weights in their towers.

    Raises:
        ValueError: in float32 the CLIP losses differ by more than `_LOSS_TOLERANCE`.
    """
    torch.manual_seed(0)
    theirs = OpenClipStep(architecture, batch, bf16=False)
    assert isinstance(batch.pixel_values, Tensor)
    side = batch.pixel_values.shape[-1]
    given = ModelConfig(architecture, image_size=side, prompter=_PROMPTERS[prompter])
    config = resolve_model(given)
    ours = ClocStep(config, tokenizer, batch, bf16=False)
    copy_towers(theirs.model, ours.model)
    with torch.no_grad():
        difference = float(abs(ours.forward()["clip"] - theirs.forward()))
    if difference > _LOSS_TOLERANCE[ours.device.type]:
        raise ValueError(f"CLIP losses differ by {difference}; nothing to compare")
    ours.bf16 = theirs.bf16 = bf16
    return ours, theirs


def region_text(
    model: Cloc, batch: ClocBatch, *, bf16: bool
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """(distinct phrases at their real length, each region's phrase padded to the context length):
    features of all regions' phrases with their backward pass."""
    padded = pad_texts(batch.phrase_input_ids[batch.region_phrase_index], 77)

    def run(encode: Callable[[], Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            features = encode()
        features.float().square().mean().backward()
        return features.detach()

    def distinct() -> Tensor:
        return model.text.encode_groups(batch.phrase_input_ids)[0][batch.region_phrase_index]

    return lambda: run(distinct), lambda: run(lambda: model.encode_text(padded))


def pad_texts(input_ids: Tensor, length: int) -> Tensor:
    return F.pad(input_ids, (0, length - input_ids.shape[1]))


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="step", description=__doc__)
    parser.add_argument("--data", default="", help="records; built-in scenes if left out")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--architecture", default="ViT-B-16")
    parser.add_argument("--precisions", nargs="+", choices=["bf16", "fp32"], default=["bf16"])
    parser.add_argument("--models", nargs="*", default=["clip", "cloc"])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--output", default="runs/bench/step.json")
    args = parser.parse_args(argv)
    machine, results = machine_state(), {}
    print(machine)
    tokenizer = load_text_tokenizer(f"open_clip:{args.architecture}")
    batch = read_batch(args.data, args.images, tokenizer, image_size=224)
    print(
        f"{len(batch.pixel_values)} images, {len(batch.boxes)} regions, "
        f"{len(batch.phrase_input_ids)} distinct phrases"
    )
    for precision in args.precisions:
        bf16 = precision == "bf16"
        for name in args.models:
            sides = matched_steps(args.architecture, batch, tokenizer, name, bf16=bf16)
            title = f"{name} / open_clip, {precision}"
            results[title] = interleaved_ratio(*sides, pairs=args.pairs, warmups=1)
            print(report(title, results[title]), flush=True)
        model = matched_steps(args.architecture, batch, tokenizer, "clip", bf16=bf16)[0].model
        ours, theirs = region_text(model, batch, bf16=bf16)
        atol, rtol = (0.1, 0.0) if bf16 else (None, None)
        torch.testing.assert_close(ours(), theirs(), atol=atol, rtol=rtol)
        title = f"region text: real length / padded, {precision}"
        results[title] = interleaved_ratio(ours, theirs, pairs=args.pairs, warmups=1)
        print(report(title, results[title]), flush=True)
    save_samples(args.output, machine, results)


if __name__ == "__main__":
    sys.exit(run(main))
