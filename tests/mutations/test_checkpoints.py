"""Damaged and foreign checkpoints: refused by name, or every tensor has the bits that were saved."""

import copy
import io
import json
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from detcore import UserError
from detcore.nn.weights import load_exactly
from detcore.training import checkpoint
from detcore.training.checkpoint import load_checkpoint
from single_stage_detector.model import load_reference_state

ROOT = Path(__file__).resolve().parents[2]


def a_state(seed: int = 0) -> dict:
    torch.manual_seed(seed)
    return {
        "model": {f"layer{i}.weight": torch.randn(9, 4) for i in range(4)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(9, 4)}}, "groups": [{"lr": 0.1}]},
        "step": 12,
        "classes": [[1, "cat"], [2, "dog"]],
        "config": {"backbone": "resnet18", "image_size": [64, 64]},
        "ema": None,
    }


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def damaged(whole: bytes, other: bytes, rng: random.Random) -> bytes:
    data, at, kind = bytearray(whole), rng.randrange(len(whole)), rng.randrange(8)
    if kind <= 1:
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif kind == 4:
        del data[at : at + rng.randint(1, 300)]
    elif kind == 5:
        data += bytes(rng.randint(1, 100)) if rng.random() < 0.5 else other[: rng.randrange(len(other))]
    elif kind == 6:  # the beginning of one file and the end of another
        data[at:] = other[at:]
    else:  # the last kilobyte: the archive's table of contents and the hash
        data[-rng.randint(1, 1000)] = rng.randrange(256)
    return bytes(data)


def refused(path: Path, **how) -> bool:
    """Whether load refuses it, in one line that names the file; a state that it returns is kept in refused.state."""
    try:
        refused.state = checkpoint.load(path, **how)
    except UserError as error:
        assert path.name in str(error) and "Traceback" not in str(error) and "\n" not in str(error)
        return True
    return False


@pytest.mark.parametrize("seed", range(3))
def test_our_own_files(tmp_path, seed):
    for i in (0, 1):
        checkpoint.save(tmp_path / f"{i}.pt", a_state(i))
    whole, other = ((tmp_path / f"{i}.pt").read_bytes() for i in (0, 1))
    rng = random.Random(seed)
    for case in range(250):
        data = damaged(whole, other, rng)
        if data in (whole, other):
            continue
        (tmp_path / "bad.pt").write_bytes(data)
        for required in (True, False):
            assert refused(tmp_path / "bad.pt", require_hash=required), f"case {case}, {required}"


@pytest.mark.parametrize("seed", range(2))
def test_files_of_other_programs(tmp_path, seed):
    files = [io.BytesIO(), io.BytesIO()]
    for i, file in enumerate(files):
        torch.save(a_state(i), file)
    whole, other = (file.getvalue() for file in files)
    rng, states = random.Random(seed), (a_state(0), a_state(1))
    for case in range(300):
        (tmp_path / "bad.pt").write_bytes(damaged(whole, other, rng))
        assert refused(tmp_path / "bad.pt"), "no hash, no resume"
        if not refused(tmp_path / "bad.pt", require_hash=False):
            assert any(equal(refused.state, state) for state in states), f"case {case}"


LEGACY = """
import io, json, random, resource, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_checkpoints import a_state, damaged, refused
folder = Path(sys.argv[1])
files = [io.BytesIO(), io.BytesIO()]
for i, file in enumerate(files):
    torch.save(a_state(i), file, _use_new_zipfile_serialization=False)
whole, other = (file.getvalue() for file in files)
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (2 << 30), now + (2 << 30)))
rng, count = random.Random(int(sys.argv[2])), 0
for case in range(300):
    (folder / "bad.pth").write_bytes(damaged(whole, other, rng))
    assert refused(folder / "bad.pth"), case
    count += refused(folder / "bad.pth", require_hash=False)
print(json.dumps(count))
"""


