from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from cloc_mllm.data.checks.doctor import boxes_in
from cloc_mllm.data.checks.fetch_report import read_fetch_report
from cloc_mllm.data.checks.frames import Case, diagnose, resized_wh, to_pixels
from cloc_mllm.data.checks.leaks import find_leaks, fingerprint, id_key
from cloc_mllm.data.checks.validate import check_record
from cloc_mllm.data.commands import main
from cloc_mllm.data.drawing import PALETTE
from cloc_mllm.data.parquet import write_records
from cloc_mllm.data.records import DropLog, Record, Region
from tests.data.formats import painted_records, write_lines
from tests.photos import encoded

# doctor

SIZES = [(640, 480), (480, 640), (500, 375), (333, 500), (640, 427)]


def make_cases(frame: str, with_truth: bool, num_boxes: int = 200) -> list[Case]:
    """Boxes as people draw them (some cut by the far border), written in `frame`."""
    rng = np.random.default_rng(0)
    cases = []
    for index in range(num_boxes):
        width, height = SIZES[index % len(SIZES)]
        x, y = rng.uniform(0, 0.7, 2)
        w, h = rng.uniform(0.1, 0.3, 2)
        right = 1.0 if rng.random() < 0.15 else x + w
        bottom = 1.0 if rng.random() < 0.15 else y + h
        truth = (x * width, y * height, right * width, bottom * height)
        numbers = written(truth, frame, width, height)
        cases.append(Case(numbers, (width, height), truth if with_truth else None))
    return cases


def written(truth: Any, frame: str, width: int, height: int) -> Any:
    """The inverse of the frame, from its definition."""
    x1, y1, x2, y2 = truth
    if frame == "pixels":
        return truth
    if frame.startswith("resized"):
        across, down = resized_wh((width, height))
        return x1 / width * across, y1 / height * down, x2 / width * across, y2 / height * down
    scale = float(frame.split()[0].removeprefix("0.."))
    if frame.endswith("padded"):
        side, left, top = max(width, height), 0.0, 0.0
        left, top = (side - width) / 2, (side - height) / 2
        numbers = [(x1 + left) / side, (y1 + top) / side, (x2 + left) / side, (y2 + top) / side]
    else:
        numbers = [x1 / width, y1 / height, x2 / width, y2 / height]
    values = [value * scale for value in numbers]
    return tuple(values) if scale == 1 else tuple(map(round, values))


FRAMES = [
    "pixels",
    "resized pixels (Qwen2.5-VL)",
    "0..1",
    "0..1 padded",
    "0..999",
    "0..1000",
    "0..1000 padded",
]


@pytest.mark.parametrize("frame", FRAMES)
def test_a_frame_is_its_definition(frame: str) -> None:
    truth = (100.0, 50.0, 300.0, 400.0)
    numbers = written(truth, frame, 640, 480)
    assert to_pixels(frame, numbers, (640, 480)) == pytest.approx(truth, abs=0.4)


@pytest.mark.parametrize("frame", [f for f in FRAMES if not f.startswith("resized")])
def test_doctor_without_truth(frame: str) -> None:
    diagnosis = diagnose(make_cases(frame, with_truth=False))
    assert frame in diagnosis.frames
    alike = {"pixels", "resized pixels (Qwen2.5-VL)"} if frame == "pixels" else {frame}
    assert set(diagnosis.frames) <= alike


@pytest.mark.parametrize("frame", FRAMES)
def test_doctor_with_truth(frame: str) -> None:
    diagnosis = diagnose(make_cases(frame, with_truth=True))
    assert diagnosis.frames[0] == frame
    unlike = set(FRAMES) - {"pixels", "resized pixels (Qwen2.5-VL)"}
    assert len(diagnosis.frames) == 1 or not set(diagnosis.frames) & unlike
    (best,) = [item for item in diagnosis.evidence if item.frame == frame]
    assert best.mean_iou > 0.98


