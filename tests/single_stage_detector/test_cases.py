"""What users bring: their data sets, checkpoints and photographs, through the program from end to end."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detcore.cli import run_main
from detcore.training.checkpoint import load_checkpoint
from single_stage_detector import train
from single_stage_detector.model import RetinaNet, known_classes

SIZES = (8, 16, 32, 64, 128)
SMALL = [
    "--dataset", "custom", "--backbone", "resnet18", "--norm", "batch", "--trainable-backbone-layers", "5",
    "--no-pretrained", "--image-size", "64", "64", "--anchor-sizes", "8,16,32,64,128", "--fpn-channels", "8",
    "--head-convs", "0", "--batch-size", "2", "--epochs", "1", "--division", "open", "--target-map", "none",
    "--workers", "0", "--device", "cpu", "--seed", "1",
]  # fmt: skip
NAMES = [(1, "red"), (2, "blue")]


class Set:
    """A custom data set: four training and two validation images of 96x64, one box each."""

    def __init__(self, root: Path) -> None:
        self.root, self.content = root, {}
        (root / "annotations").mkdir(parents=True)
        rng = np.random.default_rng(0)
        for split, count in (("train", 4), ("val", 2)):
            (root / split).mkdir()
            content = {"images": [], "annotations": [], "categories": [{"id": i, "name": name} for i, name in NAMES]}
            for k in range(1, count + 1):
                Image.fromarray(rng.integers(0, 256, (64, 96, 3), np.uint8)).save(root / split / f"{k}.jpg")
                content["images"].append({"id": k, "file_name": f"{k}.jpg", "width": 96, "height": 64})
                box = {"id": k, "image_id": k, "category_id": 1 + k % 2, "bbox": [10, 8, 50, 30], "area": 1500}
                content["annotations"].append(box)
            self.content[split] = content
            self.write(split)

    def write(self, *splits: str) -> None:
        for split in splits:
            (self.root / f"annotations/instances_{split}.json").write_text(json.dumps(self.content[split]))

    def rename(self, names: list[str], *splits: str) -> None:
        for split in splits:
            for category, name in zip(self.content[split]["categories"], names, strict=True):
                category["name"] = name
        self.write(*splits)


@pytest.fixture
def data(tmp_path) -> Set:
    return Set(tmp_path / "set")


@pytest.fixture
def run(data, tmp_path, capfd):
    """Runs the program on the data set: exit code, and what was said."""

    def call(*words: object, out: str = "out") -> tuple[int, str]:
        words = [*SMALL, "--dataset-path", data.root, "--output-dir", tmp_path / out, *words]
        code = run_main(train.main, list(map(str, words)))
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        return code, said.out + said.err

    return call


def reference(classes: int, path: Path, **more) -> None:
    """A checkpoint as the MLCommons reference and torchvision's scripts save it."""
    torch.manual_seed(0)
    model = RetinaNet("resnet18", classes, (64, 64), "batch", 5, 8, 0, SIZES)
    torch.save({"model": model.state_dict(), "optimizer": {}, "epoch": 3, "args": argparse.Namespace(lr=1e-4)}, path)


def test_names_exchanged_between_the_files(run, data):
    data.rename(["blue", "red"], "val")
    code, said = run()
    assert code == 2 and "id 1 is 'red' in instances_train.json and 'blue' in instances_val.json" in said


def test_another_category_in_validation(run, data):
    data.content["val"]["categories"].append({"id": 7, "name": "green"})
    data.write("val")
    code, said = run()
    assert code == 2 and "id 7 ('green') is only in instances_val.json" in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"iscrowd": 1}, "4 of 4 boxes are marked iscrowd"),
        ({"bbox": [0.1, 0.2, 0.5, 0.5]}, "fractions of the image"),
        (None, "there are no annotations"),
    ],
)
def test_training_from_which_nothing_is_learnt_is_refused(run, data, change, words):
    for box in data.content["train"]["annotations"] if change else ():
        box |= change
    if not change:
        data.content["train"]["annotations"] = []
    data.write("train")
    code, said = run()
    assert code == 2 and words in said


