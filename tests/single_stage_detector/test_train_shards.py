"""Training from shards: the losses, weights and metrics of training from files, to the bit, without the files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dataprep import shard_writer
from detcore.data.coco import CocoIndex
from tests import programs
from tests.programs import ROOT

SMALL = [
    "--dataset", "custom", "--backbone", "resnet18", "--norm", "batch", "--trainable-backbone-layers", "5",
    "--no-pretrained", "--fpn-channels", "16", "--head-convs", "1", "--image-size", "64", "64", "--anchor-sizes",
    "8,16,24,32,48", "--max-boxes", "16", "--batch-size", "2", "--workers", "0", "--lr", "1e-3", "--log-interval", "1",
    "--division", "open", "--device", "cpu", "--target-map", "0.99", "--warmup-epochs", "0", "--seed", "3",
    "--epochs", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Ten training and five validation scenes, and their shards below `shards`."""
    folder = tmp_path_factory.mktemp("scenes")
    command = [sys.executable, "tools/make_scenes.py", "--out", folder, "--train", "10", "--val", "5", "--size", "64"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for split in ("train", "val"):
        index = CocoIndex.open(folder / f"annotations/instances_{split}.json", folder / split)
        shard_writer.pack(index, folder / "shards" / split, shard_bytes=10_240, shuffle=9)
    return folder


def train(data: Path, out: Path, *more: object, processes: int = 1) -> subprocess.CompletedProcess:
    head = [sys.executable, "-m"]
    if processes > 1:
        head += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    paths = ["--dataset-path", data, "--output-dir", out]
    return programs.run([*head, "single_stage_detector.train", *SMALL, *paths, *more])


def record(out: Path) -> list[tuple]:
    """Losses of every step and metrics of every evaluation, as written."""
    lines = [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]
    return [
        (line["step"], line.get("terms"), line.get("metrics")) for line in lines if line["kind"] in ("step", "eval")
    ]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_same_losses_weights_and_metrics(scenes, tmp_path, processes):
    straight = train(scenes, tmp_path / "files", processes=processes)
    assert "NOT reached in 2 epochs" in straight.stderr, straight.stderr
    bare = tmp_path / "data"  # the annotations alone: no image file is needed any more
    shutil.copytree(scenes / "annotations", bare / "annotations", ignore=shutil.ignore_patterns(".*"))
    more = ("--shards", scenes / "shards", "--read-ahead", "--gallery", "2", "--workers", "1")
    packed = train(bare, tmp_path / "shards", *more, processes=processes)
    assert "NOT reached in 2 epochs" in packed.stderr, packed.stderr
    first, second = record(tmp_path / "files"), record(tmp_path / "shards")
    assert first == second and len(first) == (12 if processes == 1 else 6)
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("files", "shards"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "reading ahead" in packed.stderr and len(list((tmp_path / "shards/gallery").iterdir())) == 2


def test_mistakes(scenes, tmp_path):
    for more, words in [
        (("--shards", tmp_path / "nowhere"), "nowhere/train: there is no such folder, the training images of"),
        (("--read-ahead",), "--read-ahead: only shards are read ahead"),
    ]:
        failed = train(scenes, tmp_path / "out", *more)
        assert failed.returncode == 2 and words in failed.stderr
