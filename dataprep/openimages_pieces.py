"""Finished parts of a long piece of work, kept in files with checksums, and the processes that make them.

A piece is written under a temporary name and renamed, so a name that exists was written to its end; its checksums show
whether the bytes reached the disk before a power cut, which saves a sync for each. A damaged piece counts as absent.
"""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import signal
import struct
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from detcore import UserError

_HEAD = struct.Struct("<8sII")  # magic, length and CRC-32 of the header
_MAGIC = b"piece 1\n"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Tally(dict):
    """What was met, by kind: [how often, the first few examples]. Merging in a fixed order gives a fixed result."""

    EXAMPLES = 5

    def add(self, kind: str, count: int, examples: Iterable[str] = ()) -> None:
        """Count `count` more of a kind; nothing is noted for none."""
        if count:
            entry = self.setdefault(kind, [0, []])
            entry[0] += int(count)
            entry[1] += [str(example) for example in examples][: self.EXAMPLES - len(entry[1])]

    def merge(self, other: dict[str, list]) -> None:
        """Add another tally."""
        for kind, (count, examples) in other.items():
            self.add(kind, count, examples)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full disk while writing `path` into a UserError, and removes what was written of it."""
    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(path)
        if error.errno not in _FULL:
            raise
        raise UserError(
            f"{path.parent}: the disk is full ({error.strerror}). What was finished is kept: free space, then give the "
            "same command again and it continues there"
        ) from error


@contextlib.contextmanager
def locked(work: Path, output: Path) -> Iterator[None]:
    """Holds the work folder, made if need be, for this run alone."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / "lock", "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{work} can't be made: {error.strerror}; it holds the finished parts until the end") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{output} is being written by another run of this program; wait for it") from error
        yield


def write(path: Path, meta: dict[str, Any], **arrays: np.ndarray) -> None:
    """Write a piece: `meta`, which must be JSON, and one-dimensional arrays. Raises UserError if the disk is full."""
    places, at, blobs = {}, 0, []
    for name, array in arrays.items():
        blob = np.ascontiguousarray(array).view(np.uint8).data if array.size else b""
        dtype = array.dtype.descr if array.dtype.names else array.dtype.str
        places[name] = {"dtype": dtype, "at": at, "bytes": len(blob), "crc": zlib.crc32(blob)}
        blobs.append(blob)
        at += len(blob)
    header = json.dumps({"meta": meta, "arrays": places}).encode()
    part = path.with_name(f"{path.name}.part")
    with disk_errors(part):
        with open(part, "wb", buffering=0) as file:
            for blob in (_HEAD.pack(_MAGIC, len(header), zlib.crc32(header)) + header, *blobs):
                left = memoryview(blob)
                while left:
                    left = left[file.write(left) :]
        os.replace(part, path)


def check(path: Path) -> dict[str, Any] | None:
    """The `meta` of a piece that is there and whole, else None. Reads the whole piece, a megabyte at a time."""
    try:
        meta, places, start = _header(path)
        with open(path, "rb") as file:
            for place in places.values():
                file.seek(start + place["at"])
                left, crc = place["bytes"], 0
                while left and (data := file.read(min(left, 1 << 20))):
                    left, crc = left - len(data), zlib.crc32(data, crc)
                if left or crc != place["crc"]:
                    return None
    except (FileNotFoundError, ValueError, KeyError, struct.error):
        return None
    return meta


def meta(path: Path) -> dict[str, Any]:
    """The `meta` of a piece that is known to be whole."""
    return _header(path)[0]


def read(path: Path, name: str, begin: int = 0, end: int | None = None) -> np.ndarray:
    """Elements begin..end of one array of a piece that is known to be whole; only these are read."""
    _, places, start = _header(path)
    place = places[name]
    described = place["dtype"]
    dtype = np.dtype([tuple(field) for field in described] if isinstance(described, list) else described)
    end = place["bytes"] // dtype.itemsize if end is None else end
    with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), (end - begin) * dtype.itemsize, start + place["at"] + begin * dtype.itemsize)
    return np.frombuffer(data, dtype)


def _header(path: Path) -> tuple[dict, dict, int]:
    with open(path, "rb") as file:
        magic, length, crc = _HEAD.unpack(file.read(_HEAD.size))
        text = file.read(length)
    if magic != _MAGIC or zlib.crc32(text) != crc:
        raise ValueError(f"{path} is not a piece")
    header = json.loads(text)
    return header["meta"], header["arrays"], _HEAD.size + length


@lru_cache(maxsize=4096)
def starts(path: Path) -> np.ndarray:
    """The array `starts` of a piece: where each bucket of its records begins, and the end. Kept: it is asked often."""
    return read(path, "starts")


class Workers:
    """Processes that work through tasks; with one worker this process itself. `job` is what every task is given.

    They end with this process, however it ends.
    """

    def __init__(self, workers: int, job: Any) -> None:
        self._job, self._workers, self._pool = job, workers, None
        starts.cache_clear()
        if workers > 1:
            # Forked before any thread exists, so that nothing is imported again and no lock is caught half-way.
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(job,))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def run(self, function: Callable, tasks: Iterable[tuple]) -> Iterator[Any]:
        """Yield function(job, *task) of each task, in order; few more are under way than there are workers.

        Raises UserError if a process was killed.
        """
        if not self._pool:
            yield from (function(self._job, *task) for task in tasks)
            return
        waiting: deque[Future] = deque()
        try:
            for task in tasks:
                waiting.append(self._pool.submit(_do, function, task))
                if len(waiting) > 2 * self._workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                f"one of the {self._workers} processes was killed, by hand or because memory ran out. What was "
                f"finished is kept: give the same command again, with fewer --workers than {self._workers} if memory "
                "is short"
            ) from error


_job_of_this_process: Any = None


def _begin(job: Any) -> None:
    global _job_of_this_process
    _job_of_this_process = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the work
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _do(function: Callable, task: tuple) -> Any:
    return function(_job_of_this_process, *task)
