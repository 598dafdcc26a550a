"""The manifest of a data set: how many files and bytes each of its folders holds, to tell a whole copy from a cut one.

    python -m detcore.data.manifest write DIR [--manifest FILE] [--force]
    python -m detcore.data.manifest check DIR [--manifest FILE] [--full]

A CSV `folder,files,bytes`, one line for each folder with files directly in it, "." being DIR itself, sorted. Hidden
files and folders (a leading dot) and the manifest itself are not counted. Links are followed; a folder that several
links lead to is counted once: where it really lies, else under the first link in sorted order.
"""

import argparse
import csv
import errno
import heapq
import os
import stat
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from detcore import UserError
from detcore.cli import BAD_INPUT, OK, run_main

NAME = "expected-mounts.csv"
HEADER = ["folder", "files", "bytes"]
THREADS = 16  # a network file system answers many questions at once, and nearly all of the time is waiting for it
_CHUNK = 1000  # entries that one thread asks about in one go
_SHOWN = 20  # differences that are printed
_NOWHERE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR)  # what a link to nothing gives


class Count(NamedTuple):
    """What lies directly in one folder; `bytes` is 0 where the sizes were not asked for."""

    files: int
    bytes: int


class Odd(NamedTuple):
    """What stood out while counting, by path relative to the folder: links to nothing (not counted), empty files."""

    dangling: list[str]
    empty: list[str]


