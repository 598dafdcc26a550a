"""Every image of a data set read and decoded, on all processors: what only its bytes can show.

The one module of this package that imports torch, for the decoder that training uses.
"""

import hashlib
import io
import multiprocessing
import os
import signal
import tempfile
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataprep.findings import IMAGE_KINDS, NOTE, PROBLEM, Findings
from dataprep.verify_files import blocks
from detcore import UserError
from detcore.data import exif, transforms
from detcore.data.coco import CocoIndex

ORIENTED, TURNED = "images with an EXIF orientation", "images that EXIF turns"
UNDECIDED = "images of which the size does not tell whether EXIF turns them"
_CHUNK = 32  # images that a process checks in one go


def check_images(
    findings: Findings,
    split: str,
    index: CocoIndex,
    workers: int,
    progress: Callable[[int, int], None],
    skip: np.ndarray | None = None,
) -> np.ndarray:
    """Read and decode every listed image on `workers` processes; progress(images, bytes) is called now and then.

    skip: bool [I], the images that need no check, see `check_names`; None: none of them.

    Returns uint64 [I]: eight bytes of the SHA-256 of each file, 0 where there is none. Files with the same bytes are
    a finding of their own.
    """
    hashes = np.zeros(len(index), np.uint64)
    for first, rows, digests, size in _on_processes(index, workers, skip):
        hashes[first : first + len(digests)] = digests
        for what, name, detail in rows:
            findings.on_each(split, what, name, detail)
            level, do = IMAGE_KINDS[what]
            findings.add(level, split, what, 1, [f"{name} ({detail})" if detail else name], do)
        progress(len(digests), size)
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero((hashes[order][1:] == hashes[order][:-1]) & (hashes[order][1:] != 0)).tolist()
    twice = (f"{index.file_name(order[k + 1])} = {index.file_name(order[k])}" for k in same
             if index.file_name(order[k + 1]) != index.file_name(order[k]))  # fmt: skip
    findings.add_names(
        NOTE, split, "files with the same bytes as another", twice, "they count double; remove one of each"
    )
    return hashes


def check_leaks(findings: Findings, splits: dict[str, tuple[CocoIndex, np.ndarray]]) -> None:
    """Pictures of the training set that are validation images too. splits: index and hashes of `check_images`."""
    if {"train", "val"} <= splits.keys():
        (train, first), (val, second) = splits["train"], splits["val"]
        order = np.argsort(first)
        at = np.searchsorted(first[order], second).clip(max=len(first) - 1)
        both = np.flatnonzero((first[order][at] == second) & (second != 0)).tolist()
        names = (f"{val.file_name(k)} = training's {train.file_name(int(order[at[k]]))}" for k in both)
        do = "the metric counts pictures that were trained on; remove them from one of the two"
        findings.add_names(NOTE, "val", "images that are in the training set too", names, do)


def _on_processes(index: CocoIndex, workers: int, skip: np.ndarray | None) -> Iterator[tuple]:
    """`_check_chunk` of every chunk of images, in order, with few chunks under way."""
    waiting: deque[Future] = deque()
    # Forked: nothing is imported again. No thread holds a lock here, and the children decode, which starts none.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker, (index, skip))
    try:
        for block in blocks(len(index), _CHUNK):
            waiting.append(pool.submit(_check_chunk_of_worker, block.start, block.stop))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"one of the {workers} processes was killed, by hand or because memory ran out; try fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_index: CocoIndex | None = None  # of a worker process
_skip: np.ndarray | None = None


def _start_worker(index: CocoIndex, skip: np.ndarray | None) -> None:
    global _index, _skip
    _index, _skip = index, skip
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the work
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _check_chunk_of_worker(first: int, last: int) -> tuple:
    return _check_chunk(_index, first, last)