def test_doctor_finds_width_and_height() -> None:
    cases = make_cases("pixels", with_truth=False)
    moved = []
    for case in cases:
        x1, y1, x2, y2 = case.numbers
        moved.append(Case((x1, y1, x2 - x1, y2 - y1), case.size))
    diagnosis = diagnose(moved)
    assert (diagnosis.order, diagnosis.frames[0]) == ("xywh", "pixels")


def test_doctor_does_not_guess() -> None:
    few = diagnose([Case((0.4, 0.4, 0.6, 0.6), (64, 64))])
    assert few.frames == []
    unsized = diagnose([Case(c.numbers) for c in make_cases("0..1", with_truth=False)])
    assert unsized.frames == ["0..1", "0..1 padded"]
    wrong = [replace(case, truth=(0, 0, 1, 1)) for case in make_cases("pixels", True)]
    assert diagnose(wrong).frames == []
    with pytest.raises(ValueError, match="no box to judge"):
        diagnose([])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '```json\n[{"bbox_2d": [14, 135, 136, 470], "label": "man 2"}]\n```',
            [(14, 135, 136, 470)],
        ),
        ("<ref>a</ref><box>(12,34),(56,78)</box>", [(12, 34, 56, 78)]),
        (
            "The man [0.2, 0.0, 0.9, 0.7] on [0.1,0.2,0.3,0.4].",
            [(0.2, 0, 0.9, 0.7), (0.1, 0.2, 0.3, 0.4)],
        ),
        ("[12, 34]", []),
        ("no box", []),
    ],
)
def test_boxes_in_text(text: str, expected: list[Any]) -> None:
    assert boxes_in(text) == expected


def test_doctor_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for record in painted_records()[:3] * 8:
        (tmp_path / f"{record.id}.png").write_bytes(record.image)
        box = [
            value * side
            for value, side in zip(
                record.regions[0].box, (record.width, record.height) * 2, strict=True
            )
        ]
        rows.append({"image": f"{record.id}.png", "answer": f"it is at {box}", "truth": box})
    write_lines(tmp_path / "rows.jsonl", [*rows, {"answer": "I see no cat"}])
    out = tmp_path / "sheet.png"
    arguments = ["--images", str(tmp_path), "--out", str(out), "--num", "3"]
    main(["doctor", str(tmp_path / "rows.jsonl"), *arguments])
    printed = capsys.readouterr().out
    assert "24 boxes, order xyxy" in printed
    assert "1 rows without a box" in printed
    assert "verdict: " in printed
    assert Image.open(out).width > 3 * 500


def test_doctor_draws_boxes_of_a_photo_before_its_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upright = Image.new("RGB", (200, 100), "white")
    upright.paste("red", (20, 10, 60, 40))
    (tmp_path / "photo.png").write_bytes(encoded(upright, orientation=6))
    # stored 100 x 200: (x, y) of the upright picture lies at (y, 200 - x)
    row = {"image": "photo.png", "bbox": [10, 140, 40, 180], "width": 100, "height": 200}
    write_lines(tmp_path / "rows.jsonl", [row])
    out = tmp_path / "sheet.png"
    main(["doctor", str(tmp_path / "rows.jsonl"), "--images", str(tmp_path), "--out", str(out)])
    assert "1 of them state the size of the photo before its EXIF turn" in capsys.readouterr().out
    sheet = np.asarray(Image.open(out)).astype(int)
    is_outline = (np.abs(sheet - np.array(PALETTE[0])).sum(-1) == 0).nonzero()
    is_red = (np.abs(sheet - np.array([255, 0, 0])).sum(-1) < 60).nonzero()
    for outline, red in zip(is_outline, is_red, strict=True):
        assert abs(int(outline.max()) - int(red.max())) <= 4  # the outline covers the last pixels


