"""The Prompter's cost, 4 boxes and 4 texts per image, as a share of the image tower it sits on.

    python eval/bench/prompter.py --output runs/bench/prompter.json

That every form equals a whole transformer layer for each prompt is tested in
`tests/models/region_encoders/`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.config import ModelConfig, PrompterConfig
from cloc_mllm.data.tokenizer import load_text_tokenizer
from cloc_mllm.models.build import build_cloc
from cloc_mllm.models.clip_config import resolve_model
from cloc_mllm.models.cloc import ClocVision
from cloc_mllm.models.region_encoders import RegionPrompts
from ratio import interleaved_ratio, machine_state, report, save_samples

PROMPTS = 4  # boxes, and texts, of each image
FORMS = {
    "prompt readout, box prior": PrompterConfig(spatial_prior="box"),
    "prompt readout, box and text prior (default)": PrompterConfig(),
    "prompt readout, both priors, text prior region": PrompterConfig(text_prior="region"),
    "prompt readout, both priors, text prior region, width 256": PrompterConfig(
        text_prior="region", width=256
    ),
    "mean readout, no prior (paper)": PrompterConfig(readout="mean", spatial_prior="none"),
    "mean readout, both priors, text prior region": PrompterConfig(
        readout="mean", text_prior="region"
    ),
}


def build_vision(architecture: str, form: str) -> ClocVision:
    torch.manual_seed(0)
    config = resolve_model(ModelConfig(architecture, image_size=224, prompter=FORMS[form]))
    return build_cloc(config, load_text_tokenizer(f"open_clip:{architecture}")).vision


def make_inputs(vision: ClocVision, num_images: int) -> dict[str, Tensor]:
    """Random pixels, boxes and text features with `PROMPTS` of each an image."""
    generator = torch.Generator().manual_seed(0)
    num_prompts, side = num_images * PROMPTS, vision.encoder.image_size
    corner, extent = torch.rand(2, num_prompts, 2, generator=generator) / 2
    return {
        "pixel_values": torch.randn(num_images, 3, side, side, generator=generator),
        "boxes": torch.cat([corner, corner + extent], 1),
        "texts": torch.randn(num_prompts, vision.embed_dim, generator=generator),
        "image_index": torch.arange(num_images).repeat_interleave(PROMPTS),
    }


def prompter_and_tower(
    vision: ClocVision, inputs: dict[str, Tensor], *, bf16: bool, backward: bool
) -> tuple[Callable[[], None], Callable[[], None]]:
    """(the region side on given tokens, the image tower alone), forward or with backward."""
    with torch.no_grad():
        image = vision.encode_image(inputs["pixel_values"])
    image = image._replace(tokens=image.tokens.requires_grad_())

    no_masks, none_masked = torch.zeros(0, 1, 1), torch.zeros(0, dtype=torch.long)
    prompts = RegionPrompts(inputs["boxes"], inputs["image_index"], no_masks, none_masked)

    def regions() -> Tensor:
        z, located = vision.region_encoder(image, prompts, inputs["texts"])
        assert located is not None
        return z.sum() + located.sum()

    def run(call: Callable[[], Tensor]) -> None:
        with (
            torch.set_grad_enabled(backward),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        ):
            result = call()
        if backward:
            result.float().backward()

    visual = vision.encoder.visual
    return lambda: run(regions), lambda: run(lambda: visual(inputs["pixel_values"]).sum())


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="prompter", description=__doc__)
    parser.add_argument("--architecture", default="ViT-B-16")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--precisions", nargs="+", choices=["bf16", "fp32"], default=["fp32"])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), help=", ".join(FORMS))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--output", default="runs/bench/prompter.json")
    args = parser.parse_args(argv)
    machine, results = machine_state(), {}
    print(machine)
    for form in args.forms:
        vision = build_vision(args.architecture, form)
        inputs = make_inputs(vision, args.images)
        for precision in args.precisions:
            for backward in (False, True):
                sides = prompter_and_tower(
                    vision, inputs, bf16=precision == "bf16", backward=backward
                )
                passes = "forward + backward" if backward else "forward"
                title = f"{form}, {precision}, {passes}"
                results[title] = interleaved_ratio(*sides, pairs=args.pairs, warmups=1)
                share = f"{results[title].cpu.median:.1%} of the tower's CPU time"
                print(f"{report(title, results[title])}: {share}", flush=True)
    save_samples(args.output, machine, results)


if __name__ == "__main__":
    sys.exit(run(main))
