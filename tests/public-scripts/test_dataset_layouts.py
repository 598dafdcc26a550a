"""What the tools for data sets share: their start without packages, and a turned image, and the real data sets."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from detcore.data import verify

SCRIPT = Path(__file__).resolve().parents[2] / "public-scripts" / "verify_dataset.py"


@pytest.mark.parametrize("name", ["verify_dataset.py", "pack_dataset.py", "openimages_to_coco.py"])
def test_started_with_an_interpreter_without_packages(tmp_path, name):
    """A line without .venv, the same program with its interpreter where there is one."""
    for folder in ("public-scripts", "detcore"):
        shutil.copytree(SCRIPT.parents[1] / folder, tmp_path / folder)
    bare = [sys._base_executable, "-S", "-E", tmp_path / "public-scripts" / name, "nowhere", "out"]
    bare = bare[: -1 if name != "pack_dataset.py" else None]
    done = subprocess.run(bare, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "has no numpy, msgspec" in done.stderr and "make setup" in done.stderr
    assert done.stderr.count("\n") == 1
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(bare, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: nowhere") and done.stderr.count("\n") == 1


def test_orientations_as_the_converter_counts_them(tmp_path):
    """The same files as openimages_to_coco.py; XMP's orientation, which Pillow reports as well, is none."""
    modules = []
    for source in (SCRIPT.with_name("jpeg_header.py"), SCRIPT.parents[1] / "tools/make_openimages.py"):
        spec = importlib.util.spec_from_file_location(f"own_{source.stem}", source)
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        modules.append(module)
    header, tool = modules
    made = [tool.jpeg(seed, 24) for seed in range(1, 60)]
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='6'/>"
    made.append(made[2][:2] + b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp + made[2][2:])
    seen = set()
    for number, data in enumerate(made):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(data)
        found = dict(verify._header(np.frombuffer(data, np.uint8), ".jpg"))
        orientation = header.read_header(path).orientation
        assert found.get("images with an EXIF orientation") == (str(orientation) if orientation > 1 else None)
        seen |= {orientation, found.get("images with an invalid EXIF orientation")}
    assert seen == {*range(9), None, "9"}


def test_the_real_data_sets(shared_data, tmp_path):
    for name in ("bccd", "dsb2018", "coco_permissive"):
        options = ["--full", "--partial", "--cache-dir", tmp_path, "--json", tmp_path / "report.json"]
        code = subprocess.run([sys.executable, SCRIPT, shared_data / name, *options], capture_output=True).returncode
        report = json.loads((tmp_path / "report.json").read_text())
        assert code == (1 if report["problems"] else 0), name
        assert all(row["images"] == row["image_files"] for row in report["splits"]), name
