"""Checkpoints of other programs as a run takes them: other classes, other networks."""

from pathlib import Path

import pytest
import torch

from detcore import UserError
from efficientdet import train
from efficientdet.config import Config
from efficientdet.model import EfficientDet

LITE, SIZE = "tf_efficientdet_lite0", (64, 64)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """effdet's checkpoint of a Lite0 that knows four classes."""
    path = tmp_path_factory.mktemp("lite") / "lite.pth.tar"
    state = {f"module.{k}": v for k, v in EfficientDet(LITE, 4, SIZE).state_dict().items()}
    torch.save({"epoch": 3, "arch": LITE, "state_dict": state}, path)
    return path


def config(file: Path, **more) -> Config:
    return Config(**{"model": LITE, "checkpoint": file, "input_size": SIZE[0], "dataset": "custom", **more})


def test_weights_only_trains_other_classes(file, capsys):
    """What begins with random weights is said, and nothing where all fits."""
    model = train.build_model(config(file, weights_only=True), 2)
    assert len(model.class_net.predict.conv_pw.bias) == 2 * 9
    said = (
        "knows another number of classes: the layer that predicts them (class_net.predict.conv_pw) begins with random"
    )
    assert f"{file} {said} weights" in capsys.readouterr().err
    train.build_model(config(file, weights_only=True), 4)
    assert capsys.readouterr().err == ""


def test_another_model_is_told_by_its_arch(file):
    with pytest.raises(UserError) as error:
        train.build_model(config(file, model="efficientdet_d0"), 4)
    assert str(error.value) == f"{file} says arch {LITE}, but --model is efficientdet_d0: give --model {LITE}"


@pytest.mark.parametrize("arch", [None, "resnet50", 5])
def test_another_model_without_an_arch_that_tells_is_one_sentence(file, tmp_path, arch):
    saved = torch.load(file, weights_only=True)
    torch.save({**saved, "arch": arch}, tmp_path / "x.pth")
    begins = f"{tmp_path}/x.pth {'(arch resnet50) ' if arch == 'resnet50' else ''}does not fit this model: missing "
    with pytest.raises(UserError) as error:
        train.build_model(config(tmp_path / "x.pth", model="efficientdet_d0"), 4)
    said = str(error.value)
    assert said.startswith(begins) and len(said) - len(begins) < 700, said
    assert "of the model's " in said and "unexpected " in said and "of the file's " in said


@pytest.mark.parametrize("arch", ["tf_efficientdet_lite0_ap", LITE])
def test_an_arch_that_fits_loads(file, tmp_path, arch):
    """Also one of another name; and, where parts are left out, of another model."""
    saved = torch.load(file, weights_only=True)
    torch.save({**saved, "arch": arch}, tmp_path / "x.pth")
    model = train.build_model(config(tmp_path / "x.pth"), 4)
    assert torch.equal(model.backbone.conv_stem.weight, saved["state_dict"]["module.backbone.conv_stem.weight"])
    torch.save({**saved, "arch": "efficientdet_d1"}, tmp_path / "x.pth")
    train.build_model(config(tmp_path / "x.pth", remove_weights=("class_net",)), 4)
