"""Checkpoints: what is saved comes back, what is damaged is refused, and no failure costs the file that was there."""

import errno
import hashlib
import os
import resource
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from detcore import UserError
from detcore.training import checkpoint

ROOT = Path(__file__).resolve().parents[3]


def state_of(seed=0, size=100):
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": OrderedDict(w=torch.randn(size, generator=generator), n=torch.tensor(seed)),
        "half": torch.randn(3, 2, generator=generator).bfloat16(),
        "step": 7,
        "lr": 0.1,
        "note": "é",
        "none": None,
        "flags": [True, (1, 2.5, "x")],
        "nested": {1: {"a": torch.empty(0, 7)}},
    }


def same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert a == b
    return True


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, state_of())
    return path


def test_round_trip(saved):
    same(checkpoint.load(saved), state_of())
    assert os.listdir(saved.parent) == ["last.pt"]


def test_a_training_state_round_trip(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    checkpoint.save(tmp_path / "x.pt", state)
    loaded = checkpoint.load(tmp_path / "x.pt")
    for key in state:
        same(loaded[key], state[key])


def test_plain_torch_and_zip_read_it_and_the_hash_is_of_the_archive(saved):
    assert torch.load(saved, weights_only=True)["step"] == 7
    assert torch.load(saved, weights_only=True, mmap=True)["step"] == 7
    with zipfile.ZipFile(saved) as archive:
        assert archive.testzip() is None
        comment = archive.comment
    content = saved.read_bytes()
    assert content.endswith(comment)
    archive = content[: -len(comment) - 2] + b"\0\0"
    assert comment == b"sha256:" + hashlib.sha256(archive).hexdigest().encode()


@settings(max_examples=400)
@given(where=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255), required=st.booleans())
def test_any_changed_byte_is_refused(saved, where, bits, required):
    content = bytearray(saved.read_bytes())
    content[int(where * len(content))] ^= bits
    assert_refused(saved, content, required)


@pytest.mark.parametrize("required", [True, False])
def test_each_byte_of_the_end_record_counts(saved, required):
    good = saved.read_bytes()
    for i in range(len(good) - 100, len(good)):
        assert_refused(saved, good[:i], required)
        content = bytearray(good)
        content[i] ^= 0x10
        assert_refused(saved, content, required)


@settings(max_examples=100)
@given(where=st.floats(0, 1, exclude_max=True), extra=st.binary(max_size=3), required=st.booleans())
def test_any_cut_is_refused(saved, where, extra, required):
    whole = saved.read_bytes()
    content = whole[: int(where * len(whole))] + extra
    assume(content != whole)
    assert_refused(saved, content, required)


@settings(max_examples=100)
@given(content=st.binary(max_size=300), required=st.booleans())
def test_any_other_file_is_refused(saved, content, required):
    assert_refused(saved, content, required)


def assert_refused(saved, content, required):
    bad = saved.with_name("bad.pt")
    bad.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.pt"):
        checkpoint.load(bad, require_hash=required)


def test_what_is_wrong_is_said(tmp_path, saved):
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.load(tmp_path / "absent.pt")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(tmp_path)
    content = saved.read_bytes()
    saved.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"cut off.*Use best\.pt"):
        checkpoint.load(saved)
    saved.write_bytes(content.replace(b"note", b"nota"))
    with pytest.raises(UserError, match=r"damaged.*Use best\.pt"):
        checkpoint.load(saved)