def build(
    folder: Path,
    *,
    sizes: bool = True,
    manifest: Path | None = None,
    progress: Callable[[int], None] | None = None,
    odd: Odd | None = None,
) -> dict[str, Count]:
    """The counts of each folder in `folder`, by path relative to it, sorted.

    Without `sizes` files are only counted, which takes one question a folder instead of one a file. `manifest` is left
    out of the count (default: NAME in `folder`). `progress` hears now and then how many files were seen so far.
    Memory grows with the number of folders, not of files. `odd`: filled with what stood out; the empty files only with
    `sizes`. Raises `UserError` for what can't be read, and without `odd` for links to nothing.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: {'is not a folder' if folder.exists() else 'no such folder'}; check the path")
    walk = _Walk(folder, manifest or folder / NAME, sizes, progress or (lambda files: None))
    counts = dict(sorted(walk.run().items()))
    for names in walk.odd:
        names.sort()
    if odd is not None:
        odd.dangling.extend(walk.odd.dangling)
        odd.empty.extend(walk.odd.empty)
    elif gone := walk.odd.dangling:
        shown = ", ".join(gone[:3]) + ", ..." * (len(gone) > 3)
        what = "1 link to nothing" if len(gone) == 1 else f"{len(gone):,} links to nothing"
        raise UserError(f"{folder}: {what} ({shown}); mend or remove what is there, then count again")
    return counts


def read(path: Path) -> dict[str, Count]:
    """The counts of a manifest file. Raises `UserError` with file and line for one that is malformed."""
    counts: dict[str, Count] = {}
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.reader(file, strict=True)
            if next(rows, None) != HEADER:
                raise UserError(f"{path}: not a manifest, its first line should be {','.join(HEADER)}")
            for row in rows:
                where = f"{path}, line {rows.line_num}: {','.join(row)!r}"
                if len(row) != 3 or not all(number.isascii() and number.isdecimal() for number in row[1:]):
                    raise UserError(f"{where} is not valid, expected {','.join(HEADER)}; write the manifest anew")
                if row[0] in counts:
                    raise UserError(f"{where}: this folder stands there twice; write the manifest anew")
                counts[row[0]] = Count(int(row[1]), int(row[2]))
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such manifest; where the data is known to be whole, write one: "
            "python -m detcore.data.manifest write DIR (in a job of run.sub: INIT_EXPECTED_MOUNTS=1)"
        ) from error
    except (OSError, csv.Error) as error:
        raise UserError(f"{path} can't be read as a manifest: {getattr(error, 'strerror', None) or error}") from error
    return counts


def write(
    folder: Path, path: Path | None = None, *, force: bool = False, progress: Callable[[int], None] | None = None
) -> dict[str, Count]:
    """Count `folder` and write its manifest to `path` (default: NAME in it), whole or not at all; returns the counts.

    Raises `UserError` where another manifest with other counts is there already, unless `force`.
    """
    path = path or folder / NAME
    counts = build(folder, manifest=path, progress=progress)
    if not counts:
        raise UserError(f"{folder} holds no files; mount the data there first")
    if path.exists() and not force:
        differences = compare(read(path), counts, full=True)
        if differences:
            more = f" and {len(differences) - 1} more" if differences[1:] else ""
            raise UserError(
                f"{path} is there already and differs from {folder}: {differences[0]}{more}. Nothing was written; if "
                f"the data is right and the manifest is not: python -m detcore.data.manifest write {folder} --force"
            )
        return counts
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(HEADER)
            rows.writerows((name, *count) for name, count in counts.items())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UserError(
            f"{path} can't be written: {error.strerror}; where the data is mounted read-only, give another place with "
            "--manifest FILE"
        ) from error
    finally:
        with suppress(OSError):  # in a folder that can't be written nothing stays either
            part.unlink()
    return counts


def check(
    folder: Path, path: Path | None = None, *, full: bool = False, progress: Callable[[int], None] | None = None
) -> list[str]:
    """What of `folder` is not as its manifest `path` (default: NAME in it) says; nothing: an empty list.

    Compares the number of files in each folder, with `full` their bytes too. Raises `UserError` for a folder or
    manifest that can't be read.
    """
    path = path or folder / NAME
    expected = read(path)
    return compare(expected, build(folder, sizes=full, manifest=path, progress=progress), full)


def compare(expected: dict[str, Count], found: dict[str, Count], full: bool) -> list[str]:
    """The folders whose counts differ, in words; their bytes too if `full`."""
    differences = []
    for name in sorted(expected.keys() | found.keys()):
        want, have = expected.get(name, Count(0, 0)), found.get(name, Count(0, 0))
        if want == have or (not full and want.files == have.files):
            continue
        shown = [f"{c.files:,} files" + f", {c.bytes:,} bytes" * full for c in (want, have)]
        differences.append(f"folder {name}: expected {shown[0]}, found {shown[1] if name in found else 'none'}")
    return differences


class _Walk:
    """One walk through a folder. Threads list folders and ask for sizes; the calling thread holds the results."""

    def __init__(self, root: Path, manifest: Path, sizes: bool, progress: Callable[[int], None]) -> None:
        self._root = str(root)
        # The manifest is recognised by its place, however it is spelled; a name alone might be a file of the data.
        self._manifest = os.path.join(os.path.realpath(manifest.parent), manifest.name)
        self._sizes, self._progress = sizes, progress
        self._seen_files, self._lock = 0, threading.Lock()
        self._visited: set[tuple[int, int]] = set()  # device and inode of each folder
        self._counts: dict[str, Count] = {}
        self.odd = Odd([], [])
        self._links: list[str] = []  # links to folders, yet to be followed: a heap
        self._stop = False

    def run(self) -> dict[str, Count]:
        # Asking for sizes has a pool of its own: a listing waits for it, and must not wait for itself.
        with ThreadPoolExecutor(THREADS) as self._askers, ThreadPoolExecutor(max(THREADS // 4, 1)) as listers:
            try:
                self._real_folders(listers, ".")
                while self._links:
                    self._real_folders(listers, heapq.heappop(self._links))
            finally:
                self._stop = True
        return self._counts

    def _real_folders(self, listers: ThreadPoolExecutor, start: str) -> None:
        """Count `start` and every folder below that no link stands before; remember the links for later."""
        running: dict[Future, str] = {}
        waiting = deque([start])
        while waiting or running:
            while waiting and len(running) < 4 * THREADS:
                name = waiting.popleft()
                if self._is_new(name):
                    running[listers.submit(self._list, name)] = name
            done, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            for future in done:
                name = running.pop(future)
                count, folders, links = future.result()
                if count.files:
                    self._counts[name] = count
                waiting.extend(folders)
                for link in links:
                    heapq.heappush(self._links, link)
            self._progress(self._seen_files)

    def _is_new(self, name: str) -> bool:
        try:
            about = os.stat(self._path(name))
        except OSError as error:
            raise self._unreadable(name, error) from error
        key = about.st_dev, about.st_ino
        new = key not in self._visited
        self._visited.add(key)
        return new

    def _list(self, name: str) -> tuple[Count, list[str], list[str]]:
        """What lies directly in the folder `name`: its files' count, its folders, its links to folders."""
        files = size = 0
        folders: list[str] = []
        links: list[str] = []
        asked: deque[Future] = deque()
        path = self._path(name)
        skip = os.path.basename(self._manifest)
        skip = skip if os.path.realpath(path) == os.path.dirname(self._manifest) else None
        chunk: list[os.DirEntry] = []
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name == skip:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.name if name == "." else f"{name}/{entry.name}")
                    elif entry.is_symlink() and _leads_to_folder(entry):
                        links.append(entry.name if name == "." else f"{name}/{entry.name}")
                    else:
                        chunk.append(entry)
                    if len(chunk) == _CHUNK:
                        asked.append(self._askers.submit(self._ask, chunk))
                        chunk = []
                    if len(asked) > 4 * THREADS:  # so that the answers, not the entries, pile up
                        n, b = asked.popleft().result()
                        files, size = files + n, size + b
        except OSError as error:
            raise self._unreadable(name, error) from error
        asked.append(self._askers.submit(self._ask, chunk))
        for n, b in (future.result() for future in asked):
            files, size = files + n, size + b
        return Count(files, size), folders, links

    def _ask(self, chunk: list[os.DirEntry]) -> tuple[int, int]:
        """How many of the entries are files, and their bytes if those are wanted."""
        files = size = 0
        dangling: list[str] = []
        empty: list[str] = []
        for entry in chunk:
            if self._stop:
                break
            try:
                if self._sizes or entry.is_symlink():
                    about = entry.stat()
                    is_file = stat.S_ISREG(about.st_mode)
                    size += about.st_size * (is_file and self._sizes)
                    if self._sizes and is_file and not about.st_size:
                        empty.append(os.path.relpath(entry.path, self._root))
                else:
                    is_file = entry.is_file()
            except OSError as error:
                if entry.is_symlink() and error.errno in _NOWHERE:
                    dangling.append(os.path.relpath(entry.path, self._root))
                    continue
                raise UserError(f"{entry.path}: {error.strerror}; mend or remove it, then count again") from error
            files += is_file
        with self._lock:
            self._seen_files += files
            self.odd.dangling.extend(dangling)
            self.odd.empty.extend(empty)
        return files, size

    def _path(self, name: str) -> str:
        return self._root if name == "." else os.path.join(self._root, name)

    def _unreadable(self, name: str, error: OSError) -> UserError:
        return UserError(f"folder {self._path(name)} can't be read: {error.strerror}; check its permissions and mount")