def test_nothing_to_score_is_no_best(run, data, tmp_path):
    for box in data.content["val"]["annotations"]:
        box["area"] = -5
    data.write("val")
    code, said = run()
    assert code == 0 and "has nothing to score" in said and "AP -1.0000 (no target), nothing to score" in said
    assert "best" not in said.split("evaluation after")[1].replace("best.pt", "")
    assert not (tmp_path / "out/best.pt").exists() and (tmp_path / "out/last.pt").exists()
    assert json.loads((tmp_path / "out/progress.jsonl").read_text().splitlines()[-1])["best"] is None


def test_classes_of_a_checkpoint_are_those_of_the_files(run, data, tmp_path):
    assert run()[0] == 0
    code, said = run("--mode", "evaluate", "--checkpoint", tmp_path / "out/last.pt", "--num-classes", 5, out="more")
    assert code == 2 and "--num-classes 5: " in said and "knows 2 classes; leave the option out" in said
    data.rename(["blue", "red"], "train", "val")
    code, said = run("--resume", "--epochs", 2)
    assert code == 2 and "--resume" in said and "'red' (id 1) is 'blue' (id 1) there" in said
    last = ("--checkpoint", tmp_path / "out/last.pt")
    code, said = run("--mode", "evaluate", *last, out="evaluated")
    assert code == 2 and "'red' (id 1) is 'blue' (id 1) there" in said
    data.content["val"]["categories"].append({"id": 9, "name": "green"})
    data.rename(["red", "blue", "green"], "val")
    code, said = run("--mode", "evaluate", *last, out="evaluated")
    assert code == 2 and "'green' (id 9) is new there" in said
    code, said = run("--mode", "predict", *last, "--images", data.root / "val", out="seen")
    content = json.loads((tmp_path / "seen/predictions/detections.json").read_text())
    assert code == 0 and [entry["name"] for entry in content["categories"]] == ["red", "blue"], (
        "those it was trained on"
    )


def test_a_reference_checkpoint_with_other_classes(run, data, tmp_path):
    """As COCO's 80 classes and the 91 outputs of torchvision and the MLCommons reference, whose class k is id k."""
    reference(5, tmp_path / "five.pth")
    code, said = run("--checkpoint", tmp_path / "five.pth")
    assert code == 2 and "knows 5 classes, the data set has 2" in said
    assert "--weights-only" in said and "--num-classes 5" in said
    code, said = run("--checkpoint", tmp_path / "five.pth", "--weights-only", out="two")
    assert code == 0 and "starts anew" in said
    assert known_classes(load_checkpoint(tmp_path / "two/last.pt")["model"]) == 2
    code, said = run("--checkpoint", tmp_path / "five.pth", "--num-classes", 5, out="five")
    saved = load_checkpoint(tmp_path / "five/last.pt")
    assert code == 0 and known_classes(saved["model"]) == 5
    assert saved["classes"] == [[0, "0"], [1, "red"], [2, "blue"], [3, "3"], [4, "4"]]
    for path in ("five.pth", "five/last.pt"):
        code, said = run("--mode", "evaluate", "--checkpoint", tmp_path / path, "--num-classes", 5, out="evaluated")
        assert code == 0 and "red" in said
    code, said = run("--num-classes", 2, out="same")
    assert code == 0
    code, said = run("--num-classes", 1, out="fewer")
    assert code == 2 and "custom has 2 classes; leave the option out, or give at least 2" in said


