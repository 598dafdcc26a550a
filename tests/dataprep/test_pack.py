"""pack_dataset.py as a person calls it; test_shard_writer.py has what it writes."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataprep import pack
from detcore.cli import run_main


@pytest.fixture
def data(tmp_path) -> Path:
    """Twelve training and three validation images in the layout `custom`."""
    rng = np.random.default_rng(1)
    for split, count in (("train", 12), ("val", 3)):
        (tmp_path / "data" / split).mkdir(parents=True)
        content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
        for number in range(count):
            pixels = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
            pixels.save(tmp_path / "data" / split / f"{number}.jpg")
            content["images"].append({"id": number, "file_name": f"{number}.jpg", "height": 30, "width": 40})
        (tmp_path / "data/annotations").mkdir(exist_ok=True)
        (tmp_path / f"data/annotations/instances_{split}.json").write_text(json.dumps(content))
    return tmp_path / "data"


def call(*words) -> int:
    return run_main(pack.main, [str(word) for word in words])


def test_both_splits(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(data, out, "--shard-size", "11k", "--shuffle", 5) == 0
    said = capsys.readouterr()
    assert "12 images in" in said.out and "3 images in" in said.out and f"--shards {out}" in said.out
    assert "packing train: 12 of 12 (100%)" in said.err and "ETA" in said.err
    assert call(data, out, "--shard-size", "11k", "--shuffle", 5) == 0
    said = capsys.readouterr()
    assert "written now: 0 shards" in said.out and "unknown" not in said.err and "0/s" not in said.err
    assert call(out, "--check") == 0
    assert "are as they were packed" in capsys.readouterr().out
    path = out / "val" / "00000.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert call(out, "--check") == 2
    assert "00000.tar" in capsys.readouterr().err
    assert call(data, out) == 2
    assert "--shard-size 11k, now 1G, --shuffle 5, now none" in capsys.readouterr().err
    assert call(data, out, "--force") == 0


def test_one_split_and_a_pair_by_its_paths(data, tmp_path, capsys):
    assert call(data, tmp_path / "a", "--split", "val") == 0
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["val"]
    parts = ["--annotations", data / "annotations/instances_val.json", "--images", data / "val"]
    assert call(tmp_path / "b", *parts, "--split", "val") == 0
    for path in (tmp_path / "a/val").iterdir():
        assert path.read_bytes() == (tmp_path / "b/val" / path.name).read_bytes()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["DIR", "OUT", "--shard-size", "big"], "no size such as"),
        (["DIR", "OUT", "--shard-size", "1k"], "10 kB at least"),
        (["DIR"], "OUT"),
        (["DIR", "/proc/nowhere"], "/proc/nowhere/train: cannot be made (No such file or directory)"),
        (["OUT", "OUT"], "no such folder"),
        (["DIR", "OUT", "--layout", "coco", "--split", "train"], "instances_train2017.json"),
        (["OUT", "--annotations", "a.json"], "belong together"),
        (["OUT", "--annotations", "DIR/annotations/instances_val.json", "--images", "DIR/val"], "--split"),
        (["DIR", "--check"], "holds no shards"),
    ],
)
def test_mistakes(data, tmp_path, capsys, words, expected):
    words = [word.replace("DIR", str(data)).replace("OUT", str(tmp_path / "out")) for word in words]
    try:
        code = call(*words)
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr().err
    assert code == 2 and expected in said and "Traceback" not in said


def test_an_image_that_went(data, tmp_path, capsys):
    (data / "train" / "3.jpg").unlink()
    assert call(data, tmp_path / "out") == 2
    assert "1 of the 12 images" in capsys.readouterr().err
    shutil.copy(data / "train" / "4.jpg", data / "train" / "3.jpg")
    assert call(data, tmp_path / "out") == 0


def test_as_a_program_without_torch(data, tmp_path):
    script = Path(__file__).resolve().parents[2] / "public-scripts" / "pack_dataset.py"
    words = [sys.executable, "-X", "importtime", script, data, tmp_path / "out"]
    done = subprocess.run(words, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0 and f"train with --shards {tmp_path / 'out'}" in done.stdout
    assert "dataprep.shard_writer" in done.stderr and not re.search(r"\| +torch\b", done.stderr)
