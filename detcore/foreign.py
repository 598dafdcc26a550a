"""What a file is in place of what it should be, told by its bytes: for error messages. Imports no torch."""

import os
import re
import struct
import zipfile
import zlib
from pathlib import Path

from detcore import UserError

_MARKS = {
    b"\x1f\x8b": "a gzip file: gunzip it first",
    b"BZh": "a bzip2 file: bunzip2 it first",
    b"\xfd7zXZ": "an xz file: unxz it first",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: git lfs pull",
}
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<error", b"<annotation")
_HEAD = 512  # bytes that tell


def kind_of(head: bytes) -> str | None:
    """What the file with these first bytes is, with what to do; None where they do not tell."""
    for mark, told in _MARKS.items():
        if head.startswith(mark):
            return told
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_MARKUP):
        return (
            "HTML or XML, as a server sends it in place of a file: fetch it again, and look at the address and at "
            "what it wants (a login?)"
        )
    return None


def not_weights(path: Path) -> str | None:
    """What a file that should hold weights is instead, as "is ..." with what to do; None where that can't be told."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        return "is empty (0 bytes), and should hold weights; fetch or copy it again"
    if told := kind_of(head):
        return f"is {told}. Weights are expected here"
    if re.match(rb'.{7}\0\{"', head, re.DOTALL):
        return (
            "is a file of safetensors, which is not read here; save its tensors with torch.save({'model': ...}, FILE)"
        )
    text = head.decode("utf-8", "ignore")
    if all(letter.isprintable() or letter in "\t\r\n" for letter in text) and len(text.encode()) > len(head) - 4:
        begins = text.split("\n")[0].strip()[:40]
        return f"is text (it begins with {begins!r}), and should hold weights; is it the right file?"
    return None


def check_archive(path: Path) -> None:
    """UserError unless a zip archive, as torch.save writes it, ends where its end record says and holds what its
    checksums say, which torch does not look at. Other files pass."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            return
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 22 - 65535, 0))
        end = file.read()
        at = end.rfind(b"PK\5\6")
        if at < 0 or at + 22 + int.from_bytes(end[at + 20 : at + 22], "little") != len(end):
            raise UserError(f"{path} ({size:,} bytes) is cut off or longer than its content; fetch or copy it again")
        try:
            with zipfile.ZipFile(file) as archive:
                wrong = archive.testzip()
        except (zipfile.BadZipFile, ValueError, RuntimeError, EOFError, struct.error, zlib.error) as error:
            raise UserError(f"{path} is damaged: {error}; fetch or copy it again") from error
    if wrong:
        raise UserError(f"{path} is damaged: the checksum of its part {wrong!r} is wrong; fetch or copy it again")
