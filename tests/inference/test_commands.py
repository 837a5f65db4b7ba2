import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from cloc_mllm.cli import main
from cloc_mllm.geometry import Boxes
from cloc_mllm.inference.results import GroundingResult


@pytest.fixture
def picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (96, 48), "teal").save("picture.png")
    return "picture.png"


def test_ground_prints_pixel_boxes_and_draws_them(picture, mllm_dir, monkeypatch, capsys):
    from cloc_mllm.inference.grounding_predictor import GroundingPredictor

    def ground(_, image, phrases):
        box = Boxes.normalized([[0.25, 0.25, 0.5, 0.75]], image.size)
        texts = ["...", "a boat", "not in the image"]
        found = torch.tensor([0.875]), phrases[:1], texts, torch.tensor([0])
        return GroundingResult(image, box, *found, [None, "not_a_box", "not_there"])

    monkeypatch.setattr(GroundingPredictor, "ground", ground)

    status = main(["ground", picture, "the crab", "a boat", "an owl", "--mllm", str(mllm_dir)])

    out = capsys.readouterr().out.splitlines()
    assert out == [
        "the crab: 24 12 48 36  confidence 0.88",
        "a boat: no box (not_a_box), the model wrote 'a boat'",
        "an owl: not in the image",
        "drawn: ground.png",
    ]
    assert status == 1
    with Image.open("ground.png") as drawn:
        assert drawn.size == (640, 320)
        colours = {drawn.getpixel((x, 160)) for x in range(150, 170)}
    assert (214, 39, 40) in colours  # the left edge of the box, at 24 px of 96


@pytest.mark.parametrize("has_head", [True, False], ids=["box head", "tokens"])
def test_ground_says_that_a_box_head_is_unsure(
    has_head, picture, mllm_config, monkeypatch, tmp_path, capsys
):
    from cloc_mllm.inference.grounding_predictor import GroundingPredictor
    from cloc_mllm.mllm import build_mllm, merge_and_save

    def ground(_, image, phrases):
        boxes = Boxes.normalized([[0.25, 0.25, 0.5, 0.75]] * 2, image.size)
        found = torch.tensor([0.25, 0.5]), phrases, ["", ""], torch.tensor([0, 1])
        return GroundingResult(image, boxes, *found, [None, None])

    monkeypatch.setattr(GroundingPredictor, "ground", ground)
    merge_and_save(*build_mllm(replace(mllm_config, box_head=has_head)), tmp_path / "mllm")

    assert main(["ground", picture, "the crab", "a boat", "--mllm", str(tmp_path / "mllm")]) == 0

    unsure = ", low: the model is unsure" if has_head else ""
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"the crab: 24 12 48 36  confidence 0.25{unsure}",
        "a boat: 24 12 48 36  confidence 0.50",
    ]


@pytest.mark.parametrize(
    "box", [["24", "12", "48", "36"], ["0.25", "0.25", "0.5", "0.75", "--normalized"]], ids=len
)
def test_refer_takes_pixels_or_normalised_boxes(picture, mllm_dir, monkeypatch, capsys, box):
    from cloc_mllm.inference.grounding_predictor import GroundingPredictor

    def refer(_, image, boxes):
        boxes = boxes.to_normalized()
        words = torch.tensor([0.5]), ["a crab"], ["a crab"], torch.tensor([0])
        return GroundingResult(image, Boxes.normalized(boxes.xyxy, image.size), *words, [None])

    monkeypatch.setattr(GroundingPredictor, "refer", refer)

    status = main(["refer", picture, *box, "--mllm", str(mllm_dir), "--out", "out/box.png"])

    assert capsys.readouterr().out == "24 12 48 36: a crab\ndrawn: out/box.png\n"
    assert status == 0
    assert Path("out/box.png").is_file()


def test_a_real_model_answers_both(picture, mllm_dir, capsys):
    assert main(["ground", picture, "the crab", "--mllm", str(mllm_dir)]) in (0, 1)
    assert main(["refer", picture, "4", "4", "40", "30", "--mllm", str(mllm_dir)]) == 0
    assert capsys.readouterr().out.count("drawn: ") == 2