def test_a_wrong_folder_is_told_before_missing_weights(run, data, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no weights"))
    assert "no weights for resnet18" in run("--pretrained")[1]
    nowhere = tmp_path / "nope"
    code, said = run("--pretrained", "--dataset-path", nowhere)
    assert code == 2 and f"--dataset-path {nowhere}: there is no such folder" in said and "weights for" not in said
    code, said = run("--pretrained", "--also-train-on", nowhere)
    assert code == 2 and f"--also-train-on {nowhere}: there is no such folder" in said
    code, said = run("--dataset-path", data.root / "train")
    assert code == 2 and "begins one folder above" in said and f"give --dataset-path {data.root}" in said


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_files_are_told_before_missing_weights(run, data, tmp_path, monkeypatch, split):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no weights"))
    annotations, what = data.root / f"annotations/instances_{split}.json", {"train": "training", "val": "validation"}
    images = data.root / split
    images.rename(tmp_path / "images")
    code, said = run("--pretrained")
    assert code == 2 and f"{images}: there is no such folder, the {what[split]} images of" in said
    assert f"correct --{split}-data-path" in said and "weights for" not in said
    code, said = run("--pretrained", f"--{split}-data-path", tmp_path / "images")
    assert code == 2 and "no weights for resnet18" in said
    code, said = run("--pretrained", "--shards", tmp_path / "nope")
    assert code == 2 and "nope/train: there is no such folder" in said and "correct --shards" in said
    annotations.unlink()
    code, said = run("--pretrained")
    assert code == 2 and f"{annotations}: there is no such file, the {what[split]} annotations" in said
    assert f"--{split}-annotations-file" in said and "weights for" not in said


def test_ids_that_the_number_of_classes_does_not_reach(run, data):
    for split in ("train", "val"):
        data.content[split]["categories"].append({"id": 40, "name": "green"})
    data.write("train", "val")
    code, said = run("--num-classes", 5)
    assert code == 2 and "category 40" in said


def test_prediction_takes_every_kind_of_image_and_folder(run, data, tmp_path):
    assert run()[0] == 0
    seen = tmp_path / "photos"
    (seen / "sub/.hidden").mkdir(parents=True)
    photo = Image.open(data.root / "val/1.jpg")
    for name in ("a.bmp", "b.tif", "c.JPG", "sub/d.png", "sub/.hidden/e.png"):
        photo.convert("RGB").save(seen / name, {"JPG": "JPEG"}.get(name[-3:]))
    tags = Image.Exif()
    tags[0x112] = 6
    photo.save(seen / "turned.jpg", exif=tags)
    (seen / "notes.txt").write_text("x")
    words = ("--mode", "predict", "--checkpoint", tmp_path / "out/last.pt", "--images", seen)
    code, said = run(*words, "--output-dir", seen / "out")
    assert code == 0 and "1 other files" in said and "turned.jpg: " in said
    assert "turned upright, as its EXIF orientation 6 says" in said
    images = json.loads((seen / "out/predictions/detections.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["a.bmp", "b.tif", "c.JPG", "turned.jpg", "sub/d.png"]
    assert [(i["width"], i["height"]) for i in images if i["file_name"] == "turned.jpg"] == [(64, 96)]
    assert run(*words, "--output-dir", seen / "out")[0] == 0, "the pictures that were written are no input"
    again = json.loads((seen / "out/predictions/detections.json").read_text())["images"]
    assert len(again) == len(images)
    code, said = run(*words, "--exif", "ignore")
    assert code == 0 and "as stored, not turned as its EXIF orientation 6 says" in said
    (seen / "bad.jpg").write_text("404")
    code, said = run(*words)
    assert code == 2 and "leave it out" in said and "annotation file" not in said


@pytest.mark.parametrize(("listed", "turn"), [((64, 96), "auto"), ((96, 64), "apply"), ((96, 64), "ignore")])
def test_images_with_an_exif_orientation_train(run, data, listed, turn):
    tags = Image.Exif()
    tags[0x112] = 6 if listed == (64, 96) else 3
    for split in ("train", "val"):
        for image in data.content[split]["images"]:
            path = data.root / split / image["file_name"]
            Image.open(path).save(path, exif=tags)
            image |= dict(zip(("width", "height"), listed, strict=True))
    data.write("train", "val")
    code, said = run("--exif", turn, "--gallery", 1)
    told = "4 turned upright" if listed == (64, 96) else "4 of which the size does not tell"
    assert code == 0 and f"images with an EXIF orientation: {told}" in said
