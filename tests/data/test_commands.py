from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from cloc_mllm.data.commands import build_parser, main
from cloc_mllm.data.parquet import load_records, read_manifest, write_records
from cloc_mllm.data.records import Record


@pytest.fixture
def built(tiny_scenes: list[Record], tmp_path: Path) -> Path:
    write_records(tiny_scenes, tmp_path / "data")
    return tmp_path / "data"


def test_build_scenes(
    tiny_scenes: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scenes"
    assert main(["build", "scenes", "--num", "16", "--out", str(out), "--shard-size", "10"]) == 0
    assert list(load_records(out, verify=True)) == tiny_scenes
    assert "records:            16 kept         0 dropped" in capsys.readouterr().out
    arguments = read_manifest(out)["arguments"]
    assert (arguments["source"], arguments["seed"], arguments["split"]) == ("scenes", 0, "train")


def test_workers_do_not_change_the_scenes(tmp_path: Path) -> None:
    shards = []
    for workers in ("1", "2"):
        out = tmp_path / workers
        main(["build", "scenes", "--num", "10", "--out", str(out), "--workers", workers])
        shards.append((out / "shard-00000.parquet").read_bytes())
    assert shards[0] == shards[1]


def write_coco(folder: Path, num_photos: int, num_present: int) -> list[str]:
    images = [
        {"id": i, "file_name": f"{i}.jpg", "width": 9, "height": 9} for i in range(num_photos)
    ]
    annotations = [{"image_id": 0, "category_id": 1, "bbox": [1, 1, 5, 5]}]
    table = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}
    (folder / "coco.json").write_text(json.dumps(table))
    (folder / "images").mkdir()
    for i in range(num_present):
        Image.new("RGB", (9, 9)).save(folder / "images" / f"{i}.jpg")
    return ["--instances", str(folder / "coco.json"), "--images", str(folder / "images")]


def test_too_many_drops_fail_the_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_coco(tmp_path, num_photos=4, num_present=3)
    out = tmp_path / "data"
    with pytest.raises(ValueError, match=r"1 records \(25.0%\) were dropped, at most 5.0% may be"):
        main(["build", "coco", *source, "--out", str(out)])
    assert "3 kept         1 dropped (missing_image 1)" in capsys.readouterr().out
    assert not out.exists()
    report = (tmp_path / "data.drops.jsonl").read_text()
    found = "3.jpg; there are 3 image files, such as 0.jpg"
    drop = {"kind": "record", "id": "3", "reason": "missing_image", "found": found}
    assert json.loads(report) == drop
    assert main(["build", "coco", *source, "--out", str(out), "--max_drop_share", "0.25"]) == 0
    assert len(load_records(out)) == 3


def test_build_refcoco_and_flickr_from_real_data(shared_data: Path, tmp_path: Path) -> None:
    refcoco = shared_data / "refcoco-mini"
    paths = ["--rows", str(refcoco / "refcoco_val.json"), "--images"]
    paths += [str(refcoco / "images-val.tar"), "--max_drop_share", "1"]
    assert main(["build", "refcoco", *paths, "--out", str(tmp_path / "refcoco")]) == 0
    assert len(load_records(tmp_path / "refcoco")) == 78

    flickr = shared_data / "flickr8k-entities"
    (tmp_path / "ids.txt").write_text("\n".join((flickr / "val.txt").read_text().split()[:5]))
    paths = ["--annotations", str(flickr / "annotations.zip"), "--ids", str(tmp_path / "ids.txt")]
    paths += ["--images", str(flickr / "images-val.tar"), "--out", str(tmp_path / "flickr")]
    assert main(["build", "flickr30k-entities", *paths]) == 0
    assert len(load_records(tmp_path / "flickr")) == 5


def test_stats(built: Path, tiny_scenes: list[Record], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", str(built)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["records", "16"]
    num_regions = sum(len(record.regions) for record in tiny_scenes)
    assert ["regions", str(num_regions)] in [line.split() for line in lines]


def test_stats_of_a_damaged_set_fail(built: Path) -> None:
    shard = built / "shard-00000.parquet"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="differs from its manifest"):
        main(["stats", str(built)])


def test_inspect_draws_a_sheet(built: Path, tmp_path: Path) -> None:
    for name, seed in (("a.png", "0"), ("b.png", "0"), ("c.png", "1")):
        arguments = ["--out", str(tmp_path / name), "--num", "2", "--seed", seed]
        assert main(["inspect", str(built), *arguments]) == 0
    first, again, other = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert first == again
    assert first != other
    assert Image.open(tmp_path / "a.png").width > 2 * 640


def all_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from all_parsers(below)


def test_options_are_of_one_style() -> None:
    for parser in all_parsers(build_parser()):
        options = [name for action in parser._actions for name in action.option_strings]
        names = [name for name in options if name.startswith("--")]
        assert [name for name in names if "-" in name[2:]] == []
        if "--output_dir" in names:  # so that --out stays its short form
            assert [name for name in names if name.startswith("--out")] == ["--output_dir"]


@pytest.mark.parametrize("option", ["--out", "--output_dir", "--output-dir"])
def test_a_directory_however_its_option_is_typed(option: str, tmp_path: Path) -> None:
    out = str(tmp_path / "a")
    assert main(["build", "scenes", "--num", "2", option, out]) == 0
    assert main(["merge", out, option, str(tmp_path / "b")]) == 0
    assert main(["split", out, option, str(tmp_path / "c"), "--parts", "all=1"]) == 0
    assert main(["export", "coco", out, option, str(tmp_path / "d")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "d"]


def test_every_source_shares_its_options() -> None:
    (build,) = [p for p in all_parsers(build_parser()) if p.prog == "cloc-mllm data build"]
    for parser in list(all_parsers(build))[1:]:
        options = {name for action in parser._actions for name in action.option_strings}
        assert {"--output_dir", "--max_drop_share", "--allow_no_regions"} <= options
        if not parser.prog.endswith("scenes"):
            assert {"--encoding", "--boxes_of"} <= options


def test_what_was_dropped_is_shown_with_shares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_coco(tmp_path, num_photos=4, num_present=3)
    out = str(tmp_path / "data")
    assert main(["build", "coco", *source, "--out", out, "--max-drop-share=0.25"]) == 0
    capsys.readouterr()
    assert main(["validate", out]) == 0, "what the build stated is no new fault"
    assert "1 records of 4, 25.0% (missing_image 1)" in capsys.readouterr().out
    assert main(["stats", out]) == 0
    assert "1 records of 4, 25.0% (missing_image 1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["build"], ["build", "scenes"], ["build", "scenes", "--out", "x", "--num", "0"], ["stats"]],
)
def test_wrong_arguments_exit_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: cloc-mllm data" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["build"], ["build", "coco"], ["stats"], ["inspect"]])
def test_help_reads(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "usage: cloc-mllm data" in capsys.readouterr().out


@pytest.mark.parametrize(
    "source", ["cvat", "label-studio", "labelme", "via", "open-images", "hf-objects", "csv", "coco"]
)
def test_sources_show_an_example(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["build", source, "--help"])
    assert f"example:\n  cloc-mllm data build {source} --" in capsys.readouterr().out
