"""The chats of the real run: written, read back by `data build`, and nothing of them is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from cloc_mllm import cli
from cloc_mllm.data.parquet import load_chats
from flickr8k_chats import main

SENTENCES = """\
[/EN#1/people Two men] hold [/EN#2/other a rope] in [/EN#3/scene the park] .
[/EN#1/people The guys] and [/EN#2/other the rope] .
"""
OBJECT = "<object><name>{}</name><bndbox>{}</bndbox></object>"
CORNERS = "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"
BOXES = {"1": [(10, 10, 100, 200), (120, 20, 220, 200)], "2": [(50, 60, 200, 90)]}
NUM = 5  # chats of each layout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flickr")
    for name in ("Annotations", "Sentences", "images"):
        (folder / name).mkdir()
    objects = "".join(
        OBJECT.format(chain, CORNERS.format(*box))
        for chain, boxes in BOXES.items()
        for box in boxes
    )
    size = "<size><width>250</width><height>250</height></size>"
    for number in range(2 * NUM + NUM // 5):
        (folder / "Annotations" / f"{number}.xml").write_text(
            f"<annotation>{size}{objects}</annotation>"
        )
        (folder / "Sentences" / f"{number}.txt").write_text(SENTENCES)
        Image.new("RGB", (250, 250), "green").save(folder / "images" / f"{number}.jpg")
    build = ["data", "build", "flickr30k-entities", "--annotations", str(folder)]
    images = ["--images", str(folder / "images"), "--output_dir", str(folder / "records")]
    assert cli.main([*build, *images]) == 0
    records, chats = str(folder / "records"), str(folder / "chats")
    options = ["--records", records, "--num", str(NUM), "--output_dir", chats]
    assert main(["--annotations", str(folder), *options]) == 0
    return folder


@pytest.mark.parametrize("layout", ["llava", "ferret"])
def test_every_chat_and_box_is_read(source: Path, layout: str, tmp_path: Path) -> None:
    frame = ["--frame", "original"] if layout == "llava" else []
    rows = ["--rows", str(source / "chats" / f"{layout}.jsonl")]
    out = ["--images", str(source / "images"), "--output_dir", str(tmp_path / "set")]
    assert cli.main(["data", "build", layout, *frame, *rows, *out]) == 0
    assert not (tmp_path / "set" / "drops.jsonl").read_text()
    chats = load_chats(tmp_path / "set")[:]
    assert len(chats) == NUM
    assert [len(chat.images) for chat in chats] == [2 if layout == "llava" else 1] + [1] * (NUM - 1)
    places = [box for chat in chats for place in chat.places for box in place.boxes]
    true = [tuple(value / 250 for value in box) for boxes in BOXES.values() for box in boxes]
    assert places and all(any(box == pytest.approx(t, abs=0.002) for t in true) for box in places)
