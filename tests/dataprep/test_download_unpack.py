"""Archives that want to write elsewhere, that are damaged, that meet what is there already."""

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
