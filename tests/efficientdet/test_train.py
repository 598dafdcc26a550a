"""The whole program, as a user starts it, on a few generated scenes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import programs
from tests.programs import ROOT

SMALL = [
    "--dataset", "custom", "--model", "tf_efficientdet_lite0", "--input_size", "64", "--no-pretrained", "--device",
    "cpu", "-b", "3", "-j", "0", "--seed", "3", "--log-interval", "1", "--max-boxes", "16",
]  # fmt: skip
RECIPE = [
    "--epochs", "2", "--cooldown-epochs", "1", "--warmup-epochs", "1", "--lr", "0.02", "--eval-after", "1",
    "--model-ema", "--model-ema-decay", "0.9", "--save-checkpoint-interval", "2", "--resume",
]  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Six training and three validation scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    command = [sys.executable, "tools/make_scenes.py", "--out", folder, "--train", "6", "--val", "3", "--size", "64"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def run(scenes: Path, out: Path, *more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "efficientdet.train", str(scenes), *SMALL, "--output", str(out), *more]
    done = programs.run(command)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory) -> Path:
    """The folder of three epochs of two steps, the last one the cool-down."""
    folder = tmp_path_factory.mktemp("trained")
    run(scenes, folder, *RECIPE, "-j", "1", "--dllogger-file", str(folder / "log.json"))
    return folder


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]


def state(folder: Path, name: str = "last.pt") -> dict:
    return torch.load(folder / name, weights_only=True)


def test_learning_rate_and_evaluations(trained):
    """One number an epoch; evaluated after the epochs 1 and 2, counted from 0."""
    assert [r["lr"] for r in records(trained) if r["kind"] == "step"] == pytest.approx(
        [1e-4, 1e-4, *[1e-5 + 0.5 * (0.02 - 1e-5)] * 2, 1e-5, 1e-5]
    )
    assert [r["epoch"] for r in records(trained) if r["kind"] == "eval"] == [2, 3]


def test_what_lies_in_the_folder(trained):
    assert {"last.pt", "best.pt", "checkpoint_2.pt", "result_0.txt"} <= {path.name for path in trained.iterdir()}
    assert state(trained, "checkpoint_2.pt")["step"] == 4 and state(trained)["config"]["epochs"] == 3
    log = (trained / "result_0.txt").read_text().splitlines()
    keys = [json.loads(line.partition(":::MLLOG ")[2])["key"] for line in log]
    order = ["init_start", "init_stop", "run_start", "epoch_start", "epoch_stop", "eval_start", "eval_stop", "run_stop"]
    assert [key for key in dict.fromkeys(keys) if key in order] == order


def test_the_summary_has_the_originals_keys(trained):
    lines = [json.loads(line.removeprefix("DLLL ")) for line in (trained / "log.json").read_text().splitlines()]
    assert lines[0]["step"] == "PARAMETER" and lines[0]["data"]["Scheduled_epochs"] == 3
    steps = [line for line in lines if "train_loss" in line["data"]]
    assert [line["step"] for line in steps] == [[0, 0], [0, 1], [1, 2], [1, 3], [2, 4], [2, 5]]
    assert all(line["data"]["train_throughput"] > 0 and line["data"]["lr"] > 0 for line in steps)
    for data in (line["data"] for line in steps):
        assert data["train_batch_time"] == pytest.approx(3 / data["throughput"])
        assert 0 <= data["train_data_time"] <= data["train_batch_time"]
    assert [line["step"] for line in lines if "best_epoch" in line["data"]] == [[1], [2]]


def test_resumed_to_the_same_bits(trained, scenes, tmp_path):
    """From the file of the second epoch, with the average, the optimizer and the generators of random numbers."""
    (tmp_path / "last.pt").write_bytes((trained / "checkpoint_2.pt").read_bytes())
    run(scenes, tmp_path, *RECIPE)
    again, whole = state(tmp_path), state(trained)
    assert again["step"] == whole["step"] == 6
    for part in ("model", "ema"):
        assert all(torch.equal(again[part][name], value) for name, value in whole[part].items())


def test_the_average_is_evaluated_and_written_as_results(trained, scenes, tmp_path):
    checkpoint = ["--mode", "evaluate", "--checkpoint", str(trained / "last.pt")]
    summary = tmp_path / "log.json"
    run(scenes, tmp_path, *checkpoint, "--results", str(tmp_path / "results.json"), "--dllogger-file", str(summary))
    data = json.loads(summary.read_text().removeprefix("DLLL "))["data"]
    assert data["eval_throughput"] == pytest.approx(3 / data["total_eval_time"])
    found = json.loads((tmp_path / "evaluation.json").read_text())
    last = [r["metrics"] for r in records(trained) if r["kind"] == "eval"][-1]
    assert {name: found[name] for name in ("AP", "AP50", "AR100")} == pytest.approx(
        {name: last[name] for name in ("AP", "AP50", "AR100")}
    )
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows and rows[0].keys() == {"image_id", "category_id", "bbox", "score"}
    run(scenes, tmp_path / "speed", *checkpoint[2:], "--inference", "--results", str(tmp_path / "r.json"),
        "--dllogger-file", str(summary))  # fmt: skip
    data = json.loads(summary.read_text().removeprefix("DLLL "))["data"]
    assert {"inference_throughput", "total_inference_time"} <= data.keys()


def test_predicts_with_the_checkpoint_alone(trained, scenes, tmp_path):
    images = sorted((scenes / "val").iterdir())[:1]
    command = ["--mode", "predict", "--checkpoint", str(trained / "last.pt"), "--images", str(images[0])]
    command += ["--device", "cpu", "--output", str(tmp_path), "--score-threshold", "0.001"]
    done = programs.run([sys.executable, "-m", "efficientdet.train", *command])
    assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads((tmp_path / "predictions/detections.json").read_text())
    assert len(content["categories"]) == 6 and content["annotations"]
