"""Images of a data set in few large files, so that a shared file system opens hundreds of files, not a million.

A folder holds `00000.tar`, `00001.tar`, ... (plain tar files of image files under their own names, as the webdataset
library and any tar program read them), `00000.idx`, ... (the same places in the text format of DALI's
`readers.webdataset`) and `shards.index`, written last: name -> shard, offset, length and CRC-32. Made by
public-scripts/pack_dataset.py; `CocoIndex` takes such a folder in the place of an image folder.

What it does: an image costs one `pread` of a file that is already open. No open, stat or lookup for each image, so the
metadata server of a Lustre, NFS or GPFS is asked for hundreds of names instead of a million, and copying, deleting or
counting the set is quick. Each read is checked against its CRC-32 (0.1 ms for 300 KB), so changed bytes never train.

What it does not do: the order of training is the same random permutation as from files, so the reads of an epoch stay
random, one image long; a spinning disk still seeks. Only `ReadAhead` turns them into large sequential reads, once, and
only where the shards fit in the page cache.
"""

import contextlib
import hashlib
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from detcore import UserError
from detcore.data import columns as columns_file

INDEX, PLAN = "shards.index", "pack.json"
MAGIC = b"detcore shards 1"
HASH_BYTES = 8
_MOST_OPEN = 256  # of a process; the usual limit for all its files is 1024
_PIECE = 8 << 20


class Shards:
    """The finished shards of a folder, opened with `open_folder`. Safe to use from several threads.

    names: of the shard files; sizes: their bytes; content_hash: SHA-256 over all image names, lengths and CRC-32, the
    same for any packing of the same images.
    """

    def __init__(self, folder: Path, header: dict[str, Any], columns: dict[str, np.ndarray]) -> None:
        self.folder, self.names, self.sizes = folder, header["shards"], header["sizes"]
        self.content_hash: str = header["content_hash"]
        self.columns = columns
        self._open: OrderedDict[int, _File] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.columns["hashes"])

    def __reduce__(self) -> tuple:
        return open_folder, (self.folder,)

    def find(self, names: Sequence[str]) -> np.ndarray:
        """int64 [n]: the row of each name in the index, -1 where there is none."""
        hashes, ends, letters = (self.columns[name] for name in ("hashes", "name_ends", "names"))
        wanted = hash_names(names)
        rows = np.searchsorted(hashes, wanted).clip(max=len(hashes) - 1)
        rows[hashes[rows] != wanted] = -1
        for k in np.flatnonzero(rows >= 0).tolist():  # two names may share a hash
            row = rows[k]
            if letters[ends[row - 1] if row else 0 : ends[row]].tobytes() != names[k].encode():
                rows[k] = -1
        return rows

    def member_names(self) -> list[str]:
        """The names of all images."""
        letters, ends = self.columns["names"].tobytes(), self.columns["name_ends"].tolist()
        return [letters[begin:end].decode() for begin, end in zip([0, *ends], ends, strict=False)]

    def place(self, name: str) -> Path:
        """SHARD/NAME, for messages."""
        row = int(self.find([name])[0])
        return self.folder / (self.names[self.columns["shard"][row]] if row >= 0 else INDEX) / name

    def read(self, name: str, image_id: int) -> np.ndarray:
        """The bytes of an image's file, uint8 [n]. UserError naming shard, member and image if they are not whole."""
        row = int(self.find([name])[0])
        if row < 0:
            raise UserError(f"{self.folder}: the shards hold no {name} (image {image_id}); pack the data set again.")
        shard, offset, length, crc = (int(self.columns[c][row]) for c in ("shard", "offset", "length", "crc"))
        data = np.empty(length, np.uint8)
        try:
            file = self._file(shard)  # held, so that it is not closed meanwhile
            count = _read_into(file.descriptor, data, offset)
        except OSError as error:
            raise self._damaged(shard, name, image_id, f"cannot be read ({error.strerror})") from error
        if count < length:
            raise self._damaged(shard, name, image_id, f"ends after {offset + count:,} bytes, in the middle of it")
        if zlib.crc32(data) != crc:
            raise self._damaged(shard, name, image_id, f"holds other bytes at {offset:,} than were packed (CRC-32)")
        return data

    def check(self) -> None:
        """UserError unless every shard is there in its full length: one question a shard."""
        for name, size in zip(self.names, self.sizes, strict=True):
            path = self.folder / name
            try:
                found = path.stat().st_size
            except OSError as error:
                raise UserError(f"{path}: cannot read the shard ({error.strerror}); {REPAIR}") from error
            if found != size:
                raise UserError(f"{path}: {found:,} bytes, but it was packed with {size:,}; {REPAIR}")

    def _damaged(self, shard: int, name: str, image_id: int, what: str) -> UserError:
        return UserError(f"{self.folder / self.names[shard]}: member {name} (image {image_id}): it {what}; {REPAIR}")

    def _file(self, shard: int) -> "_File":
        """An open shard. One that is dropped here closes when the last thread has read from it."""
        with self._lock:
            file = self._open.pop(shard, None) or _File(self.folder / self.names[shard])
            self._open[shard] = file
            if len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)
        return file