def _check_chunk(index: CocoIndex, first: int, last: int) -> tuple[int, list[tuple[str, str, str]], np.ndarray, int]:
    """The findings (kind, file, detail) of images first..last-1, the hashes of their bytes, and how many those are."""
    rows: list[tuple[str, str, str]] = []
    digests, size = np.zeros(last - first, np.uint64), 0
    with tempfile.TemporaryFile() as warned:
        # The JPEG library writes its warnings to the process's stderr and nowhere else.
        before = os.dup(2)
        os.dup2(warned.fileno(), 2)
        try:
            for i in range(first, last):
                if _skip is not None and _skip[i]:
                    continue
                name = index.file_name(i)
                try:
                    data = index.read(i)
                except UserError as error:
                    empty = "is empty" in str(error)
                    kind = "empty files" if empty else "files that cannot be read"
                    rows.append((kind, name, "" if empty else str(error)))
                    continue
                size += len(data)
                digests[i - first] = np.frombuffer(hashlib.sha256(data).digest()[:8], np.uint64)[0]
                rows += ((kind, name, detail) for kind, detail in _check_image(index, i, data))
                if length := os.lseek(2, 0, os.SEEK_CUR):
                    text = os.pread(2, length, 0).decode(errors="replace").strip()
                    os.ftruncate(2, 0)
                    os.lseek(2, 0, os.SEEK_SET)
                    if not any(row[1] == name and IMAGE_KINDS[row[0]][0] == PROBLEM for row in rows):
                        rows.append(("images that decode with a warning", name, text.splitlines()[-1] if text else ""))
        finally:
            os.dup2(before, 2)
            os.close(before)
    return first, rows, digests, size


def _check_image(index: CocoIndex, i: int, data: np.ndarray) -> Iterator[tuple[str, str]]:
    """(kind, detail) of each finding about one image's bytes."""
    about = {"path": Path(index.file_name(i)), "image_id": int(index.image_ids[i])}
    height, width = int(index.heights[i]), int(index.widths[i])
    try:
        found = tuple(transforms.decode(data, turn="ignore", **about).shape[1:])
    except UserError as error:
        yield _damage(str(error).partition(" does not decode ")[2].rpartition("; replace")[0].strip("()") or str(error))
        return
    header = list(_header(data, about["path"].suffix.lower()))
    orientation = next((int(detail) for kind, detail in header if kind == ORIENTED), 0)
    turned = exif.told(orientation, found) and found == (width, height)
    if found != (height, width) and not turned:
        exchanged = ", sides exchanged" if found == (width, height) else ""
        yield ("images of another size than the annotation file says",
               f"{found[1]}x{found[0]}, listed {width}x{height}{exchanged}")  # fmt: skip
    for kind, detail in header:
        if kind == ORIENTED and (turned or not exif.told(orientation, found)):
            yield (TURNED if turned else UNDECIDED), detail
        else:
            yield kind, detail


def _header(data: np.ndarray, suffix: str) -> Iterator[tuple[str, str]]:
    """What Pillow sees in the header of an image that decodes."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
            orientation, mode, kind = _orientation(image), image.mode, image.format
    except Exception as error:  # its readers raise whatever a file makes them stumble over
        yield "images that decode with a warning", f"Pillow cannot read the header: {error}"
        return
    if orientation in range(2, 9):
        yield ORIENTED, str(orientation)
    elif orientation not in (None, 1):
        yield "images with an invalid EXIF orientation", str(orientation)
    if mode in ("1", "L"):
        yield "greyscale images", ""
    elif mode in ("CMYK", "YCCK"):
        yield "CMYK images", ""
    elif mode != "RGB":
        yield "palette or transparent images", mode
    if suffix in (".jpg", ".jpeg", ".png") and kind != ("PNG" if suffix == ".png" else "JPEG"):
        yield "files of another format than their name says", str(kind)


def _orientation(image: Image.Image) -> object:
    """The EXIF tag as it stands, None without one; like openimages_to_coco.py without XMP's, which Pillow would use."""
    if image.format != "JPEG":
        return image.getexif().get(0x112)
    exif = Image.Exif()
    exif.load(image.info.get("exif", b""))
    return exif.get(0x112)


def _damage(reason: str) -> tuple[str, str]:
    low = reason.lower()
    if any(word in low for word in ("truncated", "incomplete", "ends before", "cut off", "premature")):
        return "truncated images", reason
    return ("files that are no image" if "cannot identify" in low else "damaged images"), reason