def test_a_cloc_answers_both(picture, cloc_dir, capsys):
    model = ["--model", str(cloc_dir)]
    assert main(["ground", picture, "the crab", "a boat", *model]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["the crab", "a boat", "drawn"]
    assert all("  similarity " in line for line in lines[:2]) and err == ""
    for names in ("crab, boat,clock", "crab, boat,clock" + 300 * " ", "names.txt"):
        Path("names.txt").write_text("crab\nboat\n\nclock\n")
        assert main(["refer", picture, "4", "4", "40", "30", "--names", names, *model]) == 0
        first, *ranked, drawn = capsys.readouterr().out.splitlines()
        assert sorted(line.split("  ")[2] for line in ranked) == ["boat", "clock", "crab"]
        assert first == f"4 4 40 30: {ranked[0].split('  ')[2]}" and drawn == "drawn: refer.png"


def test_ask_streams_the_answer_and_draws_its_boxes(picture, mllm_dir, monkeypatch, capsys):
    from cloc_mllm.inference import chat
    from cloc_mllm.inference.results import Answer

    def answer_chat(predictor, asked, sampling, on_token):
        told.append((asked.messages[0]["content"][1]["text"], asked.regions))
        for piece in ("<p>a crab", "</p>BOX"):
            on_token(piece)
        box = Boxes.normalized([[0.25, 0.25, 0.5, 0.75]], (96, 48))
        scores, text = torch.tensor([0.875]), "<p>a crab</p>BOX"
        return Answer(text, box, scores, [(13, 16)], 0.8, None, phrases=["a crab"])

    told = []
    monkeypatch.setattr(chat, "answer_chat", answer_chat)

    for output, done in (("ask.png", "drawn"), ("out/ask.json", "written")):
        options = ["--mllm", str(mllm_dir), "--output", output]
        assert main(["ask", picture, " what is there? ", *options]) == 0
        out, err = capsys.readouterr()
        assert out.splitlines() == [
            "<p>a crab</p>BOX",
            "a crab: 24 12 48 36  confidence 0.88",
            f"{done}: {output}",
        ]
        assert err == ""
    assert told == [("what is there?", [])] * 2
    with Image.open("ask.png") as drawn:
        assert drawn.size == (640, 320)
    written = json.loads(Path("out/ask.json").read_text())
    assert written["queries"] == [{"text": "<p>a crab</p>BOX", "failure": None}]
    assert written["boxes"] == [
        {
            "query": 0,
            "phrase": "a crab",
            "score": 0.875,
            "box_norm": [0.25, 0.25, 0.5, 0.75],
            "box_px": [24.0, 12.0, 48.0, 36.0],
        }
    ]


@pytest.mark.parametrize(
    "box", [["24", "12", "48", "36"], ["0.25", "0.25", "0.5", "0.75", "--normalized"]], ids=len
)
def test_ask_about_a_box_says_what_a_chat_answers(picture, roi_mllm_dir, capsys, box):
    from cloc_mllm.inference.chat import Chat, answer_chat
    from cloc_mllm.inference.grounding_predictor import GroundingPredictor
    from cloc_mllm.inference.sampling import Sampling

    predictor = GroundingPredictor.from_pretrained(roi_mllm_dir)
    region = [0.25, 0.25, 0.5, 0.75]
    text = f"What is it? {predictor.processor.coordinates.encode(region)} <region>"
    content = [{"type": "image"}, {"type": "text", "text": text}]
    chat = Chat([{"role": "user", "content": content}], [picture], [Boxes.normalized([region])])
    expected = answer_chat(predictor, chat, Sampling(), lambda _: None)

    options = ["--model", str(roi_mllm_dir), "--output", "ask.json"]
    assert main(["ask", picture, "What is it?", "--box", *box, *options]) == 0

    assert capsys.readouterr().out.startswith(expected.text + "\n")
    written = json.loads(Path("ask.json").read_text())
    assert written["queries"][0]["text"] == expected.text
    if not len(expected.boxes):  # the box that was asked about stands for the answer
        assert written["boxes"][0]["box_px"] == [24, 12, 48, 36]


def test_ask_draws_nothing_where_there_is_no_box(picture, mllm_dir, monkeypatch, capsys):
    from cloc_mllm.inference import chat
    from cloc_mllm.inference.results import Answer

    none = Boxes.normalized([], (96, 48))
    answer = Answer("", none, torch.zeros(0), [], None, "not_a_box")
    monkeypatch.setattr(chat, "answer_chat", lambda *_: answer)
    for output, written in (("ask.png", False), ("ask.json", True)):
        assert main(["ask", picture, "why?", "--mllm", str(mllm_dir), "--output", output]) == 0
        assert Path(output).is_file() == written
        assert (f": {output}" in capsys.readouterr().out) == written


def test_ground_writes_json(picture, cloc_dir, capsys):
    options = ["--model", str(cloc_dir), "--output", "found.json"]
    assert main(["ground", picture, "the crab", "a boat", *options]) == 0
    written = json.loads(Path("found.json").read_text())
    assert [box["query"] for box in written["boxes"]] == [0, 1]
    assert (written["width"], written["height"]) == (96, 48)
    assert capsys.readouterr().out.endswith("written: found.json\n")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--names", " , "], "expected names with commas between them, or a file"),
        ([], "there is nothing to choose from; give at least one name"),
        (["--names", "crab", "--mllm", "x"], "--model and --mllm both name a model"),
        (["--names", "crab", "--dtype", "auto"], "--dtype auto is for an MLLM; "),
    ],
)
def test_wrong_options_of_a_cloc(picture, cloc_dir, capsys, options, said):
    model = ["--model", str(cloc_dir)]
    assert main(["refer", picture, "4", "4", "40", "30", *model, *options]) == 2
    assert said in capsys.readouterr().err


