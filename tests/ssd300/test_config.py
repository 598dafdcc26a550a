"""The flags of the original programs, by their own names, and what they mean here."""

import re

import pytest
import torch

from detcore import UserError
from detcore.config import load, to_dict
from ssd300 import train
from ssd300.config import ADOPTED, IGNORED_FLAGS, Config, translate_flags


def read(line: str, **environ: str):
    return load(Config, translate_flags(line.split()), environ, IGNORED_FLAGS)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("--data /x", "dataset_path", "/x"), ("-d /x", "dataset_path", "/x"), ("", "dataset_path", "/coco"),
        ("--epochs 3", "epochs", 3), ("-e 3", "epochs", 3), ("", "epochs", 65),
        ("--batch-size 8", "batch_size", 8), ("--bs 8", "batch_size", 8), ("", "batch_size", 32),
        ("--eval-batch-size 8", "eval_batch_size", 8), ("--ebs 8", "eval_batch_size", 8),
        ("--no-cuda", "device", "cpu"), ("--seed 4", "seed", 4), ("-s 4", "seed", 4),
        ("--checkpoint a.pt", "checkpoint", "a.pt"),
        ("--torchvision-weights-version IMAGENET1K_V1", "torchvision_weights_version", "IMAGENET1K_V1"),
        ("", "torchvision_weights_version", "IMAGENET1K_V2"),
        ("--save", "save", "models"), ("--save d", "save", "d"), ("--save --amp", "save", "models"), ("", "save", None),
        ("--mode training", "mode", "train"), ("--mode=evaluation --checkpoint x", "mode", "evaluate"),
        ("--mode benchmark-training", "mode", "benchmark-training"),
        ("--mode benchmark-inference", "mode", "benchmark-inference"),
        ("--evaluation 1 2 5", "evaluation", [1, 2, 5]), ("", "evaluation", [21, 31, 37, 42, 48, 53, 59, 64]),
        ("--evaluation", "evaluation", []), ("--evaluation --bs 4", "evaluation", []), ("--multistep", "multistep", []),
        ("--multistep -b 4", "multistep", []), ("--multistep 7 9 --bs 4", "multistep", [7, 9]),
        ("", "multistep", [43, 54]),
        ("--learning-rate 0.1", "lr", 0.1), ("--lr 0.1", "lr", 0.1), ("", "lr", 2.6e-3),
        ("--momentum 0.8", "momentum", 0.8), ("-m 0.8", "momentum", 0.8), ("--wd 0", "weight_decay", 0.0),
        ("--weight-decay 0", "weight_decay", 0.0), ("", "weight_decay", 5e-4),
        ("--warmup 300", "warmup", 300), ("", "warmup", None),
        ("--benchmark-iterations 5", "benchmark_iterations", 5), ("", "benchmark_iterations", 20),
        ("--benchmark-warmup 5", "benchmark_warmup", 5), ("", "benchmark_warmup", 20),
        ("--backbone resnet34", "backbone", "resnet34"), ("", "backbone", "resnet50"),
        ("--backbone-path w.pth", "weights", "w.pth"), ("--num-workers 2", "workers", 2), ("", "workers", 8),
        ("", "precision", "tf32"), ("--amp", "precision", "auto"), ("--no-amp", "precision", "tf32"),
        ("--no-amp --no-allow-tf32", "precision", "fp32"), ("--no-allow-tf32", "precision", "fp32"),
        ("--no-allow-tf32 --no-amp", "precision", "fp32"), ("--no-amp --allow-tf32", "precision", "tf32"),
        ("--no-allow-tf32 --amp", "precision", "auto"), ("--no-allow-tf32 --allow-tf32", "precision", "tf32"),
        ("--amp --no-amp --no-allow-tf32", "precision", "fp32"), ("--no-amp --amp", "precision", "auto"),
        ("--amp --no-allow-tf32", "precision", "auto"), ("--amp --allow-tf32", "precision", "auto"),
        ("--precision fp16", "precision", "fp16"), ("--precision fp16 --no-allow-tf32", "precision", "fp16"),
        ("--no-allow-tf32 --precision=bf16", "precision", "bf16"), ("--precision fp16 --no-amp", "precision", "tf32"),
        ("--precision tf32 --no-allow-tf32", "precision", "fp32"), ("--amp --precision tf32", "precision", "tf32"),
        ("--no-allow-tf32 --precision tf32", "precision", "tf32"), ("", "antialias", True),
        ("--log-interval 7", "log_interval", 7),
        ("--json-summary s.json", "json_summary", "s.json"), ("--accumulation 8", "accumulate", 8),
        ("--fake_data", "synthetic", True), ("--fake-data", "synthetic", True),
    ],
)  # fmt: skip
def test_flags_of_the_original(line, name, value):
    loaded = read(line)
    assert to_dict(loaded.config)[name] == value and loaded.notices == []


