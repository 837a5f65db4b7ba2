"""The whole evaluation job with tiny random models."""

import json

import pytest

from cloc_mllm.data.parquet import write_records
from cloc_mllm.data.records import Record, Region
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.devices import choose_device
from cloc_mllm.evaluation.commands import main
from cloc_mllm.evaluation.config import EvalConfig
from cloc_mllm.evaluation.rows.files import read_predictions, read_references
from cloc_mllm.evaluation.run import _fitting_cloc, _say_what_models_know, evaluate
from cloc_mllm.evaluation.tasks import task_class, task_names


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """8 built-in test scenes as records on disk."""
    directory = tmp_path_factory.mktemp("data") / "records"
    write_records(generate_scenes(8, split="test", long_side=64), directory)
    return directory


@pytest.fixture(scope="module")
def run_dir(cloc_dir, mllm_dir, data_dir, tmp_path_factory):
    """Output of all tasks, the CLOC model standing beside itself as the baseline."""
    directory = tmp_path_factory.mktemp("eval")
    config = directory / "config.yaml"
    config.write_text(f"data: {data_dir}\nbootstrap_samples: 20\nnum_examples: 2\n")
    models = [f"--{name}={cloc_dir}" for name in ("cloc", "baseline_cloc")]
    models += [f"--mllm={mllm_dir}", "--device=cpu", f"--output_dir={directory}"]
    assert main(["--config", str(config), *models]) == 0
    return directory


def test_the_job_writes_rows_numbers_and_a_report(run_dir, cloc_dir, mllm_dir):
    references = read_references(run_dir / "references.jsonl")
    predictions = read_predictions(run_dir / "predictions.jsonl")
    assert {row.id for row in predictions} == {row.id for row in references}
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert list(metrics["tasks"]) == [
        "region_classification",
        "region_to_text",
        "text_to_region",
        "image_to_text",
        "text_to_image",
        "text_to_box",
        "rec",
        "referring",
    ]
    entry = metrics["tasks"]["region_classification"]["metrics"]["macro_acc"]
    assert entry["ci_low"] <= entry["value"] <= entry["ci_high"]
    assert entry["n_images"] == 8 and entry["n"] > 8
    assert entry["difference"] == {
        "value": 0.0,
        "ci_low": 0.0,
        "ci_high": 0.0,
        "n": entry["n"],
        "n_images": 8,
        "p_value": 1.0,
        "wins": 0,
        "losses": 0,
    }
    assert "baseline" not in metrics["tasks"]["rec"]["metrics"]["acc_at_0_5"]
    assert metrics["about"]["config"]["mllm"] == str(mllm_dir)
    assert metrics["about"]["versions"]["torch"]
    page = (run_dir / "report.html").read_text()
    assert page.count("<figure") >= 6 * 4


SCENES = "the model scenes knows the 112 things of the built-in drawings; for photos use {}"
PHOTOS = "the model photos knows everyday photos; for the built-in drawings use {} scenes"


@pytest.mark.parametrize(
    ("settings", "answering", "said"),
    [
        ({"cloc": "scenes"}, {"cloc", "mllm"}, [SCENES.format("--mllm photos")]),
        ({"cloc": "scenes"}, {"cloc"}, [SCENES.format("--cloc photos")]),
        (
            {"cloc": "photos", "data": "my_photos"},
            {"cloc", "mllm"},
            [
                "no --mllm was given: scenes is the language model",
                PHOTOS.format("--cloc"),
                SCENES.format("--mllm photos"),
            ],
        ),
        ({"cloc": "photos", "mllm_hf": "x"}, {"mllm"}, []),
        ({"cloc": "runs/mine", "mllm": "runs/its", "data": "d"}, {"cloc", "mllm"}, []),
        ({"cloc": "a", "baseline_cloc": "photos"}, {"cloc"}, [PHOTOS.format("--baseline_cloc")]),
    ],
    ids=["both scenes", "cloc alone", "photos", "another library", "own", "baseline"],
)
def test_it_says_what_shipped_models_know(settings, answering, said, capsys):
    _say_what_models_know(EvalConfig(**settings), answering)
    assert capsys.readouterr().err.splitlines() == said