def test_files_of_very_old_programs_do_not_end_the_process(tmp_path):
    """They carry no checksum, so that changed numbers stay unseen; nothing else may happen."""
    program = [sys.executable, "-c", LEGACY, tmp_path, "0", Path(__file__).parent]
    result = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert 100 < json.loads(result.stdout) < 300


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('code was run')",)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        b"PK\x05\x06" + bytes(18),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n",
        b"<html>404</html>",
        pickle.dumps({"model": 1}),
        pickle.dumps(Evil()),
        pickle.dumps([1, 2]),
        b"\x80\x02" + b"(" * 5000,
        bytes(5000),
        json.dumps({"model": {}}).encode(),
    ],
)
@pytest.mark.parametrize("required", [True, False])
def test_other_kinds_of_file(tmp_path, content, required):
    (tmp_path / "x.pt").write_bytes(content)
    if not refused(tmp_path / "x.pt", require_hash=required):
        assert not required and refused.state == {"model": 1}, "a plain pickle of a dict is all that may pass"


@pytest.mark.parametrize("value", [Evil(), [1], torch.ones(2), None, 5])
def test_archives_that_hold_no_state(tmp_path, value):
    torch.save(value, tmp_path / "x.pt")
    assert refused(tmp_path / "x.pt") and refused(tmp_path / "x.pt", require_hash=False)
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("notes.txt", "not a checkpoint")
    assert refused(tmp_path / "x.pt", require_hash=False)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_classes = 3
        for i in range(4):
            self.add_module(f"layer{i}", nn.Linear(4, 9, bias=False))


@pytest.mark.parametrize("seed", range(2))
def test_whole_files_of_other_content(tmp_path, seed):
    """Right hash, wrong content: loading into the model is refused by name, or gives exactly what the file holds."""
    rng, loaded = random.Random(seed), 0
    values = [None, 5, "x", b"x", [], {}, [1], {"x": 1}, torch.ones(3), torch.ones(9, 4) * float("nan"), -1, 10**30,
              torch.ones(9, 4, dtype=torch.int64), torch.ones(9, 4, dtype=torch.complex64), torch.zeros(0),
              torch.ones(9, 4, device="meta"), torch.eye(9)[:, :4].to_sparse(), torch.ones(9, 4, dtype=torch.half),
              {"layer0.weight": torch.ones(9, 4)}, [[1, "a"]], [["a", 1]], True]  # fmt: skip
    for case in range(250):
        state = a_state()
        for _ in range(rng.randint(1, 2)):
            parent = rng.choice([state, state, state["model"] if isinstance(state.get("model"), dict) else state])
            key = rng.choice(list(parent))
            kind = rng.randrange(4)
            if kind == 0:
                del parent[key]
            elif kind == 1:
                parent[rng.choice([0, None, "module." + str(key), "other", f"{key}.weight"])] = parent.pop(key)
            else:
                parent[key] = copy.copy(rng.choice(values))
        torch.save(state, tmp_path / "x.pt")
        model, path = Tiny(), tmp_path / "x.pt"
        try:
            saved = load_checkpoint(path)
            load_reference_state(model, saved.get("ema") or saved, str(path))
        except UserError as error:
            assert "x.pt" in str(error), f"case {case}: {error}"
            continue
        loaded += 1
        source = state.get("ema") or state.get("model", state)
        for name, weight in model.state_dict().items():
            held = source.get(name, source.get("module." + name))
            assert torch.equal(weight, held.to(weight.dtype)) and weight.isfinite().all(), f"case {case}"
    assert 10 < loaded < 200


def test_the_checkpoint_of_another_model(tmp_path):
    for wrong in (nn.Linear(4, 9), nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), nn.Identity()):
        checkpoint.save(tmp_path / "x.pt", {"model": dict(wrong.state_dict())})
        with pytest.raises(UserError, match=r"x\.pt does not fit this model"):
            load_exactly(Tiny(), load_checkpoint(tmp_path / "x.pt")["model"], str(tmp_path / "x.pt"))
