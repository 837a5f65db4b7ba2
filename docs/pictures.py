"""Draws the pictures of explanation/pictures.md: `python docs/pictures.py` in a clone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.patches
import torch
import torch.nn.functional as F
from matplotlib import pyplot
from PIL import Image, ImageDraw

from cloc_mllm import Boxes, ClocPredictor
from cloc_mllm.data.example_photos import example_photos
from cloc_mllm.geometry import CanvasTransform
from cloc_mllm.shipped import ASSETS

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
EXAMPLES = ASSETS / "photos" / "examples"
INK, BLUE, PALE, RED = "#1c2330", "#1f5f99", "#dceaf6", "#c0392b"


def save(figure: Any, name: str) -> None:
    figure.savefig(IMAGES / name, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def architecture() -> None:
    """Figure 2 of the paper by the names of the files."""
    figure, axes = pyplot.subplots(figsize=(9, 3.6))
    axes.set(xlim=(0, 9), ylim=(0, 3.6))
    axes.axis("off")

    def box(x: float, y: float, text: str, color: str = PALE) -> None:
        axes.add_patch(
            matplotlib.patches.FancyBboxPatch(
                (x, y), 1.5, 0.6, boxstyle="round,pad=0.05", facecolor=color, edgecolor=BLUE
            )
        )
        axes.text(x + 0.75, y + 0.3, text, ha="center", va="center", fontsize=9, color=INK)

    def arrow(start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": INK})
        middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.1
        axes.text(*middle, text, ha="center", fontsize=8, color=INK)

    box(0.1, 2.7, "image", "white")
    box(0.1, 1.6, "box or phrase", "white")
    box(0.1, 0.6, "caption, phrases", "white")
    box(2.2, 2.7, "vision_encoder")
    box(4.3, 1.8, "prompter")
    box(2.2, 0.6, "text_encoder")
    box(5.2, 0.1, "box_head")
    box(7.3, 2.7, "$L_{CLIP}$", "white")
    box(7.3, 1.7, "$L_{CLOC}$", "white")
    box(7.3, 0.1, "$L_{grounding}$", "white")
    arrow((1.65, 3.0), (2.15, 3.0))
    arrow((3.75, 3.0), (7.25, 3.0), "pooled feature")
    arrow((3.75, 2.75), (4.5, 2.45), "tokens")
    arrow((1.65, 1.9), (4.25, 2.05), "prompt")
    arrow((1.65, 0.9), (2.15, 0.9))
    arrow((5.85, 2.1), (7.25, 2.05), "region embedding z")
    arrow((5.6, 1.75), (5.95, 0.75))
    arrow((6.75, 0.4), (7.25, 0.4))
    arrow((3.75, 1.0), (7.25, 1.8), "text features")
    save(figure, "architecture.svg")


def frames() -> None:
    """One box in the frame of the photo and in that of the canvas."""
    photo = Image.open(EXAMPLES / "bus.jpg").convert("RGB")
    found = ClocPredictor.from_pretrained("photos").locate(photo, ["the bus"])
    transform = CanvasTransform(*photo.size, 224)
    canvas = transform.apply(photo, (128, 128, 128))
    on_canvas = transform.to_canvas(found.boxes)
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.8))
    for ax, picture, boxes, title in (
        (axes[0], photo, found.boxes, "original"),
        (axes[1], canvas, on_canvas, "canvas"),
    ):
        numbers = boxes.xyxy[0].tolist()
        sides = [*picture.size, *picture.size]
        drawn = picture.copy()
        corners = [n * side for n, side in zip(numbers, sides, strict=True)]
        ImageDraw.Draw(drawn).rectangle(corners, outline=RED, width=max(2, picture.width // 120))
        ax.imshow(drawn)
        ax.set_title(f"{title}: " + " ".join(f"{n:.2f}" for n in numbers), fontsize=10)
        ax.axis("off")
    figure.savefig(IMAGES / "frames.jpg", bbox_inches="tight", dpi=90)
    pyplot.close(figure)


def photos() -> None:
    """What the shipped model finds on the example photos, in two rows of one width."""
    cloc = ClocPredictor.from_pretrained("photos")
    drawn = [
        cloc.locate(record.image, [region.phrase for region in record.regions]).draw()
        for record in example_photos()
    ]
    width, gap, rows = 1280, 5, []
    for row in (drawn[:4], drawn[4:]):
        shapes = [picture.width / picture.height for picture in row]
        height = round((width - gap * (len(row) - 1)) / sum(shapes))
        rows.append(
            [
                picture.resize((round(height * s), height))
                for picture, s in zip(row, shapes, strict=True)
            ]
        )
    sheet = Image.new("RGB", (width, sum(row[0].height for row in rows) + gap), "white")
    y = 0
    for row in rows:
        x = 0
        for picture in row:
            sheet.paste(picture, (x, y))
            x += picture.width + gap
        y += row[0].height + gap
    sheet.save(IMAGES / "photos.jpg", quality=88)


def loss() -> None:
    """Cosines of regions and phrases of the example photos: L_CLOC wants a bright diagonal."""
    cloc = ClocPredictor.from_pretrained("photos")
    regions, phrases = [], []
    for entry in json.loads((EXAMPLES / "photos.json").read_text(encoding="utf-8"))[:8]:
        region = entry["regions"][0]
        photo = Image.open(EXAMPLES / entry["file"])
        regions.append(cloc.embed_regions(photo, Boxes.normalized([region["box"]])))
        phrases.append(region["phrase"])
    z = F.normalize(torch.cat(regions), dim=-1)
    cosines = z @ F.normalize(cloc.embed_text(phrases), dim=-1).T
    figure, ax = pyplot.subplots(figsize=(5.4, 4.4))
    shown = ax.imshow(cosines.numpy(), cmap="Blues")
    ax.set_xticks(range(len(phrases)), phrases, rotation=40, ha="right", fontsize=8)
    ax.set_yticks(range(len(phrases)), [f"box of {phrase}" for phrase in phrases], fontsize=8)
    figure.colorbar(shown, label="cosine")
    save(figure, "loss.svg")
    right = (cosines.argmax(1) == torch.arange(len(phrases))).sum()
    print(f"the own phrase is the closest of {int(right)} of {len(phrases)} regions")


def cost() -> None:
    """FLOPs of the Prompter over those of a ViT-B/16, computed from shapes."""
    sys.path.insert(0, str(ROOT / "eval" / "bench"))
    import scale

    shapes = scale.Shapes.of("ViT-B-16", 224)
    tower, n, d = scale.image_tower_flops(shapes), shapes.num_tokens, shapes.width
    counts = [1, 2, 4, 8, 16, 32]
    whole = [2 * m * n * (24 * d**2 + 4 * n * d) / tower for m in counts]
    shared = [scale.prompter_flops(shapes, m) / tower for m in counts]
    figure, ax = pyplot.subplots(figsize=(5.4, 3.4))
    for values, color, label in (
        (whole, RED, "the layer over all tokens, per prompt"),
        (shared, BLUE, "keys and values shared, prompts alone read out"),
    ):
        ax.plot(counts, [100 * value for value in values], "o-", color=color, label=label)
    ax.set(xlabel="regions per image", ylabel="% of the image tower", yscale="log", xscale="log")
    ax.set_xticks(counts, counts)
    ax.legend(fontsize=8)
    save(figure, "cost.svg")
    for m, a, b in zip(counts, whole, shared, strict=True):
        print(f"{m} regions: {100 * a:.0f} % of the tower, shared {100 * b:.1f} %")


if __name__ == "__main__":
    pyplot.switch_backend("agg")
    matplotlib.rcParams["svg.hashsalt"] = "cloc-mllm"  # the same picture gives the same file
    architecture()
    frames()
    photos()
    loss()
    cost()
