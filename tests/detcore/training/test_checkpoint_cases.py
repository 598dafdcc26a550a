"""Checkpoints as other programs write them: what is harmless loads, what is not is named."""

import argparse
import datetime
import os
import pickle
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from detcore import UserError
from detcore.training.checkpoint import load_checkpoint

WEIGHTS = {"a.weight": torch.arange(4.0), "b.bias": torch.ones(2)}


def loaded(tmp_path: Path, content, **options) -> dict:
    torch.save(content, tmp_path / "x.pth", **options)
    return load_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_what_the_mlperf_reference_and_torchvision_write(tmp_path, zipped):
    args = argparse.Namespace(lr=1e-4, device="cuda", path=Path("/a/b"), image_size=[800, 800], none=None)
    content = {"model": WEIGHTS, "optimizer": {"state": {}}, "epoch": 3, "args": args}
    saved = loaded(tmp_path, content, _use_new_zipfile_serialization=zipped)
    assert saved["epoch"] == 3 and saved["args"].lr == 1e-4 and str(saved["args"].path) == "/a/b"
    assert all(torch.equal(saved["model"][name], value) for name, value in WEIGHTS.items())


@pytest.mark.parametrize(
    "value",
    [
        np.float64(0.5), np.int64(3), np.bool_(True), np.arange(5.0), np.array(["a", "b"]), np.float32(1).dtype,
        datetime.datetime(2026, 1, 2, 3), defaultdict(list, {"x": [1]}), Path("rel/x"), {"deep": [np.float32(2)]},
    ],
)  # fmt: skip
def test_harmless_values_beside_the_weights(tmp_path, value):
    found = loaded(tmp_path, {"model": WEIGHTS, "more": value})["more"]
    if isinstance(value, np.ndarray):
        np.testing.assert_array_equal(found, value)
    else:
        assert found == value if isinstance(value, dict) else str(found) == str(value)


class Foreign:
    """A type of some program."""


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("/nonexistent/harm",)


@pytest.mark.parametrize(("value", "name"), [(Foreign(), "Foreign"), (Harmful(), "mkdir"), (torch.nn.ReLU(), "ReLU")])
def test_other_types_are_named_and_run_nothing(tmp_path, value, name):
    with pytest.raises(UserError, match=rf"x\.pth holds more than weights and plain values: .*{name}.*state_dict"):
        loaded(tmp_path, {"model": WEIGHTS, "more": value})


def test_the_allowance_ends_with_the_call(tmp_path):
    loaded(tmp_path, {"model": WEIGHTS, "args": argparse.Namespace()})
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.pth", weights_only=True)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.module.", "model.module."])
@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", None])
def test_weights_by_other_names(tmp_path, key, prefix):
    weights = {prefix + name: value for name, value in WEIGHTS.items()}
    saved = loaded(tmp_path, weights if key is None else {key: weights, "pytorch-lightning_version": "2.5"})
    assert list(saved["model"] if key else saved) == list(WEIGHTS)


def test_a_prefix_that_not_all_share_stays(tmp_path):
    weights = {"model.a": torch.ones(1), "head.a": torch.ones(1)}
    assert list(loaded(tmp_path, {"state_dict": weights})["model"]) == list(weights)


def test_a_checkpoint_of_another_benchmark_is_told_before_its_entries(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"model": WEIGHTS, "config": {"epochs": 1}, "program": "efficientdet"}, path)
    with pytest.raises(UserError, match=r"x\.pth is a checkpoint of efficientdet, this is ssd300"):
        load_checkpoint(path, "ssd300")
    assert load_checkpoint(path, "efficientdet").keys() == load_checkpoint(path).keys()
    torch.save({"model": WEIGHTS, "program": "somebody's"}, path)
    assert load_checkpoint(path, "ssd300")["program"] == "somebody's", "a word of another program, not of this one"