def test_doctor_on_real_answers(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Qwen2.5-VL's answers that its evaluators scored 0.0 %: they are pixels, and right."""
    name = "rec_results_refcoco_val_qwen2_5vl_3b_instruct_baseline.json"
    assert main(["doctor", str(shared_data / "vlm-answers" / name)]) == 0
    printed = capsys.readouterr().out
    assert "89.4%" in printed
    assert "verdict: pixels, xyxy" in printed


# leaks


def photo(seed: int) -> Image.Image:
    """Smooth noise, so that pictures have structure as photos do."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((160, 120), Image.Resampling.BICUBIC)


def record_of(record_id: str, image: Image.Image, **options: Any) -> Record:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return Record(record_id, file.getvalue(), *image.size, ["a"], [], "t")


def test_copies_are_found_and_others_are_not(tmp_path: Path, capsys: Any) -> None:
    originals = [record_of(f"o{seed}", photo(seed), quality=95) for seed in range(40)]
    copies = {
        "small": photo(0).resize((80, 60)),
        "squashed": photo(1).resize((100, 100)),
        "mirrored": ImageOps.mirror(photo(2)),
        "recompressed": photo(3),
    }
    others = [record_of(f"n{seed}", photo(seed)) for seed in range(100, 140)]
    train = [*others, *(record_of(name, image, quality=30) for name, image in copies.items())]
    write_records(train, tmp_path / "train")
    write_records(originals, tmp_path / "eval")
    report = tmp_path / "leaks.jsonl"
    sets = [str(tmp_path / "train"), str(tmp_path / "eval")]
    assert main(["leak-check", *sets, "--report", str(report)]) == 1
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    assert {(row["train_id"], row["eval_id"], row["mirrored"]) for row in rows} == {
        ("small", "o0", False),
        ("squashed", "o1", False),
        ("mirrored", "o2", True),
        ("recompressed", "o3", False),
    }
    assert "4 of 44 training images are in it" in capsys.readouterr().out
    write_records(others, tmp_path / "clean")
    assert main(["leak-check", str(tmp_path / "clean"), sets[1]]) == 0


@pytest.mark.parametrize(
    "other",
    [
        "580957",
        "COCO_train2014_000000580957",
        "COCO_train2014_000000580957_4",
        "coco/val2017/000000580957",
    ],
)
def test_ids_of_one_photo(other: str) -> None:
    assert id_key(other) == "580957"
    train = fingerprint([record_of(other, photo(0))])
    plain = fingerprint([record_of("000000580957", photo(1))])
    mirrored = fingerprint([record_of("000000580957", photo(1))], mirror=True)
    (leak,) = find_leaks(train, plain, mirrored, "eval")
    assert leak.why == "same id"


def test_other_ids_stay_apart() -> None:
    assert id_key("scene-train-000012") != id_key("scene-test-000012")
    assert id_key("1") != id_key("2")


# validate, split, merge


def test_repairs_are_noted() -> None:
    record = replace(painted_records()[0], width=7, captions=["a  b"])
    record.regions.append(Region((0.5, 0.5, 1.2, 0.9), "sticks out"))
    log = DropLog()
    assert check_record(record, log) is not None
    assert log.notes == {
        "repaired: size set to the image file's own": 1,
        "repaired: box clipped to the image": 1,
        "repaired: text collapsed": 1,
    }
    untouched = DropLog()
    check_record(painted_records()[2], untouched)
    assert untouched.notes == {}


def test_split_parts_by_id(tmp_path: Path, tiny_scenes: list[Record]) -> None:
    from cloc_mllm.data.parquet import load_records

    write_records(tiny_scenes, tmp_path / "all")
    parts = ["train=0.5", "test=0.5"]
    for out in ("a", "b"):
        data = ["split", str(tmp_path / "all"), "--out", str(tmp_path / out), "--parts", *parts]
        assert main(data) in (0, None)
    ids = [{r.id for r in load_records(tmp_path / "a" / name)} for name in ("train", "test")]
    assert ids[0] | ids[1] == {record.id for record in tiny_scenes}
    assert not ids[0] & ids[1]
    assert ids[0] == {r.id for r in load_records(tmp_path / "b" / "train")}


@pytest.mark.parametrize(
    "parts", [["a=0.5"], ["a=0.5", "a=0.5"], ["../x=1"], ["a"], ["a=2", "b=-1"]]
)
def test_wrong_parts_are_refused(parts: list[str], tmp_path: Path) -> None:
    write_records(painted_records(), tmp_path / "all")
    with pytest.raises(ValueError, match="expected"):
        main(["split", str(tmp_path / "all"), "--out", str(tmp_path / "x"), "--parts", *parts])


def test_merge(tmp_path: Path) -> None:
    from cloc_mllm.data.parquet import load_records

    first, other = painted_records(), painted_records()[:1]
    other[0] = replace(other[0], captions=["another"], regions=[Region((0, 0, 1, 1), "all")])
    write_records(first, tmp_path / "a")
    write_records(other, tmp_path / "b")
    sets = [str(tmp_path / "a"), str(tmp_path / "b")]
    main(["merge", *sets, "--out", str(tmp_path / "plain")])
    assert list(load_records(tmp_path / "plain")) == first
    main(["merge", *sets, "--join", "--out", str(tmp_path / "joined")])
    joined = load_records(tmp_path / "joined")
    assert len(joined) == 4
    assert joined[0].captions == [*first[0].captions, "another"]
    assert [region.phrase for region in joined[0].regions] == ["the red box", "all"]
    assert list(joined)[1:] == first[1:]


@pytest.mark.parametrize("join", [[], ["--join"]])
def test_sets_that_were_numbered_apart(join: list[str], tmp_path: Path) -> None:
    """The splits of a tool's export both start at 1: half would be lost."""
    from cloc_mllm.data.parquet import load_records

    train, second = painted_records()[:2], painted_records()[2]
    write_records(train, tmp_path / "train")
    write_records([replace(second, id="1")], tmp_path / "valid")
    sets = [str(tmp_path / "train"), f"{tmp_path / 'valid'}/", *join]
    with pytest.raises(ValueError, match=r"id '1' stands for different images in set 1 and set 2"):
        main(["merge", *sets, "--out", str(tmp_path / "both")])
    assert not (tmp_path / "both").exists()
    main(["merge", *sets, "--prefix_ids", "--out", str(tmp_path / "both")])
    ids = [record.id for record in load_records(tmp_path / "both")]
    assert ids == ["train/1", "train/2", "valid/1"]
    same = [str(tmp_path / "train")] * 2
    with pytest.raises(ValueError, match="directories of different names"):
        main(["merge", *same, "--prefix_ids", "--out", str(tmp_path / "x")])


# fetch-report


def write_shard(folder: Path, name: str, rows: list[tuple[str, str, str]]) -> None:
    columns = ("url", "status", "error_message")
    table = pa.Table.from_pylist([dict(zip(columns, row, strict=True)) for row in rows])
    pq.write_table(table, folder / f"{name}.parquet")


def test_fetch_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path, "00000", [("u1", "success", ""), ("u2", "failed_to_download", "404")])
    write_shard(tmp_path, "00001", [("u3", "success", ""), ("u4", "failed_to_resize", "bad")])
    stats = {"count": 10, "successes": 4, "status_dict": {"success": 4, "timeout": 6}}
    (tmp_path / "00002_stats.json").write_text(json.dumps(stats))
    report = read_fetch_report(tmp_path)
    assert (report.listed, report.fetched, report.missing_tables) == (14, 6, 1)
    assert report.reasons == {
        "failed_to_download: 404": 1,
        "failed_to_resize: bad": 1,
        "timeout": 6,
    }
    assert main(["fetch-report", str(tmp_path), "--listed", "20"]) == 0
    assert "30.0%" in capsys.readouterr().out
    assert main(["fetch-report", str(tmp_path), "--min_share", "0.5"]) == 1


def test_the_sha256_is_of_the_survivors_alone(tmp_path: Path) -> None:
    sums = []
    for name, order in (("a", ["u1", "u2"]), ("b", ["u2", "u1"]), ("c", ["u1"])):
        (tmp_path / name).mkdir()
        rows = [(url, "success", "") for url in order] + [("gone", "failed_to_download", "x")]
        write_shard(tmp_path / name, "00000", rows)
        sums.append(read_fetch_report(tmp_path / name).sha256)
    assert sums[0] == sums[1] != sums[2]


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="img2dataset"):
        read_fetch_report(tmp_path)
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"00000.parquet"):
        read_fetch_report(tmp_path)