def test_names_are_not_for_an_mllm(picture, mllm_dir, capsys):
    names = ["--names", "crab,boat", "--model", str(mllm_dir)]
    assert main(["refer", picture, "4", "4", "40", "30", *names]) == 2
    assert "--names is for a CLOC" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["ground", "missing.png", "crab"], "No such file or directory: missing.png"),
        (["ground", "picture.png", "crab", "--mllm", "nowhere"], "nowhere is no MLLM directory"),
        (["refer", "picture.png", "90", "4", "10", "30", "--mllm", "MLLM"], "inverted"),
        # all of it said before a model is loaded
        (["ground", "picture.png", " ", "--mllm", "nowhere"], "the phrase is blank; say what to"),
        (
            ["ground", "picture.png", "a crab", "the <region> here", "--mllm", "nowhere"],
            "the phrase 'the <region> here' holds <region>, which stands for a region",
        ),
        (["ground", "picture.png", "<image> crab", "--mllm", "nowhere"], "stands for the picture"),
        (
            ["ground", "picture.png", "crab", "--mllm", "nowhere", "--out", "answers/crab"],
            "--output answers/crab: expected a name that ends in .png, .jpg or .webp, or in .json",
        ),
        (["refer", "picture.png", "0.1", "0.2", "0.5", "1"], "got 0.1 0.2 0.5 1; add --normalized"),
        (
            ["ask", "picture.png", "a?", "--normalized", "--box", "1", "2", "30", "40"],
            "--normalized: expected numbers 0..1, got 1 2 30 40; leave it out for pixels",
        ),
        (["ask", "picture.png", " ", "--mllm", "nowhere"], "the question is blank; say what you"),
        (["ask", "picture.png", "what?", "--model", "nowhere"], "nowhere is no MLLM directory"),
        (
            ["ask", "picture.png", "what is <region>?", "--mllm", "nowhere"],
            "the question 'what is <region>?' holds <region>, which stands for a region",
        ),
        (
            ["ask", "picture.png", "what?", "--box", "90", "4", "10", "30", "--mllm", "nowhere"],
            "inverted",
        ),
        (
            ["refer", "picture.png", "1", "2", "30", "30", "--mllm", "nowhere", "--out", "x.xyz"],
            "--output x.xyz: expected a name that ends in",
        ),
    ],
)
def test_wrong_input_is_one_line(picture, mllm_dir, capsys, argv, message):
    status = main([str(mllm_dir) if argument == "MLLM" else argument for argument in argv])

    err = capsys.readouterr().err.splitlines()
    assert status == 2
    assert message in err[-1] and err[-1].startswith("cloc-mllm: error: ")


@pytest.mark.parametrize("command", ["ground", "refer", "ask"])
def test_help_reads_well_and_loads_no_torch(command):
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "cloc_mllm.cli", command, "--help"],
        capture_output=True,
        text=True,
    )

    assert result.returncode == 0, result.stderr
    assert f"usage: cloc-mllm {command}" in result.stdout and "example: " in result.stdout
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "argparse" in imported and not imported & {"torch", "transformers"}


def test_refer_takes_a_point_or_a_mask(picture, roi_mllm_dir, capsys):
    mask = Image.new("1", (96, 48))
    mask.paste(1, (24, 12, 48, 36))
    mask.save("mask.png")
    model = ["--mllm", str(roi_mllm_dir)]

    assert main(["refer", picture, "--mask", "mask.png", *model]) == 0
    assert capsys.readouterr().out.startswith("24 12 48 36: ")
    for point in (["--point", "24,12"], ["--normalized", "--point", "0.25,0.25"]):
        assert main(["refer", picture, *point, *model]) == 0
        assert capsys.readouterr().out.startswith("24 12 25 13: ")
    assert main(["refer", *model, picture, "24", "12", "48", "36"]) == 0


def test_refer_refuses_a_box_before_it_loads_a_model(picture, capsys):
    assert main(["refer", picture, "48", "12", "24", "36", "--model", "no/such/model"]) != 0
    assert "cannot be used: inverted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [[], ["1", "2", "3"], ["1", "2", "3", "4", "--point", "1,2"], ["--point", "1"]]
)
def test_refer_wants_one_region(picture, capsys, argv):
    with pytest.raises(SystemExit, match="2"):
        main(["refer", picture, *argv])
    assert "--point" in capsys.readouterr().err
