"""The whole program on damaged input: exit code 2, one line that names what is wrong, nothing lost or half-written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import programs
from tests.programs import ROOT

OPTIONS = [
    "--dataset", "custom", "--backbone", "resnet18", "--norm", "batch", "--trainable-backbone-layers", "5",
    "--no-pretrained", "--fpn-channels", "8", "--head-convs", "0", "--image-size", "64", "64", "--anchor-sizes",
    "8,16,24,32,48", "--max-boxes", "16", "--batch-size", "2", "--workers", "1", "--division", "open", "--device",
    "cpu", "--target-map", "0.99", "--epochs", "1", "--seed", "3",
]  # fmt: skip


def run(*words, **variables) -> subprocess.CompletedProcess:
    return programs.run([sys.executable, "-m", "single_stage_detector.train", *words], **variables)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a data set, and in run/ a finished run on it."""
    folder = tmp_path_factory.mktemp("programs")
    command = [
        sys.executable,
        "tools/make_scenes.py",
        "--out",
        folder / "set",
        "--train",
        "4",
        "--val",
        "2",
        "--size",
        "64",
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    result = run(*OPTIONS, "--workers", "0", "--dataset-path", folder / "set", "--output-dir", folder / "run")
    assert result.returncode == 3, result.stderr[-3000:]
    return folder


@pytest.fixture
def data(trained, tmp_path) -> Path:
    """A data set of one's own, to be damaged."""
    return shutil.copytree(trained / "set", tmp_path / "set")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(result: subprocess.CompletedProcess, *words: object) -> None:
    error = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(error) == 1, result.stderr[-3000:]
    assert "Traceback" not in result.stderr and "Traceback" not in result.stdout
    assert result.stderr.splitlines()[-1] == error[0], "the last line says what is wrong"
    for word in words:
        assert str(word) in error[0], error[0]


def annotations(change: Callable) -> Callable:
    """A change of the content of the training JSON."""

    def apply(data: Path) -> None:
        file = data / "annotations/instances_train.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return apply


def cut(name: str, part: float) -> Callable:
    def apply(data: Path) -> None:
        whole = (data / name).read_bytes()
        (data / name).write_bytes(whole[: int(len(whole) * part)])

    return apply


def swap(data: Path) -> None:
    """Two training images of different size under each other's name."""
    sizes = json.loads((data / "annotations/instances_train.json").read_text())["images"]
    first = sizes[0]
    other = next(s for s in sizes if (s["width"], s["height"]) != (first["width"], first["height"]))
    a, b = (data / "train" / entry["file_name"] for entry in (first, other))
    a_bytes, b_bytes = a.read_bytes(), b.read_bytes()
    a.write_bytes(b_bytes)
    b.write_bytes(a_bytes)


DAMAGE = {
    "cut image": (cut("train/000001.jpg", 0.6), ["train/000001.jpg", "does not decode"]),
    "empty image": (cut("train/000002.jpg", 0), ["train/000002.jpg", "is empty"]),
    "missing image": (lambda data: (data / "train/000003.jpg").unlink(), ["000003.jpg", "not there"]),
    "cut validation image": (cut("val/000000.jpg", 0.5), ["val/000000.jpg", "does not decode"]),
    "swapped images": (swap, ["but the annotation file says"]),
    "text as an image": (lambda d: (d / "train/000000.jpg").write_text("404"), ["000000.jpg", "does not decode"]),
    "cut annotations": (cut("annotations/instances_train.json", 0.7), ["instances_train.json", "ends in the middle"]),
    "cut validation annotations": (cut("annotations/instances_val.json", 0.2), ["instances_val.json", "middle"]),
    "unknown category": (
        annotations(lambda c: c["annotations"][0].update(category_id=77)), ["instances_train.json", "category 77"],
    ),
    "missing key": (annotations(lambda c: c["annotations"][1].pop("bbox")), ["annotations[1]", "bbox"]),
    "text for a number": (annotations(lambda c: c["images"][1].update(width="64")), ["images[1].width"]),
    "other classes": (
        annotations(lambda c: c["categories"].append({"id": 50, "name": "ghost"})), ["list different categories"],
    ),
    "too many boxes": (
        annotations(lambda c: c["annotations"].extend([c["annotations"][0]] * 20)), ["more than 16", "--max-boxes"],
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_data(data, tmp_path, damage):
    apply, words = DAMAGE[damage]
    apply(data)
    result = run(*OPTIONS, "--dataset-path", data, "--output-dir", tmp_path / "out")
    assert_refused(result, *words)
    assert not list((tmp_path / "out").rglob("*.part")) and not list((tmp_path / "out").glob("best.pt"))
    log = (tmp_path / "out/result_0.txt").read_text() if (tmp_path / "out/result_0.txt").exists() else ""
    assert "run_start" not in log or '"aborted"' in log.splitlines()[-1], "a log that was begun ends as aborted"


@pytest.mark.parametrize(
    ("words", "variables", "named"),
    [
        (["--batch-sizes", "2"], {}, ["--batch-sizes", "did you mean --batch-size?"]),
        (["--lr", "fast"], {}, ["--lr", "'fast'"]),
        ([], {"BATCH_SIZE": "8"}, ["BATCH_SIZE", "did you mean BATCHSIZE?"]),
        (["--output-dir", "x" * 300], {}, ["x" * 300]),
    ],
)
def test_bad_settings(trained, words, variables, named):
    before = contents(trained)
    paths = ["--dataset-path", trained / "set", "--output-dir", trained / "run"]
    assert_refused(run(*OPTIONS, *paths, *words, **variables), *named)
    assert contents(trained) == before


def test_an_earlier_run_is_kept(trained):
    before = contents(trained / "run")
    result = run(*OPTIONS, "--dataset-path", trained / "set", "--output-dir", trained / "run")
    assert_refused(result, trained / "run", "--resume", "--overwrite")
    assert contents(trained / "run") == before


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip, lambda path: os.truncate(path, 10_000), lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("use", ["resume", "evaluate", "predict"])
def test_damaged_checkpoint(trained, tmp_path, damage, use):
    out = shutil.copytree(trained / "run", tmp_path / "run")
    damage(out / "last.pt")
    before = contents(out)
    words = {
        "resume": [*OPTIONS, "--resume", "--epochs", "2"],
        "evaluate": ["--mode", "evaluate", "--checkpoint", out / "last.pt"],
        "predict": ["--mode", "predict", "--checkpoint", out / "last.pt", "--images", trained / "set/val"],
    }[use]
    assert_refused(run(*words, "--dataset-path", trained / "set", "--output-dir", out), out / "last.pt")
    assert contents(out) == before
