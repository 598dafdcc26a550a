"""The notebook is executed, and shows pictures; what is committed of it holds no outputs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from detcore.training import checkpoint
from ssd300.model import SSD300

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "ssd300/inference.ipynb"


def test_no_outputs_and_no_paths_of_a_machine_are_committed():
    text = NOTEBOOK.read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert "/home/" not in text and "/root/" not in text and "/tmp/" not in text and "/work/" not in text


def test_it_runs_and_shows_pictures(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    scenes = [sys.executable, "tools/make_scenes.py", "--out", tmp_path, "--train", "1", "--val", "3", "--size", "64"]
    subprocess.run(scenes, cwd=ROOT, check=True, capture_output=True)
    torch.manual_seed(0)
    model = SSD300("resnet18", 6)
    state = {"model": model.state_dict(), "config": {"backbone": "resnet18"}}
    checkpoint.save(tmp_path / "epoch_0.pt", state | {"classes": [[i, f"shape {i}"] for i in range(6)]})
    monkeypatch.setenv("SSD300_CHECKPOINT", str(tmp_path / "epoch_0.pt"))
    monkeypatch.setenv("SSD300_IMAGES", str(tmp_path / "val"))
    monkeypatch.setenv("SSD300_THRESHOLD", "0.1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    there = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, timeout=200, kernel_name="python3", resources=there).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert text.count(".jpg") == 3 and "shape " in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
