"""What stands in place of a file of weights is named, whoever reads it, and torch's own words stay away."""

import io
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from detcore import UserError, torch_file
from detcore.nn.weights import read_weights
from detcore.training.checkpoint import load_checkpoint
from maskrcnn import weight_files

READERS = {"checkpoint.pth": load_checkpoint, "backbone.pth": read_weights, "mask.pth": weight_files.read,
           "caffe2.pkl": weight_files.read}  # fmt: skip
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 178090079\n"
SAFETENSORS = json.dumps({"w": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()


def archive() -> bytes:
    sink = io.BytesIO()
    torch.save({"w": torch.arange(500.0)}, sink)
    return sink.getvalue()


WRONG = {
    "empty": (b"", "is empty (0 bytes)"),
    "text": (b"weights: see the shared drive\n" * 3, "is text (it begins with 'weights: see the shared drive')"),
    "long text": ("naïve Lösung, ".encode() * 900, "is text"),
    "yaml": (b"MODEL:\n  WEIGHT: x\n", "is text (it begins with 'MODEL:')"),
    "page": (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "is HTML or XML, as a server sends it"),
    "error of a store": (b"\xef\xbb\xbf<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "HTML or XML"),
    "pointer": (LFS.encode(), "is a Git LFS pointer, not the file itself: git lfs pull"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0\0\3", "is a gzip file: gunzip it first"),
    "safetensors": (struct.pack("<Q", len(SAFETENSORS)) + SAFETENSORS, "is a file of safetensors"),
    "noise": (bytes(range(128, 256)) * 4, "fetch it again"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", READERS)
def test_what_the_file_is_instead(tmp_path, name, kind):
    content, words = WRONG[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        READERS[name](tmp_path / name)
    said = str(error.value)
    assert said.startswith(str(tmp_path / name)) and words.lower() in said.lower()
    assert "weights_only" not in said and "Weights only" not in said and "\n" not in said


@pytest.mark.parametrize("kept", [0.2, 0.6, 0.99])
@pytest.mark.parametrize("name", [name for name in READERS if name.endswith(".pth")])
def test_an_archive_that_is_cut_off(tmp_path, name, kept):
    whole = archive()
    (tmp_path / name).write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(UserError, match=rf"{name} \([\d,]+ bytes\) is cut off"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("name", [name for name in READERS if name.endswith(".pth")])
def test_a_changed_weight_is_found(tmp_path, name):
    damaged = bytearray(archive())
    damaged[damaged.index(np.arange(500, dtype="<f4").tobytes()) + 900] ^= 1
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        READERS[name](tmp_path / name)


def test_code_is_named_and_not_run(tmp_path):
    torch.save({"calls": os.system}, tmp_path / "code.pth")
    with pytest.raises(UserError, match=r"holds more than weights and plain values: .*system"):
        torch_file.read(tmp_path / "code.pth")


def test_what_torch_writes_is_read(tmp_path):
    for zipped in (True, False):
        torch.save({"w": torch.ones(2)}, tmp_path / "good.pth", _use_new_zipfile_serialization=zipped)
        assert torch.equal(torch_file.read(Path(tmp_path / "good.pth"))["w"], torch.ones(2))
