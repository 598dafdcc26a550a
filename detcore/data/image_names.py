"""Which file each name of an annotation file means.

A name means the file of that name. Where there is none, it means the one that differs only as programs and systems
spell names: a backslash for a slash (Windows), `%20` for a blank (URLs), letter case (`.JPG`), accents as one character
or two (NFC, NFD) - if there is exactly one, and no other entry means it. Absolute names are left as they are.
"""

import difflib
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np

from detcore.data.shards import Shards

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class Scan(NamedTuple):
    """missing: int64 positions of the names that mean no file; renamed: file name by position, where it is spelled
    otherwise than the annotation file has it; unlisted: number of image files that no name means."""

    missing: np.ndarray
    renamed: dict[int, str]
    unlisted: int


def scan(names: Sequence[str], folder: Path, pack: Shards | None = None) -> Scan:
    """Looks for the names in a folder, each of whose folders is read once, or in its shards."""
    if pack:
        rows = pack.find(names)
        missing, unlisted = np.flatnonzero(rows < 0), len(pack) - len(np.unique(rows[rows >= 0]))
        files = _Packed(pack) if len(missing) else None
    else:
        files = _Folders(folder)
        missing = np.array([i for i, name in enumerate(names) if not files.has(name)], np.int64)
        unlisted = files.images() - len({name for i, name in enumerate(names) if files.has_image(name)})
    renamed: dict[int, str] = {}
    if len(missing):
        taken = set(names) - {names[i] for i in missing.tolist()}
        meant: dict[str, set[str]] = {}
        found = {}
        for i in missing.tolist():
            if (file := files.similar(names[i])) and file not in taken:
                found[i] = file
                meant.setdefault(file, set()).add(names[i])
        renamed = {i: file for i, file in found.items() if len(meant[file]) == 1}
    left = np.array([i for i in missing.tolist() if i not in renamed], np.int64)
    return Scan(left, renamed, max(unlisted - len(set(renamed.values())), 0))


def closest(name: str, folder: Path) -> str | None:
    """A file of the folder, or of the one that the name says, that may be meant by a name without a file."""
    parts = [part for part in name.replace("\\", "/").split("/") if part]
    if not parts:
        return None
    for skipped in range(len(parts)):  # train/a.jpg beside a.jpg: a folder too many in the name
        if (folder / "/".join(parts[skipped:])).is_file() and ".." not in parts[skipped:]:
            return "/".join(parts[skipped:])
    own = "" if ".." in parts else "/".join(parts[:-1])
    for place in dict.fromkeys((own, "")):
        files = [file for file in _entries(folder / place) if file.lower().endswith(IMAGE_SUFFIXES)]
        stem = _folded(parts[-1].rpartition(".")[0])
        near = [f for f in files if _folded(f.rpartition(".")[0]) == stem]
        near = near or difflib.get_close_matches(parts[-1], files[:5000], 1, 0.8)
        if near:
            return str(PurePosixPath(place, near[0]))
    return None


def leaves_folder(name: str) -> bool:
    """Whether a name is absolute (also as Windows has it) or leads out of the folder by `..`."""
    parts = name.replace("\\", "/").split("/")
    return parts[0] == "" or parts[0].endswith(":") or ".." in parts


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _spellings(name: str) -> Iterator[str]:
    """The name as other systems and programs may have meant it."""
    slashes = name.replace("\\", "/")
    for spelled in dict.fromkeys((name, slashes, unquote(name), unquote(slashes))):
        yield "/".join(part for part in spelled.split("/") if part not in ("", "."))


def _entries(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (OSError, ValueError):  # no such folder, or a name that no file can have
        return []


class _Folders:
    """The files below a folder."""

    def __init__(self, root: Path) -> None:
        self.root, self._lists, self._folds = root, {}, {}
        self._named: set[str] = set()  # the folders that names say

    def _list(self, folder: str) -> set[str]:
        if folder not in self._lists:
            self._lists[folder] = set(_entries(self.root / folder))
        return self._lists[folder]

    def has(self, name: str) -> bool:
        folder, base = os.path.split(name)
        self._named.add(folder)
        return base in self._list(folder)

    def has_image(self, name: str) -> bool:
        return name.lower().endswith(IMAGE_SUFFIXES) and self.has(name)

    def images(self) -> int:
        """Image files in the folders that were asked for."""
        return sum(name.lower().endswith(IMAGE_SUFFIXES) for folder in self._named for name in self._lists[folder])

    def _fold(self, folder: str) -> dict[str, list[str]]:
        if folder not in self._folds:
            table: dict[str, list[str]] = {}
            for entry in self._list(folder):
                table.setdefault(_folded(entry), []).append(entry)
            self._folds[folder] = table
        return self._folds[folder]

    def similar(self, name: str) -> str | None:
        if leaves_folder(name):
            return None
        for spelled in _spellings(name):
            place, parts = "", spelled.split("/")
            if ".." in parts:
                continue
            for part in parts:
                entries = self._list(place)
                near = [part] if part in entries else self._fold(place).get(_folded(part), [])
                if len(near) != 1:
                    break
                place = f"{place}/{near[0]}" if place else near[0]
            else:
                if (self.root / place).is_file():
                    return place
        return None


class _Packed:
    """The files of shards."""

    def __init__(self, pack: Shards) -> None:
        self._names = set(pack.member_names())
        self._fold: dict[str, list[str]] = {}
        for name in self._names:
            self._fold.setdefault(_folded(name), []).append(name)

    def similar(self, name: str) -> str | None:
        for spelled in _spellings(name):
            near = [spelled] if spelled in self._names else self._fold.get(_folded(spelled), [])
            if len(near) == 1:
                return near[0]
        return None