REPAIR = "remove that shard and run public-scripts/pack_dataset.py again, which writes what is missing."


class _File:
    """A shard open for reading in random order: the kernel's guess at what follows would only be read in vain."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        advise(self.descriptor, "POSIX_FADV_RANDOM")

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def open_folder(folder: Path) -> Shards | None:
    """The shards of a folder; None if it holds no shards. UserError for unfinished packing and a damaged index."""
    path = folder / INDEX
    if not path.exists():
        if (folder / PLAN).exists():
            raise UserError(f"{folder}: packing was begun but not finished; run public-scripts/pack_dataset.py again.")
        return None
    found = columns_file.load(path, MAGIC)
    if found is None:
        raise UserError(f"{path}: the index of the shards is damaged; remove it and run public-scripts/pack_dataset.py "
                        "again, which makes it from the shards.")  # fmt: skip
    return Shards(folder, *found)


def hash_names(names: Sequence[str]) -> np.ndarray:
    """uint64 [n]: eight bytes of the BLAKE2b of each name."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=HASH_BYTES).digest() for name in names)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def advise(descriptor: int, advice: str) -> None:
    """posix_fadvise where the system has it; a file system that refuses it reads all the same."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, getattr(os, advice))


def _read_into(descriptor: int, data: np.ndarray, offset: int) -> int:
    """Fill `data` from the file; the number of bytes that were there."""
    view, done = memoryview(data), 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if not count:
            break
        done += count
    return done


class ReadAhead:
    """A thread that reads whole shards once, in large pieces, so that later reads find them in the page cache.

    Plain reads, not posix_fadvise(WILLNEED): that one is only advice, which network file systems cut short or ignore.
    Process `part` of `parts` on a machine reads every parts-th shard, so that together they read each once. `words`
    says what is done, or why nothing is: shards larger than four fifths of the memory that is free would push each
    other out. Reading stops at `close`; an error ends it silently, for the loader meets the same one and names it.
    """

    def __init__(self, packs: Sequence[Shards], part: int, parts: int) -> None:
        size, free = sum(sum(pack.sizes) for pack in packs), free_memory()
        paths = [pack.folder / name for pack in packs for name in pack.names]
        self._stop, self.bytes = threading.Event(), 0
        self._thread = threading.Thread(target=partial(self._read, paths[part::parts]), daemon=True)
        about = f"{size / 1e9:,.1f} GB of shards, {free / 1e9:,.1f} GB of memory free"
        if size > 0.8 * free:
            self.words = f"--read-ahead is left out: {about}; what was read would be pushed out before it is used"
            return
        self.words = f"reading ahead: {about}; each shard once, in pieces of {_PIECE >> 20} MiB"
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread.ident:
            self._thread.join()

    def _read(self, paths: list[Path]) -> None:
        piece = np.empty(_PIECE, np.uint8)
        with contextlib.suppress(OSError):
            for path in paths:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    advise(file, "POSIX_FADV_SEQUENTIAL")
                    offset = 0
                    while not self._stop.is_set() and (count := _read_into(file, piece, offset)):
                        offset += count
                        self.bytes += count
                finally:
                    os.close(file)


def free_memory() -> int:
    """Bytes that the page cache may still take: what the system says is available, or less where a cgroup limits."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    groups = (
        ("memory.max", "memory.stat", "anon "),
        ("memory/memory.limit_in_bytes", "memory/memory.stat", "total_rss "),
    )
    for limit, stat, word in groups:
        with contextlib.suppress(OSError, ValueError, StopIteration):
            most = int(Path("/sys/fs/cgroup", limit).read_text())
            lines = Path("/sys/fs/cgroup", stat).read_text().splitlines()
            free = min(free, most - int(next(line for line in lines if line.startswith(word)).split()[1]))
    return max(free, 0)
