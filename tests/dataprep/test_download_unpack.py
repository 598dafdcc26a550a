"""Archives that want to write elsewhere, that are damaged, that meet what is there already."""

import errno
import os
import random
import shutil
import tarfile
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from dataprep.download_unpack import unpack
from detcore import UserError


def tar(path: Path, *members: tuple[str, bytes | tarfile.TarInfo], mode: str = "w") -> Path:
    """bytes: a file's content; TarInfo: the member itself."""
    with tarfile.open(path, mode) as file:
        for name, what in members:
            info = what if isinstance(what, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.name = name
            body = what if isinstance(what, bytes) else b""
            info.size = len(body)
            file.addfile(info, BytesIO(body))
    return path


def link(goal: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, goal
    return info


def zipped(path: Path, members: dict[str, bytes], **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, body in members.items():
            file.writestr(name, body)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_unpacks(tmp_path, kind):
    members = {"set/a.txt": b"a" * 9, "set/deep/b.txt": b"b", "top.txt": b"", "./dot/c.txt": b"c"}
    if kind == "zip":
        archive = zipped(tmp_path / "x.zip", members, compression=zipfile.ZIP_DEFLATED)
    else:
        archive = tar(tmp_path / f"x.{kind}", *members.items(), mode="w:gz" if "gz" in kind else "w")
    heard = []
    top = unpack(archive, tmp_path / "out", lambda done, total: heard.append((done, total)))
    assert tree(tmp_path / "out") == {name.removeprefix("./"): body for name, body in members.items()}
    assert [path.name for path in top] == ["dot", "set", "top.txt"]
    assert heard[-1] == (4, 4)


EVIL = ["../up.txt", "/absolute.txt", "a/../../up.txt", "a\\..\\..\\up.txt", "C:\\up.txt"]


@pytest.mark.parametrize("name", EVIL)
def test_a_zip_member_outside_refuses_all_of_it(tmp_path, name):
    archive = zipped(tmp_path / "x.zip", {"good.txt": b"1", name: b"2"})
    with pytest.raises(UserError, match="would be written outside the folder; nothing was unpacked"):
        unpack(archive, tmp_path / "in" / "out")
    assert set(tree(tmp_path)) == {"x.zip"}


def test_a_link_in_a_zip_is_refused(tmp_path):
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr(info, "/etc/passwd")
    with pytest.raises(UserError, match="is a link or device"):
        unpack(tmp_path / "x.zip", tmp_path / "out")
    assert tree(tmp_path / "out") == {}


@pytest.mark.parametrize(
    "members",
    [
        [("../up.txt", b"1")],
        [("/absolute.txt", b"1")],
        [("l", link("/etc/passwd"))],
        [("d/l", link("../../up.txt"))],
        [("l", link("../up.txt", tarfile.LNKTYPE))],
        [("l", link("/etc/passwd", tarfile.LNKTYPE))],
        [("l", link("d")), ("l/f.txt", b"1")],
        [("fifo", link("", tarfile.FIFOTYPE))],
        [("sub/f", b""), ("l1", link("sub")), ("sub/l2", link("..")), ("l3", link("l1/l2/../x"))],
        [("early", link("later/../x")), ("later", link("."))],
        [("d/f", b"1"), ("l", link("d")), ("l\\g", b"1")],
        [("h", link("none", tarfile.LNKTYPE))],
        [("d/f", b"1"), ("d2", link("d", tarfile.LNKTYPE))],
    ],
    ids=lambda members: members[-1][0],
)
def test_a_tar_member_outside_refuses_all_of_it(tmp_path, members):
    archive = tar(tmp_path / "x.tar", ("good.txt", b"1"), *members)
    with pytest.raises(UserError, match="nothing was unpacked"):
        unpack(archive, tmp_path / "in" / "out")
    assert set(tree(tmp_path)) == {"x.tar"}
    assert list((tmp_path / "in" / "out").iterdir()) == []


def test_links_inside_are_kept(tmp_path):
    archive = tar(tmp_path / "x.tar", ("d/f.txt", b"1"), ("e/s", link("../d/f.txt")),
                  ("h", link("d/f.txt", tarfile.LNKTYPE)))  # fmt: skip
    unpack(archive, tmp_path / "out")
    assert (tmp_path / "out" / "e" / "s").read_bytes() == b"1" == (tmp_path / "out" / "h").read_bytes()


def test_a_hard_link_replaces_a_symbolic_one_of_its_name(tmp_path):
    archive = tar(tmp_path / "x.tar", ("a", b"a"), ("b", b"b"), ("l", link("a")), ("l", link("b", tarfile.LNKTYPE)))
    unpack(archive, tmp_path / "out")
    assert tree(tmp_path / "out") == {"a": b"a", "b": b"b", "l": b"b"}


def test_a_tar_file_that_ends_with_a_zip_file_is_a_tar_file(tmp_path):
    inner = zipped(tmp_path / "inner.zip", {"inside.txt": b"1"}).read_bytes()
    unpack(tar(tmp_path / "x.tar", ("a.txt", b"a"), ("inner.zip", inner)), tmp_path / "out")
    assert tree(tmp_path / "out") == {"a.txt": b"a", "inner.zip": inner}


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_any_damage_is_an_error_in_words_or_changes_nothing_that_counts(tmp_path, kind):
    """Bytes changed and ends cut off at random: whole files, or a UserError and an empty folder."""
    rng = random.Random(3)
    body = {"d/a.bin": rng.randbytes(700), "d/b.txt": b"hello " * 99, "c": b"c"}
    path = tmp_path / f"x.{kind}"
    if kind == "zip":
        zipped(path, body, compression=zipfile.ZIP_DEFLATED)
    else:
        tar(path, *body.items(), mode=f"w:{kind[4:]}")
    whole, refused = path.read_bytes(), 0
    for number in range(120):
        data = bytearray(whole if number % 4 else whole[: rng.randrange(len(whole))])
        for _ in range(rng.randrange(1, 4) if number % 4 and data else 0):
            data[rng.randrange(min(len(data), 1600))] = rng.randrange(256)
        path.write_bytes(data)
        out = tmp_path / str(number)
        try:
            unpack(path, out)
        except UserError as error:
            refused += 1
            assert "x." in str(error) and "free space" not in str(error)
            assert not any(out.iterdir())
    assert refused > 20


def test_a_name_that_is_a_file_and_a_folder_is_the_archives_fault(tmp_path):
    archive = zipped(tmp_path / "x.zip", {"a": b"1", "a/b": b"2"})
    with pytest.raises(UserError, match=r"x\.zip cannot be unpacked .*; remove it and fetch it again"):
        unpack(archive, tmp_path / "out")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"file: File exists, while unpacking .*mend the folder"):
        unpack(archive, tmp_path / "file")
    (tmp_path / "out" / "set").write_bytes(b"a file, where a folder is to be")
    with pytest.raises(UserError, match=r"Not a directory, while unpacking .*mend the folder"):
        unpack(zipped(tmp_path / "y.zip", {"set/b": b"2"}), tmp_path / "out")


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path, monkeypatch):
    archive = zipped(tmp_path / "x.zip", {"a.txt": b"a", "b.txt": b"b" * 99})
    inner = shutil.copyfileobj

    def full(source, out, size):
        inner(source, out, size)
        if out.name.endswith("b.txt"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(UserError, match=r"out: No space left on device, while unpacking .*x\.zip; free space"):
        unpack(archive, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == [] and archive.is_file()


def test_damage_leaves_nothing(tmp_path):
    archive = zipped(tmp_path / "x.zip", {"a.txt": b"hello" * 100, "b.txt": b"world" * 100})
    body = bytearray(archive.read_bytes())
    body[body.index(b"worldworld")] ^= 1
    archive.write_bytes(body)
    with pytest.raises(UserError, match=r"x\.zip cannot be unpacked .*b\.txt.*; remove it and fetch it again"):
        unpack(archive, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    for body in (b"", b"<html>", archive.read_bytes()[:300]):
        archive.write_bytes(body)
        with pytest.raises(UserError, match="fetch it again"):
            unpack(archive, tmp_path / "out")


def test_joins_what_is_there(tmp_path):
    out = tmp_path / "out"
    (out / "set").mkdir(parents=True)
    (out / "set" / "old.txt").write_bytes(b"old")
    (out / "set" / "cut.txt").write_bytes(b"cu")
    (out / ".x.zip.unpacking").mkdir()
    (out / ".x.zip.unpacking" / "half.txt").write_bytes(b"of a killed run")
    unpack(zipped(tmp_path / "x.zip", {"set/cut.txt": b"cut", "set/new.txt": b"new"}), out)
    assert tree(out) == {"set/old.txt": b"old", "set/cut.txt": b"cut", "set/new.txt": b"new"}
    assert [path.name for path in out.iterdir()] == ["set"]
