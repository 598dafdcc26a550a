"""`--checkpoint` with training: a run's own file goes on, any other gives its weights."""

import dataclasses

import pytest
import torch

from detcore import UserError
from detcore.config import to_dict
from detcore.processes.launcher import World
from detcore.training import checkpoint
from ssd300 import train
from ssd300.config import Config
from ssd300.model import SSD300

ONE = World(0, 1, 0, 1)


def config(folder, name="epoch_0.pt", **more) -> Config:
    given = {"num_classes": 2, "backbone": "resnet18", "dataset": "custom", "synthetic": True, "batch_size": 2} | more
    return Config(checkpoint=folder / name, output_dir=folder / "out", **given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """epoch_0.pt as a run of this program leaves it, epoch_12.pt as the original does."""
    folder = tmp_path_factory.mktemp("go_on")
    torch.manual_seed(0)
    model = SSD300("resnet18", 2).state_dict()
    then = to_dict(config(folder, epochs=1))
    generators = torch.zeros(1, 8, dtype=torch.uint8)
    state = {"model": model, "config": then, "world_size": 1, "step": 3, "generators": generators, "evaluations": []}
    checkpoint.save(folder / "epoch_0.pt", state)
    checkpoint.save(folder / "best.pt", state)
    theirs = {f"module.{name}": value for name, value in model.items()}
    torch.save({"epoch": 13, "iteration": 9, "optimizer": {}, "model": theirs}, folder / "epoch_12.pt")
    return folder


@pytest.mark.parametrize(("change", "said"), [({"accumulate": 2}, "accumulate was 1, is 2"), ({"num_classes": 5}, "")])
def test_other_settings_are_refused_before_anything_is_written(folder, change, said):
    with pytest.raises(UserError, match=r"--checkpoint .*epoch_0\.pt.*--weights-only") as caught:
        train.go_on(config(folder, **change), ONE)
    assert said in str(caught.value) and "--resume" not in str(caught.value) and not (folder / "out").exists()


def adopted(folder, name="epoch_0.pt", said=(), **given) -> Config:
    """What a config becomes of which the user said only `said`."""
    given = Config(checkpoint=folder / name, output_dir=folder / "out", **given)
    sources = {field.name: "command line" if field.name in said else "default" for field in dataclasses.fields(Config)}
    return train.adopt_checkpoint(given, sources)


def test_going_on_takes_the_settings_of_the_run(folder):
    """As in the original's command to resume, which names the checkpoint and the data alone."""
    ours = adopted(folder)
    assert (ours.backbone, ours.batch_size, ours.num_classes, ours.epochs) == ("resnet18", 2, 2, 65)
    assert train.go_on(dataclasses.replace(ours, output_dir=folder / "other"), ONE).resume
    with pytest.raises(UserError, match="batch_size was 2, is 8"):
        train.go_on(adopted(folder, batch_size=8, said=("batch_size",)), ONE)


def test_other_uses_take_the_network_alone(folder):
    for name in ("epoch_0.pt", "epoch_12.pt"):
        ours = adopted(folder, name, weights_only=True)
        assert (ours.backbone, ours.batch_size) == ("resnet18", 32)
    own = adopted(folder, "best.pt")
    assert (own.backbone, own.batch_size, own.dataset) == ("resnet18", 32, "coco")
    assert adopted(folder, "epoch_12.pt").backbone == "resnet18" and adopted(folder, "epoch_12.pt").batch_size == 32
    assert adopted(folder, "epoch_12.pt", mode="evaluation").backbone == "resnet18"


def test_another_data_set_under_the_same_settings_is_refused(folder, monkeypatch):
    monkeypatch.setattr(train, "class_count", lambda detector, config: 5)
    with pytest.raises(UserError, match="classes were 2, are 5"):
        train.go_on(config(folder), ONE)
    assert not (folder / "out").exists()


def test_the_runs_own_file_goes_on(folder, tmp_path, capsys):
    own = tmp_path / "epoch_0.pt"
    checkpoint.link_or_copy(folder / "epoch_0.pt", own)
    changed = train.go_on(config(tmp_path, epochs=9), ONE)
    assert changed.resume and not changed.checkpoint and (tmp_path / "out/last.pt").exists()
    assert capsys.readouterr().err == ""


def test_weights_alone_are_said(folder, capsys):
    """A file of the original starts over at epoch 0, and so does any with --weights-only."""
    for given in (config(folder, "epoch_12.pt"), config(folder, weights_only=True, accumulate=2)):
        assert train.go_on(given, ONE) is given
        said = capsys.readouterr().err
        assert f"{given.checkpoint}: its weights alone are taken; training starts with epoch 0" in said
    train.go_on(config(folder, "epoch_12.pt"), World(1, 2, 1, 2))
    assert capsys.readouterr().err == "" and not (folder / "out").exists()


@pytest.mark.parametrize("name", ["epoch_0.pt", "epoch_12.pt"])
def test_weights_only_trains_other_classes(folder, name, capsys):
    saved = torch.load(folder / "epoch_0.pt", weights_only=True)["model"]
    model = train.build_model(config(folder, name, weights_only=True), 5)
    state = model.state_dict()
    assert all(torch.equal(state[key], saved[key]) for key in saved if not key.startswith("conf."))
    assert len(model.conf[0].bias) == 4 * 6 and "start anew" in capsys.readouterr().err
    same = train.build_model(config(folder, name, weights_only=True), 2).state_dict()
    assert all(torch.equal(same[key], saved[key]) for key in saved) and capsys.readouterr().err == ""
    with pytest.raises(UserError, match=r"knows 2 classes, the data set has 5: .* --weights-only"):
        train.build_model(config(folder, name), 5)


def test_weights_only_wants_weights_and_training(folder):
    for wrong in ({"mode": "evaluation"}, {"checkpoint": None}):
        with pytest.raises(UserError, match="--weights-only"):
            Config(**({"checkpoint": folder / "epoch_0.pt"} | wrong), weights_only=True)
