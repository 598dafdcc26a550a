"""The commands as scripts and as modules: their start, from anywhere, without torch; turned images; real data sets."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dataprep import verify_images
from dataprep.download_sets import METADATA
from dataprep.interpreter import command
from detcore.data.jpeg_header import read_header
from tests.dataprep.download_server import run, running
from tools import make_openimages

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "public-scripts"
COMMANDS = {
    "cityscapes_to_coco.py": "cityscapes",
    "coco_minival.py": "coco_minival",
    "download.py": "download",
    "openimages_to_coco.py": "openimages",
    "openimages_with_fiftyone.py": "openimages_fiftyone",
    "pack_dataset.py": "pack",
    "verify_dataset.py": "verify",
    "voc_to_coco.py": "voc",
    "waymo_to_coco.py": "waymo",
}
NEED_TORCH = {"verify_images"}
TORCH = re.compile(r"\| +torch\b", re.MULTILINE)


def started(words: list, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    return subprocess.run(words, cwd=cwd, env=environ, capture_output=True, text=True, timeout=60)


def test_every_script_is_known():
    assert {path.name for path in SCRIPTS.glob("*.py")} == {*COMMANDS, "run_module.py"}


@pytest.mark.parametrize("script", COMMANDS)
def test_help_from_anywhere_without_torch(tmp_path, script):
    """The same as a script and as a module; a folder of the package's name in the current one is not taken for it."""
    (tmp_path / "dataprep").mkdir()
    (tmp_path / "dataprep" / "__init__.py").write_text("raise SystemExit('the wrong package')")
    as_script = started([sys.executable, "-X", "importtime", SCRIPTS / script, "--help"], tmp_path)
    words = command(f"dataprep.{COMMANDS[script]}", "--help")
    as_module = started([words[0], "-X", "importtime", *words[1:]], tmp_path, PYTHONPATH=str(ROOT))
    for done in (as_script, as_module):
        assert done.returncode == 0 and "--help" in done.stdout, done.stderr
        assert "argparse" in done.stderr and not TORCH.search(done.stderr)
    assert as_script.stdout == as_module.stdout and f"{script} " in as_script.stdout
    as_documented = started([sys.executable, "-m", f"dataprep.{COMMANDS[script]}", "--help"], ROOT)
    assert as_documented.stdout == as_script.stdout


def test_what_imports_torch():
    """Of all modules, only the one that decodes."""
    light = [path.stem for path in sorted((ROOT / "dataprep").glob("*.py")) if path.stem not in NEED_TORCH]
    program = f"import importlib, sys\nfor name in {light}: importlib.import_module(f'dataprep.{{name}}')\n"
    done = started([sys.executable, "-c", program + "print('numpy' in sys.modules, 'torch' in sys.modules)"], ROOT)
    assert done.stdout == "True False\n", done.stderr
    for name in NEED_TORCH:
        done = started([sys.executable, "-c", f"import sys, dataprep.{name}; print('torch' in sys.modules)"], ROOT)
        assert done.stdout == "True\n", done.stderr


@pytest.fixture
def server():
    with running() as server:
        yield server


def test_downloaded_converted_and_verified_by_one_command(tmp_path, server):
    """The commands that follow are found from any folder, whatever has their package's name there."""
    for split in METADATA:
        make_openimages.make(tmp_path / "made", split, 20, 5, 24, 20, seed=4)
        for name, path, _ in METADATA[split]:
            file = tmp_path / "made" / split / name
            server.files[f"/meta/{path}"] = file.read_bytes() if file.exists() else b"{}"
        for path in (tmp_path / "made" / split / "data").iterdir():
            server.files[f"/images/{split}/{path.name}"] = path.read_bytes()
    (tmp_path / "dataprep.py").write_text("raise SystemExit('the wrong module')")
    done = run(server, "openimages", "-d", "set", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("content hash") == 2 and "fine, " in done.stdout
    assert (tmp_path / "set" / "validation" / "labels" / "openimages-mlperf.json").exists()


@pytest.mark.parametrize("name", ["verify_dataset.py", "pack_dataset.py", "openimages_to_coco.py"])
def test_started_with_an_interpreter_without_packages(tmp_path, name):
    """A line without .venv, the same program with its interpreter where there is one."""
    for folder in ("public-scripts", "dataprep", "detcore"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
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
    made = [make_openimages.jpeg(seed, 24) for seed in range(1, 60)]
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='6'/>"
    made.append(made[2][:2] + b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp + made[2][2:])
    seen = set()
    for number, data in enumerate(made):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(data)
        found = dict(verify_images._header(np.frombuffer(data, np.uint8), ".jpg"))
        orientation = read_header(path).orientation
        assert found.get("images with an EXIF orientation") == (str(orientation) if orientation > 1 else None)
        seen |= {orientation, found.get("images with an invalid EXIF orientation")}
    assert seen == {*range(9), None, "9"}


def test_the_real_data_sets(shared_data, tmp_path):
    for name in ("bccd", "dsb2018", "coco_permissive"):
        options = ["--full", "--partial", "--cache-dir", tmp_path, "--json", tmp_path / "report.json"]
        code = subprocess.run(
            [sys.executable, SCRIPTS / "verify_dataset.py", shared_data / name, *options], capture_output=True
        ).returncode
        report = json.loads((tmp_path / "report.json").read_text())
        assert code == (1 if report["problems"] else 0), name
        assert all(row["images"] == row["image_files"] for row in report["splits"]), name