def test_foreign_files_only_when_asked_for(tmp_path):
    for name, zipped in (("new.pth", True), ("legacy.pth", False)):
        torch.save({"w": torch.ones(2)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match="carries no hash"):
            checkpoint.load(tmp_path / name)
        same(checkpoint.load(tmp_path / name, require_hash=False), {"w": torch.ones(2)})


def test_a_flipped_bit_in_a_foreign_file_is_refused_or_harmless(tmp_path):
    """torch.load ignores the checksums of the archive's parts; bits that no checksum covers hold no values."""
    state = {f"w{i}": torch.arange(50.0) + i for i in range(4)}
    torch.save(state, tmp_path / "foreign.pth")
    content, random = (tmp_path / "foreign.pth").read_bytes(), np.random.default_rng(1)
    weights = content.index(torch.arange(50.0).numpy().tobytes())
    for at in [weights, weights + 199, *random.integers(0, len(content), 300)]:
        damaged = bytearray(content)
        damaged[at] ^= 1 << random.integers(8)
        (tmp_path / "foreign.pth").write_bytes(damaged)
        try:
            same(checkpoint.load(tmp_path / "foreign.pth", require_hash=False), state)
        except UserError as error:
            assert "foreign.pth" in str(error)
        else:
            assert not weights <= at < weights + 200


def test_foreign_files_run_no_code_and_hold_a_dict(tmp_path):
    torch.save({"calls": os.system}, tmp_path / "code.pth")
    with pytest.raises(UserError, match=r"holds more than weights and plain values: .*system"):
        checkpoint.load(tmp_path / "code.pth", require_hash=False)
    torch.save(torch.ones(2), tmp_path / "tensor.pth")
    with pytest.raises(UserError, match="holds a Tensor"):
        checkpoint.load(tmp_path / "tensor.pth", require_hash=False)


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    checkpoint.save(tmp_path / "x.pt", {})
    monkeypatch.undo()
    with pytest.raises(UserError, match="newer version"):
        checkpoint.load(tmp_path / "x.pt")


@pytest.mark.parametrize("value", [Path("x"), np.float64(1), np.ones(2), {1: [np.int64(3)]}, {Path("x"): 1}, object()])
def test_what_could_not_be_loaded_is_not_saved(saved, value):
    with pytest.raises(TypeError, match=r"state\['bad'\]"):
        checkpoint.save(saved, {"bad": value})
    same(checkpoint.load(saved), state_of())


def test_a_real_write_failure_leaves_the_old_file_and_says_how_much_is_needed(saved):
    """A file size limit stops the writing in the middle, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(
            UserError, match=r"last\.pt cannot be written: .* \(([4-5]\d\d,\d+) bytes needed, [\d,]+ by"
        ):
            checkpoint.save(saved, state_of(1, size=100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    same(checkpoint.load(saved), state_of())
    assert os.listdir(saved.parent) == ["last.pt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_disk_full_at_the_last_moment(saved, monkeypatch, step):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(UserError, match="No space left on device"):
        checkpoint.save(saved, state_of(1))
    monkeypatch.undo()
    same(checkpoint.load(saved), state_of())
    assert os.listdir(saved.parent) == ["last.pt"]


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        checkpoint.save(tmp_path / "absent" / "x.pt", {})


def test_other_exceptions_leave_no_part_either(saved, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(saved, {})
    assert os.listdir(saved.parent) == ["last.pt"]


@pytest.mark.parametrize("link", [True, False])
def test_best_stays_when_last_goes_on(saved, monkeypatch, link):
    best = saved.with_name("best.pt")
    if not link:
        monkeypatch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(OSError(errno.EXDEV, "other disk")))
    for seed in (0, 1, 1):  # the third time, with a link, both names are one file already
        checkpoint.save(saved, state_of(seed))
        checkpoint.link_or_copy(saved, best)
        checkpoint.link_or_copy(saved, best)
        assert best.samefile(saved) == link
        same(checkpoint.load(best), state_of(seed))
    checkpoint.save(saved, state_of(2))
    same(checkpoint.load(best), state_of(1))
    assert sorted(os.listdir(saved.parent)) == ["best.pt", "last.pt"]


def test_link_to_nothing(tmp_path):
    with pytest.raises(UserError, match=r"best\.pt cannot be written: No such file"):
        checkpoint.link_or_copy(tmp_path / "absent.pt", tmp_path / "best.pt")


def test_killed_while_saving_the_file_is_whole(tmp_path):
    program = (
        "import sys, torch\nfrom detcore.training import checkpoint\n"
        "for i in range(10**6):\n"
        "    checkpoint.save(sys.argv[1], {'i': i, 'w': torch.full((300_000,), i)})\n    print(i, flush=True)\n"
    )
    path = tmp_path / "last.pt"
    for last in (1, 4):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        while int(process.stdout.readline()) < last:
            continue
        process.kill()
        process.wait()
        process.stdout.close()
        loaded = checkpoint.load(path)
        assert loaded["i"] >= last and bool((loaded["w"] == loaded["i"]).all())
    checkpoint.save(path, {})
    assert os.listdir(tmp_path) == ["last.pt"]
