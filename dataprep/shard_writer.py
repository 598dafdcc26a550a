"""Writing the shards that `detcore.data.shards` reads: the images of an annotation file into tar files, one by one.

A shard is written under a hidden name, flushed, read back from its beginning with the CRC-32 of every member, and only
then renamed; its places are noted beside it (`.00000.part`). The index comes last. A run that was killed goes on with
the first shard that is missing. The bytes depend on the images, their order and the shard size alone: headers carry no
time, owner or machine, so that packing twice gives the same files.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from detcore import UserError
from detcore.data import columns as columns_file
from detcore.data import shards
from detcore.data.coco import CocoIndex
from detcore.data.shards import INDEX, MAGIC, PLAN, Shards, hash_names

_PART_MAGIC = b"detcore part 1\n\0"
_OPTIONS = {"annotation_file": "annotation file", "annotation_sha256": "its content", "images": "images",
          "shard_bytes": "--shard-size", "shuffle": "--shuffle"}  # fmt: skip
_AHEAD = 8  # files that a reading thread may be ahead of the writer


class Part(NamedTuple):
    """The members of one shard in its order: uint64 hash of the name, int64 offset and length, uint32 CRC-32 [n]."""

    hashes: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    crc: np.ndarray


class Packed(NamedTuple):
    """What `pack` made or found. written: shards of this run; bytes: of all shard files."""

    images: int
    shards: int
    written: int
    bytes: int
    content_hash: str


def pack(
    index: CocoIndex,
    folder: Path,
    *,
    shard_bytes: int = 10**9,
    shuffle: int | None = None,
    threads: int = 16,
    force: bool = False,
    done: Callable[[int, int, bool], None] = lambda images, size, new: None,
) -> Packed:
    """Pack the images of an index into `folder`, going on where an earlier run stopped.

    shard_bytes: a shard ends before the image that would make it longer. shuffle: the seed of the images' order; None:
    that of the annotation file. done(images, bytes, new) reports progress; new is False for what was there.
    Raises UserError for images that are missing, empty or outside of the image folder, another packing in the folder
    (force replaces it), a second one going on there, and a disk that does not keep what was written.
    """
    index.check_images()
    index.check_inside()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose a place that can be written") from error
    with _alone(folder), _disk_errors(folder):
        order, hashes = _order(index, shuffle)
        _plan(folder, index, len(order), shard_bytes, shuffle, force)
        known = _known(folder)
        parts: list[Part] = []
        written = at = 0
        with _Reader(index, order, threads) as reader:
            while at < len(order):
                part = _recorded(folder, len(parts), known)
                if part is not None and not np.array_equal(part.hashes, hashes[at : at + len(part.hashes)]):
                    raise UserError(f"{_path(folder, len(parts))}: holds other images than this packing puts there; "
                                    "give an empty folder, or --force to replace what lies here.")  # fmt: skip
                if part is None:
                    part = _write(folder, len(parts), reader, at, shard_bytes, done)
                    written += 1
                else:
                    done(len(part.hashes), int(part.length.sum()), False)
                parts.append(part)
                at += len(part.hashes)
        _forget(folder, keep=len(parts))
        content_hash = _write_index(folder, index, order, parts)
        for path in folder.glob(".*.part*"):
            path.unlink()
    size = sum(_path(folder, k).stat().st_size for k in range(len(parts)))
    return Packed(len(order), len(parts), written, size, content_hash)


def check(pack: Shards, done: Callable[[int, int, bool], None] = lambda images, size, new: None) -> None:
    """Read every shard whole and compare it with the index. UserError naming the first shard that differs."""
    pack.check()
    for number in range(len(pack.names)):
        path = _path(pack.folder, number)
        expected, found = _indexed(pack, number), scan(path)
        for what, a, b in zip(Part._fields, expected, found, strict=True):
            if not np.array_equal(a, b):
                at = f", first at member {int((a != b).argmax())}" if len(a) == len(b) else ""
                raise UserError(f"{path}: its members are not those of the index ({what}{at}); "
                                "remove it and pack again")  # fmt: skip
        done(len(found.hashes), int(found.length.sum()), False)


def scan(path: Path) -> Part:
    """The members of a shard, each read whole. UserError where it is no whole tar file of plain files."""
    rows: list[tuple[int, int, int]] = []
    names: list[str] = []
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            shards.advise(file.fileno(), "POSIX_FADV_SEQUENTIAL")
            for member in tar:
                data = os.pread(file.fileno(), member.size, member.offset_data)
                if not member.isreg() or len(data) != member.size:
                    raise UserError(f"{path}: member {member.name} is not a whole file; {shards.REPAIR}")
                names.append(member.name)
                rows.append((member.offset_data, member.size, zlib.crc32(data)))
            end = file.seek(0, os.SEEK_END)
            if end % tarfile.RECORDSIZE or os.pread(file.fileno(), 1024, end - 1024).strip(b"\0"):
                raise UserError(f"{path}: the end of the archive is missing; {shards.REPAIR}")
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{path}: cannot be read as a tar file ({error}); {shards.REPAIR}") from error
    return _part(names, rows)


def _part(names: list[str], rows: list[tuple[int, int, int]]) -> Part:
    offset, length, crc = np.array(rows, np.int64).reshape(-1, 3).T
    return Part(hash_names(names), offset.copy(), length.copy(), crc.astype(np.uint32))


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.tar"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. UserError if another process packs into it; no lock where the file system has none."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process is packing into it; wait for its end.") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}). Finished shards are kept: free space, or mend the disk, "
            "then give the same command again and it goes on there."
        ) from error


def _order(index: CocoIndex, shuffle: int | None) -> tuple[np.ndarray, np.ndarray]:
    """int64 [n] positions of the images in packing order, each file name once, and uint64 [n] hashes of the names."""
    hashes = np.concatenate(
        [hash_names([index.file_name(i) for i in range(at, min(at + 65536, len(index)))])
         for at in range(0, len(index), 65536)]
    )  # fmt: skip
    _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    for i in np.flatnonzero(first[which] != np.arange(len(index))).tolist():
        names = index.file_name(i), index.file_name(first[which[i]])
        if names[0] != names[1]:
            raise UserError(f"{names[0]} and {names[1]} have the same hash in the index of the shards; rename one.")
    order = np.sort(first)
    if shuffle is not None:
        order = np.random.default_rng([shuffle]).permutation(order)
    return order, hashes[order]


def _plan(folder: Path, index: CocoIndex, count: int, shard_bytes: int, shuffle: int | None, force: bool) -> None:
    """Note what is packed here, or compare with what was noted: two packings must not mix."""
    path = folder / PLAN
    plan = {
        "format": "tar files of images; shards.index: where each lies (detcore/data/shards.py); train with --shards",
        "annotation_file": index.annotation_file.name,
        "annotation_sha256": index.content_hash,
        "images": count, "shard_bytes": shard_bytes, "shuffle": shuffle,
    }  # fmt: skip
    try:
        found = json.loads(path.read_text()) if path.exists() else None
    except ValueError:
        found = {}
    if found == plan:
        return
    strangers = [p.name for p in folder.iterdir() if p.name != PLAN and not p.name.startswith(".")]
    if strangers and (found is None or not force):
        if found is None:
            raise UserError(f"{folder}: holds other files already ({', '.join(strangers[:3])}); give an empty folder.")
        differs = ", ".join(f"{word} {_shown(key, found.get(key))}, now {_shown(key, plan[key])}"
                            for key, word in _OPTIONS.items() if found.get(key) != plan[key])  # fmt: skip
        raise UserError(f"{folder}: holds another packing ({differs or 'of another format'}); --force replaces it.")
    if found is not None:
        _forget(folder, keep=0)
    _write_text(path, json.dumps(plan, indent=1) + "\n")


def _shown(key: str, value: object) -> str:
    if key == "shard_bytes" and isinstance(value, int) and value > 0:  # as --shard-size takes it
        power = max(k for k in range(5) if value % 1000**k == 0)
        return f"{value // 1000**power}{' kMGT'[power]}".strip()
    return "none" if value is None else str(value)[:40]


def _forget(folder: Path, keep: int) -> None:
    """Remove the shards from number `keep` on; all of them: the index first, which must not outlive one."""
    if not keep:
        (folder / INDEX).unlink(missing_ok=True)
        for path in folder.glob(".[0-9]*.part*"):
            path.unlink()
    for path in folder.glob("[0-9]*.tar"):
        if path.stem.isdecimal() and int(path.stem) >= keep:
            path.unlink()
            path.with_suffix(".idx").unlink(missing_ok=True)


def _known(folder: Path) -> Shards | None:
    """The finished index of an earlier packing; a damaged one is removed and made again from the shards."""
    try:
        return shards.open_folder(folder) if (folder / INDEX).exists() else None
    except UserError:
        (folder / INDEX).unlink()
        return None


def _indexed(pack: Shards, number: int) -> Part:
    column = pack.columns
    rows = np.flatnonzero(column["shard"] == number)
    rows = rows[np.argsort(column["offset"][rows])]
    return Part(*(column[name][rows] for name in ("hashes", "offset", "length", "crc")))


def _recorded(folder: Path, number: int, known: Shards | None) -> Part | None:
    """The members of a shard that is already there: from the index, the note beside it, or itself; None: write it."""
    path = _path(folder, number)
    if not path.exists():
        return None
    size = path.stat().st_size
    if known and number < len(known.names):
        return _indexed(known, number) if size == known.sizes[number] else None
    note = columns_file.load(folder / f".{number:05}.part", _PART_MAGIC)
    if note and note[0]["bytes"] == size:
        return Part(*(note[1][name] for name in Part._fields))
    try:
        return scan(path)
    except UserError:
        return None


def _write(
    folder: Path, number: int, reader: "_Reader", at: int, shard_bytes: int, done: Callable[[int, int, bool], None]
) -> Part:
    """Write the shard that begins with the image at position `at` of the order, verified, with its DALI index."""
    path = _path(folder, number)
    part = folder / f".{path.name}.part"
    rows: list[tuple[int, int, int]] = []
    names: list[str] = []
    reader.seek(at)
    end = 0
    try:
        with open(part, "wb", buffering=1 << 20) as file:
            while (item := reader.peek()) is not None:
                name, data, crc = item
                member = tarfile.TarInfo(name)
                member.size = len(data)
                head = member.tobuf(tarfile.GNU_FORMAT)
                padding = -len(data) % tarfile.BLOCKSIZE
                if rows and _with_end(end + len(head) + len(data) + padding) > shard_bytes:
                    break
                reader.pop()
                file.writelines((head, data, bytes(padding)))
                names.append(name)
                rows.append((end + len(head), len(data), crc))
                end += len(head) + len(data) + padding
                done(1, len(data), True)
            file.write(bytes(_with_end(end) - end))
            file.flush()
            os.fsync(file.fileno())
            shards.advise(file.fileno(), "POSIX_FADV_DONTNEED")  # so that it is the disk that is read back
        wanted, found = _part(names, rows), scan(part)
        if not all(np.array_equal(a, b) for a, b in zip(wanted, found, strict=True)):
            raise UserError(f"{part}: the disk gives back other bytes than were written; check it, then run again.")
        _write_text(path.with_suffix(".idx"), _dali_index(names, rows))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    header = {"bytes": path.stat().st_size}
    columns_file.save(folder / f".{number:05}.part", _PART_MAGIC, header, wanted._asdict())
    return wanted


def _with_end(length: int) -> int:
    """The size of a tar file whose members take so many bytes: two empty blocks, filled up to a whole record."""
    return -(-(length + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _dali_index(names: list[str], rows: list[tuple[int, int, int]]) -> str:
    """The lines of `wds2idx`: extension, offset, length and name of each sample."""
    lines = (f"{name.rpartition('/')[2].partition('.')[2]} {offset} {length} {name}\n"
             for name, (offset, length, _) in zip(names, rows, strict=True))  # fmt: skip
    return f"v1.2 {len(names)}\n" + "".join(lines)


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def _write_index(folder: Path, index: CocoIndex, order: np.ndarray, parts: list[Part]) -> str:
    """Write shards.index, unless it is there with the same content already; returns the content hash."""
    hashes, offset, length, crc = (np.concatenate(column) for column in zip(*parts, strict=True))
    shard = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.hashes) for part in parts])
    rank = np.argsort(hashes)
    encoded = [index.file_name(i).encode() for i in order[rank].tolist()]
    digest = hashlib.sha256()
    for name, n, c in zip(encoded, length[rank].tolist(), crc[rank].tolist(), strict=True):
        digest.update(b"%s\0%d\0%d\n" % (name, n, c))
    columns = {
        "hashes": hashes[rank],
        "shard": shard[rank],
        "offset": offset[rank],
        "length": length[rank],
        "crc": crc[rank],
        "name_ends": np.cumsum([len(name) for name in encoded], dtype=np.int64),
        "names": np.frombuffer(b"".join(encoded), np.uint8),
    }
    paths = [_path(folder, k) for k in range(len(parts))]
    header = {"shards": [path.name for path in paths], "sizes": [path.stat().st_size for path in paths]}
    header["content_hash"] = digest.hexdigest()
    columns_file.save(folder / INDEX, MAGIC, header, columns)
    return header["content_hash"]


class _Reader:
    """Reads the images in order with several threads, a few files ahead of the writer."""

    def __init__(self, index: CocoIndex, order: np.ndarray, threads: int) -> None:
        self.index, self.order, self.ahead = index, order, _AHEAD * threads
        self.pool = ThreadPoolExecutor(threads)
        self.waiting: deque[Future] = deque()
        self.at = 0  # of the next one to ask for

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def seek(self, at: int) -> None:
        if self.at - len(self.waiting) != at:
            for future in self.waiting:
                future.cancel()
            self.waiting.clear()
            self.at = at
        self._fill()

    def peek(self) -> tuple[str, bytes, int] | None:
        """Name, bytes and CRC-32 of the next image; None after the last."""
        return self.waiting[0].result() if self.waiting else None

    def pop(self) -> None:
        self.waiting.popleft()
        self._fill()

    def _fill(self) -> None:
        while self.at < len(self.order) and len(self.waiting) < self.ahead:
            self.waiting.append(self.pool.submit(self._read, int(self.order[self.at])))
            self.at += 1

    def _read(self, i: int) -> tuple[str, bytes, int]:
        data = self.index.read(i).tobytes()
        return self.index.file_name(i), data, zlib.crc32(data)