@pytest.mark.parametrize(
    "line",
    [
        "--local_rank 1", "--local_rank=1", "--local-rank 1", "--local-rank=1", "--data-layout channels_last",
        "--parallel_loader", "--suppress_loss_report",
    ],
)  # fmt: skip
def test_flags_without_a_meaning_here_are_taken_and_said(line):
    loaded = read(f"{line} --bs 4")
    assert loaded.config.batch_size == 4 and len(loaded.notices) == 1 and "no effect" in loaded.notices[0]


def test_evaluation_after_the_listed_epochs_and_the_last():
    config = read("--epochs 30").config
    assert [n for n in range(1, 31) if config.evaluates(n, 30)] == [22, 30]
    assert not read("--fake-data").config.evaluates(65, 65)


def test_bare_lists_are_empty():
    config = read("--epochs 3 --evaluation --multistep").config
    assert [n for n in range(1, 4) if config.evaluates(n, 3)] == [3] and config.decay_epochs == ()
    with pytest.raises(UserError, match="--evaluation: '-3'"):
        read("--evaluation -3")


def test_decay_is_an_epoch_earlier_with_legacy():
    assert read("").config.decay_epochs == (43, 54)
    assert read("--legacy").config.decay_epochs == (42, 53)


def test_the_log_is_never_of_the_closed_division():
    assert read("").config.mlperf_division == "open"
    with pytest.raises(UserError, match="open"):
        read("", MLPERF_DIVISION="closed")


@pytest.mark.parametrize("line", ["--image-size 512", "--image_size=512"])
def test_another_image_size_is_refused_for_what_it_is(line):
    with pytest.raises(UserError, match="300x300 pixels only"):
        read(line)


@pytest.mark.parametrize("line", ["--multistep 5 3", "--mode evaluation", "--mode predict --checkpoint x", "--bs 0"])
def test_what_does_not_fit_is_refused(line):
    with pytest.raises(UserError):
        read(line)


@pytest.mark.parametrize("mode", ["training", "benchmark", "benchmark-training"])
def test_training_on_single_images_is_refused(mode):
    with pytest.raises(UserError, match="one cell"):
        read(f"--bs 1 --mode {mode}")
    assert read(f"--bs 1 --sync-bn --mode {mode}").config.batch_size == 1


def test_one_image_at_a_time_is_enough_without_training():
    assert read("--bs 1 --mode evaluation --checkpoint a.pt").config.batch_size == 1
    assert read("--bs 1 --mode benchmark-inference").config.batch_size == 1


def test_only_the_recipe_of_the_original_has_no_departures():
    assert read("--bs 256 --lr 2.7e-3 --warmup 1200 --amp").config.departures() == []
    assert read("--backbone resnet18").config.departures() == ["backbone resnet18"]
    assert read("--augmentation flip --optimizer adam").config.departures() == ["augmentation flip", "optimizer adam"]


def test_weights_that_nobody_has_are_refused_where_asked_for():
    wish = ["--torchvision-weights-version", "IMAGENET1K_V2", "--print-config"]
    small = ["--backbone", "resnet34", "--print-config"]
    with pytest.raises(UserError, match=r"--torchvision-weights-version IMAGENET1K_V2: .*V1 alone of resnet34"):
        train.main(wish + small)
    assert train.main(wish) == train.main(small) == 0


def test_evaluation_takes_the_model_and_the_data_over_from_the_checkpoint(tmp_path, capsys):
    """All that ADOPTED names, each with another value than the default, but what the user says."""
    paths = {
        f"{split}_{kind}": f"/d/{split}" for split in ("train", "val") for kind in ("data_path", "annotations_file")
    }
    stored = {"backbone": "resnet34", "predictor_norm": True, "antialias": False, "dataset": "custom", **paths}
    stored |= {"dataset_path": "/d", "shards": "/s", "exif": "ignore", "num_classes": 7}
    assert set(stored) == set(ADOPTED) and all(to_dict(Config())[name] != value for name, value in stored.items())
    torch.save({"model": {}, "config": stored | {"lr": 1.0}}, tmp_path / "epoch_0.pt")
    words = ["--mode", "evaluation", "--checkpoint", str(tmp_path / "epoch_0.pt"), "--print-config"]
    for more in ([], ["--backbone", "resnet18"]):
        assert train.main(words + more) == 0
        shown = dict(re.findall(r"^(\w+) += (\S+)", capsys.readouterr().out, re.M))
        expected = stored | ({"backbone": "resnet18"} if more else {})
        assert [shown[name] for name in expected] == [str(value).lower() for value in expected.values()]
    assert train.main([*words, "--data", "/own"]) == 0
    shown = dict(re.findall(r"^(\w+) += (\S+)", capsys.readouterr().out, re.M))
    assert (shown["dataset"], shown["dataset_path"], shown["backbone"]) == ("custom", "/own", "resnet34")
    assert all(shown[name] == "none" for name in (*paths, "shards")), "parts of another data set"
