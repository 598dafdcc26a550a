"""Evaluation and prediction with files of any name and checkpoints that are not what they should be."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from detcore import UserError
from detcore.cli import run_main
from detcore.detection.detector import classes_of_data
from detcore.training import checkpoint
from detcore.training.checkpoint import load_checkpoint
from single_stage_detector import train
from single_stage_detector.config import Config
from single_stage_detector.model import RetinaNet

SIZES = (8, 16, 24, 32, 48)
CONFIG = {
    "backbone": "resnet18", "norm": "batch", "fpn_channels": 8, "head_convs": 0, "image_size": [64, 64],
    "anchor_sizes": list(SIZES), "dataset": "custom",
}  # fmt: skip
CLASSES = [[1, "circle"], [2, "star"]]


@pytest.fixture(scope="module")
def state() -> dict:
    torch.manual_seed(0)
    model = RetinaNet("resnet18", 2, (64, 64), "batch", 3, 8, 0, SIZES)
    torch.nn.init.ones_(model.head["classification_head"].cls_logits.bias)  # it finds something everywhere
    return {"model": model.state_dict(), "ema": None, "config": CONFIG, "classes": CLASSES}


@pytest.fixture
def data(tmp_path):
    """A custom data set of one image, for training and validation."""
    (tmp_path / "set/annotations").mkdir(parents=True)
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 70, "width": 90}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 30, 30]}],
        "categories": [{"id": i, "name": name} for i, name in CLASSES],
    }
    for split in ("train", "val"):
        (tmp_path / f"set/{split}").mkdir()
        picture(tmp_path / f"set/{split}/1.jpg")
        (tmp_path / f"set/annotations/instances_{split}.json").write_text(json.dumps(content))
    return tmp_path / "set"


def picture(path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    Image.fromarray(pixels).save(os.fsencode(path), "JPEG")


def run(tmp_path, *words) -> int:
    device = ["--device", "cpu", "--workers", "0", "--output-dir", str(tmp_path / "out")]
    return run_main(train.main, ["--checkpoint", str(tmp_path / "x.pt"), *device, *map(str, words)])


def weights(state, change):
    return {**state, "model": {name: change(value) for name, value in state["model"].items()}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {**s, "ema": [1]}, "list under 'ema'"),
        (lambda s: {**s, "config": "x"}, "str under 'config'"),
        (lambda s: {**s, "classes": 5}, "int under 'classes'"),
        (lambda s: {**s, "classes": [1, 2]}, "1 among its classes"),
        (lambda s: {**s, "classes": [["a", 1]]}, r"\['a', 1\] among its classes"),
        (lambda s: weights(s, lambda w: w / 0 if w.is_floating_point() else w), "conv1.weight holds NaN or infinite"),
        (lambda s: weights(s, lambda w: w.to(torch.complex64)), "conv1.weight is of torch.complex64"),
        (lambda s: weights(s, lambda w: w.to(torch.int8)), "conv1.weight is of torch.int8"),
        (lambda s: weights(s, lambda w: w.to_sparse()), "conv1.weight is of .*sparse"),
        (lambda s: weights(s, lambda w: w.to("meta")), "conv1.weight is of"),
        (lambda s: {"w": torch.tensor([1.0, float("nan")])}, "w holds NaN"),
    ],
)
def test_a_checkpoint_of_other_content_is_refused(state, tmp_path, change, words):
    torch.save(change(state), tmp_path / "x.pt")
    with pytest.raises(UserError, match=rf"x\.pt.*{words}"):
        load_checkpoint(tmp_path / "x.pt")


def test_what_else_a_training_checkpoint_holds_is_no_matter(state, tmp_path):
    checkpoint.save(tmp_path / "x.pt", {**state, "generators": torch.zeros(2, 3, dtype=torch.uint8)})
    assert load_checkpoint(tmp_path / "x.pt").keys() == {*state, "generators"}


def test_a_wrong_setting_in_a_checkpoint_names_the_file(state, tmp_path, capsys):
    checkpoint.save(tmp_path / "x.pt", {**state, "config": {**CONFIG, "backbone": 5}})
    assert run(tmp_path, "--mode", "evaluate") == 2
    assert f"error: {tmp_path}/x.pt: stored configuration: backbone: 5" in capsys.readouterr().err


def test_predict_takes_files_of_any_name(state, tmp_path, capsys):
    checkpoint.save(tmp_path / "x.pt", {**state, "classes": [[1, "日本\n"], [2, "\x00🎉"]]})
    (tmp_path / "in").mkdir()
    for name in (b"caf\xe9.jpg", "日\n.jpg".encode(), b"a" * 251 + b".jpg", b"%s {x}.JPG"):
        picture(os.fsencode(tmp_path / "in") + b"/" + name)
    assert run(tmp_path, "--mode", "predict", "--images", tmp_path / "in", "--score-threshold", 0.001) == 0
    content = json.loads((tmp_path / "out/predictions/detections.json").read_text())
    assert len(content["images"]) == 4 and content["annotations"]
    assert len(list((tmp_path / "out/predictions").glob("*.jpg"))) == 4
    assert "Traceback" not in capsys.readouterr().err


def test_prediction_with_weights_that_do_not_name_their_classes(state, data, tmp_path, capsys):
    """They come from an annotation file, which is asked for with the reason, and whose images need not be there."""
    torch.save({"model": state["model"], "config": CONFIG}, tmp_path / "x.pt")
    words = ["--mode", "predict", "--images", data / "val/1.jpg"]
    assert run(tmp_path, *words, "--dataset-path", tmp_path / "none") == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/none/annotations/instances_val.json: cannot read the annotation file (No such" in said
    assert f"the names of the classes come from it, since {tmp_path}/x.pt has none: give --dataset-path" in said
    assert "--val-annotations-file FILE with its categories" in said
    file = (data / "annotations/instances_val.json").rename(tmp_path / "names.json")
    assert run(tmp_path, *words, "--dataset-path", tmp_path / "none", "--val-annotations-file", file) == 0
    content = json.loads((tmp_path / "out/predictions/detections.json").read_text())
    assert [[c["id"], c["name"]] for c in content["categories"]] == CLASSES
    named = [{"id": 0, "name": "circle"}, {"id": 9, "name": "star"}]
    listed = json.loads(file.read_text()) | {"annotations": [], "categories": named}
    file.write_text(json.dumps(listed))
    known = Config(mode="predict", images=data, checkpoint=tmp_path / "x.pt", val_annotations_file=file)
    for more, found in ({}, [(0, "circle"), (9, "star")]), ({"num_classes": 10}, [(0, "circle"), (9, "star")]):
        got = classes_of_data(dataclasses.replace(known, dataset="custom", **more), "x.pt")
        assert [entry for entry in got if entry in found] == found and len(got) == more.get("num_classes", 2)
    with pytest.raises(UserError, match=r"names.json: category 9 is none of the 5 classes of this model, 0 to 4"):
        classes_of_data(dataclasses.replace(known, dataset="custom", num_classes=5), "x.pt")


def test_images_that_cannot_be_read_are_left_out_and_listed(state, tmp_path, capsys):
    checkpoint.save(tmp_path / "x.pt", state)
    (tmp_path / "in").mkdir()
    picture(tmp_path / "in/a.jpg")
    (tmp_path / "in/b.jpg").write_bytes((tmp_path / "in/a.jpg").read_bytes()[:300])
    assert run(tmp_path, "--mode", "predict", "--images", tmp_path / "in") == 2
    err = capsys.readouterr().err
    assert "1 of 2 images left out" in err and f"{tmp_path}/in/b.jpg: " in err
    before = json.loads((tmp_path / "out/predictions/detections.json").read_text())
    assert [image["file_name"] for image in before["images"]] == ["a.jpg"]
    assert len(list((tmp_path / "out/predictions").glob("*.jpg"))) == 1
    assert run(tmp_path, "--mode", "predict", "--images", tmp_path / "in/b.jpg") == 2
    assert json.loads((tmp_path / "out/predictions/detections.json").read_text()) == before


def test_evaluation_on_other_classes_is_refused(state, data, tmp_path, capsys):
    checkpoint.save(tmp_path / "x.pt", {**state, "classes": [[0, "circle"], [1, "star"]]})
    assert run(tmp_path, "--mode", "evaluate", "--dataset-path", data) == 0
    assert (tmp_path / "out/evaluation.json").exists()
    shutil.rmtree(tmp_path / "out")
    checkpoint.save(tmp_path / "x.pt", {**state, "classes": [[1, "circle"], [2, "ring"]]})
    assert run(tmp_path, "--mode", "evaluate", "--dataset-path", data) == 2
    err = capsys.readouterr().err
    assert "x.pt was trained on other classes than" in err and "'ring' (id 2) is 'star' (id 2) there" in err
    assert not (tmp_path / "out").exists()
