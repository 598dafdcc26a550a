"""Numpy arrays and a JSON header in one file: written whole or not at all, checked when opened, then memory-mapped.

Layout: magic, length and CRC-32 of the header, the header, and the columns, each at a multiple of a page. The header
holds dtype, shape, place, length and CRC-32 of every column. Columns up to 1 MiB are checked whole, larger ones in 64
evenly spread places, so that opening takes the same time for any size.
"""

import json
import math
import mmap
import os
import struct
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PREFIX = struct.Struct("<16sQI")  # magic, length of the header, its CRC-32
_ALIGN = 4096
_WHOLE = 1 << 20


def save(path: Path, magic: bytes, header: dict[str, Any], columns: dict[str, np.ndarray]) -> None:
    """Write under another name and rename, so that nobody ever reads half of it. magic: 16 bytes. Raises OSError."""
    table, end = {}, 0
    for name, column in columns.items():
        start = aligned(end)
        table[name] = [column.dtype.str, list(column.shape), start, column.nbytes, checksum_of(column)]
        end = start + column.nbytes
    text = json.dumps({**header, "columns": table, "length": end}).encode()
    base = aligned(PREFIX.size + len(text))
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "xb") as out:
            out.write(PREFIX.pack(magic, len(text), zlib.crc32(text)) + text)
            for name, column in columns.items():
                out.seek(base + table[name][2])
                column.tofile(out)
            out.truncate(base + end)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(
    path: Path, magic: bytes, fits: Callable[[dict[str, Any]], bool] = lambda header: True
) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Header and columns, or None if the file is not there, damaged, or its header does not fit."""
    try:
        with open(path, "rb") as file:
            found, length, crc = PREFIX.unpack(file.read(PREFIX.size))
            size = os.fstat(file.fileno()).st_size
            if found != magic or PREFIX.size + length > size:
                return None
            text = file.read(length)
            if zlib.crc32(text) != crc:
                return None
            header = json.loads(text)
            base = aligned(PREFIX.size + length)
            if not fits(header) or size != base + header["length"]:
                return None
            # Read, not mapped: a mapped page brings its whole neighbourhood into this process's memory.
            for _, _, start, nbytes, check in header["columns"].values():
                if _checksum(nbytes, lambda at, n, begin=base + start: os.pread(file.fileno(), n, begin + at)) != check:
                    return None
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError, KeyError, struct.error):
        return None
    columns = {
        name: np.frombuffer(mapped, dtype, count=math.prod(shape), offset=base + start).reshape(shape)
        for name, (dtype, shape, start, _, _) in header["columns"].items()
    }
    return header, columns


def _checksum(length: int, read: Callable[[int, int], bytes | memoryview]) -> int:
    """CRC-32 of a column of `length` bytes; read(at, n) gives n bytes of it."""
    places = (
        [(0, length)] if length <= _WHOLE else [(at, _ALIGN) for at in np.linspace(0, length - _ALIGN, 64, dtype=int)]
    )
    crc = 0
    for at, n in places:
        crc = zlib.crc32(read(at, n), crc)
    return crc


def checksum_of(column: np.ndarray) -> int:
    """The CRC-32 of a column as `load` checks it."""
    data = column.reshape(-1).view(np.uint8).data
    return _checksum(len(data), lambda at, n: data[at : at + n])


def aligned(offset: int) -> int:
    """The next multiple of a page."""
    return -(-offset // _ALIGN) * _ALIGN