def _leads_to_folder(link: os.DirEntry) -> bool:
    try:
        return link.is_dir()
    except OSError:  # a loop of links
        return False


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m detcore.data.manifest", description="Write or check the manifest of a data set's files."
    )
    parser.add_argument("what", choices=("write", "check"))
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--manifest", type=Path, metavar="FILE", help=f"default: {NAME} in DIR")
    parser.add_argument("--full", action="store_true", help="check: compare bytes too, not only numbers of files")
    parser.add_argument("--force", action="store_true", help="write: replace a manifest with other counts")
    args = parser.parse_args(argv)
    path = args.manifest or args.folder / NAME
    if args.what == "write":
        counts = write(args.folder, path, force=args.force)
        files, size = sum(c.files for c in counts.values()), sum(c.bytes for c in counts.values())
        print(f"{path}: {len(counts):,} folders, {files:,} files, {size:,} bytes")
        return OK
    differences = check(args.folder, path, full=args.full)
    for line in differences[:_SHOWN]:
        print(f"{args.folder}: {line}", file=sys.stderr)
    if differences[_SHOWN:]:
        print(f"and {len(differences) - _SHOWN:,} more folders", file=sys.stderr)
    if differences:
        print(f"error: {args.folder} is not as {path} says; copy it again, or write the manifest anew", file=sys.stderr)
        return BAD_INPUT
    print(f"{args.folder} is as {path} says: numbers of files{' and bytes' if args.full else ''}")
    return OK


if __name__ == "__main__":
    sys.exit(run_main(main))
