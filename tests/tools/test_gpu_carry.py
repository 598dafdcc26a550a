"""tools.gpu_carry: what is taken along, and its way to its place on the other side."""

import json
import os
import zipfile
from pathlib import Path

import pytest

from tools import gpu_carry as carry
from tools.gpu_check import programs, state

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with two programs' sources and a folder of what was carried for it."""
    root, carried = tmp_path / "root", tmp_path / "carry"
    for program in ("one", "two"):
        (root / program / "csrc").mkdir(parents=True)
        (root / program / "csrc" / "x_gpu.cu").write_text(f"// {program}")
        (carried / "libraries" / program).mkdir(parents=True)
        (carried / "libraries" / program / "_kernels.so").write_text(f"library of {program}")
    (root / "setup.py").write_text("setup()")
    monkeypatch.setattr(carry, "ROOT", root)
    libraries = {p: carry.sha256(carried / "libraries" / p / "_kernels.so") for p in ("one", "two")}
    about = {
        "sources": carry.sources_hash(),
        "code": carry.code_hash(),
        "architectures": "9.0",
        "libraries": libraries,
        "commit": "abc",
    }
    (carried / carry.NAME).write_text(json.dumps(about))
    return root, carried


def test_libraries_are_put_in_place_and_are_younger_than_their_sources(checkout, tmp_path):
    root, carried = checkout
    old = root / "one" / "_kernels.so"
    old.write_text("an older one")
    for library in carried.rglob("*.so"):
        os.utime(library, (1e9, 1e9))
    assert carry.in_place(carried) == "one, two: not the carried library"
    assert carry.put_in_place(carried, tmp_path / "work") == (tmp_path / "work" / "site", [])
    assert old.read_text() == "library of one" and carry.in_place(carried) == ""
    newest = max(file.stat().st_mtime for file in [root / "setup.py", *root.glob("*/csrc/*")])
    assert all(carry.library(program).stat().st_mtime >= newest for program in ("one", "two"))


@pytest.mark.parametrize("changed", ["setup.py", "two/csrc/x_gpu.cu", "one/csrc/new.h"])
def test_libraries_of_other_sources_are_not_used(checkout, tmp_path, changed):
    root, carried = checkout
    (root / changed).write_text("changed")
    _, said = carry.put_in_place(carried, tmp_path / "work")
    assert said == ["the carried libraries are of other sources (csrc/, setup.py): they are compiled here"]
    assert not list(root.glob("*/_kernels.so"))
    assert carry.in_place(carried) == "the carried libraries are of other sources"


def test_a_checkout_without_git_tells_its_code_from_that_which_was_carried(checkout):
    root, carried = checkout
    assert carry.commit(carried) == "abc"
    (root / "tools").mkdir()
    (root / "tools" / "new.py").write_text("1")
    first = carry.commit(carried)
    (root / "tools" / "new.py").write_text("2")
    assert first.startswith("abc+") and carry.commit(carried) not in (first, "abc")


def test_the_part_build_takes_them_only_for_the_card_they_are_for(checkout, tmp_path, monkeypatch):
    _, carried = checkout
    carry.put_in_place(carried, tmp_path)
    context = state.Context(tmp_path, True, True, None, 60.0, 0.0, work=tmp_path, carried=carried)
    monkeypatch.setattr(programs.torch.cuda, "get_device_capability", lambda: (9, 0))
    assert programs.unfit(context) == ""
    monkeypatch.setattr(programs.native, "describe", lambda program, device: "ops: _kernels.so")
    [(_, build)] = programs.build(context)
    row = build()
    assert row["architectures"] == "9.0, carried" and row["libraries"] == "one, two"
    assert "error" not in row
    monkeypatch.setattr(
        programs.native, "describe", lambda program, device: "ops: some of the references, because no code"
    )
    assert build()["error"].startswith("no code for this GPU")
    monkeypatch.setattr(programs.torch.cuda, "get_device_capability", lambda: (10, 0))
    assert programs.unfit(context) == "they are for 9.0, this card is 10.0"


def wheel(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", "x = 1")
        file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{about}/RECORD", "")


def test_wheels_are_unpacked_once_without_an_index(checkout, tmp_path):
    _, carried = checkout
    wheel(carried / "wheels", "carried_a")
    site, said = carry.put_in_place(carried, tmp_path / "work")
    assert said == [] and (site / "carried_a.py").is_file()
    (site / "mark").touch()
    carry.put_in_place(carried, tmp_path / "work")
    assert (site / "mark").exists(), "they were there already"
    (carried / "wheels" / "carried_b-1.0-py3-none-any.whl").write_text("no wheel")
    _, said = carry.put_in_place(carried, tmp_path / "work")
    assert said[0].startswith("the carried wheels can't be installed: ") and "carried_b" in said[0]


def test_symbols_that_the_other_side_lacks_are_found():
    content = b"\0GLIBC_2.34\0GLIBCXX_3.4.33\0CXXABI_1.3.9\0"
    assert carry.newer_symbols(content) == []
    assert carry.newer_symbols(content + b"GLIBC_2.40\0GLIBCXX_3.4.34\0") == ["GLIBCXX_3.4.34", "GLIBC_2.40"]


def test_too_much_to_carry_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(carry, "get_wheels", lambda folder, packages: (folder / "a.whl").write_bytes(bytes(2**20)))
    monkeypatch.setattr(carry, "compile_libraries", lambda folder: {"detcore": "0"})
    (tmp_path / "bccd" / "annotations").mkdir(parents=True)
    (tmp_path / "bccd" / "annotations" / "instances_train.json").write_bytes(bytes(2**20))
    words = [str(tmp_path / "carry"), "--data", str(tmp_path / "bccd"), "--limit"]
    assert carry.main([*words, "64"]) == 0
    told = capsys.readouterr().out
    assert "wheels 1.0, libraries 0.0, bccd 1.0 MiB" in told and "of 64 MiB" in told
    first, *_, last = told.splitlines()
    assert first == "wheels for Python 3.12: mlperf-logging, msgspec, pycocotools, hotcoco"
    assert "compiling takes about two minutes" in told and "the data set bccd: copied" in told
    assert last.endswith("python3 -m tools.gpu_check --out results/gpu --carried build/carry --go-on gpu_check.json")
    assert f"Copy the checkout, and {tmp_path / 'carry'}, which git does not list, to build/carry" in told
    assert "--carried x/y --go-on" in carry.what_next(carry.ROOT / "x" / "y")
    assert carry.data(tmp_path / "carry") == tmp_path / "carry" / "bccd"
    assert carry.manifest(tmp_path / "carry")["sources"] == carry.sources_hash()
    assert carry.main([*words, "2"]) == 1
    assert "gpu_carry: that is more than 2 MiB: leave something out" in (said := capsys.readouterr()).err
    assert "--go-on" not in said.out


def test_what_parts_need_and_such_a_machine_lacks_is_taken_along():
    modules = {name.replace("-", "_") for name in carry.PACKAGES}
    assert set(carry.NEEDED) - modules == {"torchvision", "numpy", "PIL", "pytest", "hypothesis"}
    locked = (ROOT / "requirements.lock").read_text()
    assert all(f"\n{name}==" in locked for name in carry.PACKAGES)