def test_own_records_are_told_that_scenes_answers(cloc_dir, data_dir, tmp_path, capsys):
    run = ["--tasks", "[rec]", "--data", str(data_dir), "--cloc", str(cloc_dir), "--limit", "1"]
    assert main([*run, "--bootstrap_samples", "5", "--output_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().err.count("no --mllm was given: scenes is the language model") == 1


def test_even_an_untrained_model_answers_every_rec_query_with_a_box(run_dir):
    predictions = read_predictions(run_dir / "predictions.jsonl")
    rec = [row for row in predictions if row.task == "rec"]
    assert rec and all(len(row.boxes) == 1 and row.failure is None for row in rec)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    entry = metrics["tasks"]["rec"]
    assert entry["failures"]["count"] == 0
    assert entry["failures"]["n"] == entry["metrics"]["mean_iou"]["n"] == len(rec)
    referring = [row for row in predictions if row.task == "referring"]
    assert all(row.failure is None and row.prompt.endswith("<region>?") for row in referring)


def test_without_an_mllm_its_tasks_are_left_out(cloc_dir, data_dir, tmp_path):
    config = EvalConfig(
        cloc=str(cloc_dir), mllm="none", data=str(data_dir), limit=2, output_dir=str(tmp_path)
    )
    evaluation = evaluate(config)
    assert not {"rec", "referring"} & set(evaluation.tasks)
    assert evaluation.about["skipped_tasks"] == ["rec", "referring"]
    assert evaluation.about["num_records"] == 2


def test_an_mllm_that_is_not_there_is_named_before_the_cloc_answers(cloc_dir, data_dir, tmp_path):
    config = EvalConfig(
        cloc=str(cloc_dir), mllm="nowhere", data=str(data_dir), output_dir=str(tmp_path / "out")
    )
    with pytest.raises(FileNotFoundError, match="nowhere is no MLLM directory"):
        evaluate(config)
    assert list((tmp_path / "out").iterdir()) == []


def test_photos_without_categories_skip_classification(cloc_dir, data_dir, tmp_path, capsys):
    scene = next(iter(generate_scenes(1, split="test", long_side=64)))
    photo = Record("p", scene.image, scene.width, scene.height, [], [], "photos")
    photo.regions = [Region((0.1, 0.1, 0.8, 0.9), "a man")]
    write_records([photo], tmp_path / "photos")
    arguments = [f"--cloc={cloc_dir}", "--mllm=none", f"--data={tmp_path / 'photos'}"]
    main([*arguments, f"--output_dir={tmp_path}", "--bootstrap_samples=5"])
    printed = capsys.readouterr().out
    assert (
        "left out, nothing to ask or nobody to answer: region_classification, image_to_text, "
        "text_to_image, rec, referring" in printed
    )
    assert "text_to_box" in printed and "report.html" in printed
    only = EvalConfig(data=str(tmp_path / "photos"), tasks=["region_classification"])
    with pytest.raises(ValueError, match="photos holds nothing to ask for region_classification"):
        evaluate(only)


def test_wrong_settings_are_refused_before_a_model_is_loaded(tmp_path, data_dir):
    with pytest.raises(ValueError, match=r"unknown task 'vqa'; expected one of: ferret_bench, "):
        evaluate(EvalConfig(tasks=["rec", "vqa"]))
    with pytest.raises(ValueError, match="unknown device 'gpu0'; expected auto, cpu"):
        choose_device("gpu0")
    out = str(tmp_path / "out")
    missing = EvalConfig(
        cloc=str(tmp_path), data=str(data_dir), tasks=["text_to_box"], output_dir=out
    )
    with pytest.raises(FileNotFoundError, match="is no CLOC model directory"):
        evaluate(missing)


@pytest.mark.parametrize(
    ("data", "tasks", "expected"),
    [
        ("", ["rec", "refcoco"], "scenes"),
        ("compositional", ["text_to_box"], "scenes"),
        ("runs/data", ["text_to_box"], "photos"),
        ("", ["refcoco"], "photos"),  # it brings photos of its own
    ],
)
def test_the_shipped_cloc_fits_what_is_asked_about(data, tasks, expected):
    named = [task_class(name) for name in tasks]
    assert _fitting_cloc(EvalConfig(data=data), named) == expected


def test_the_tasks_are_listed(capsys):
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.split() == task_names()
