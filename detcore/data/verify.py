"""What can be wrong with a COCO-format data set, found before training: counts, names, boxes, and every image's pixels.

Findings are problems, which training refuses or which mean that the copy is not whole, and notes, which training has a
treatment for. Memory: the annotation index is memory-mapped (`CocoIndex`, built here if it is not there yet, so that
training starts from it), eight bytes are kept for each file, and a few examples of each finding.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from detcore import UserError
from detcore.data import transforms
from detcore.data.coco import CocoIndex, training_boxes
from detcore.data.shards import hash_names

PROBLEM, NOTE = "problem", "note"
EXAMPLES = 5
_CHUNK = 32  # images that a process looks at in one go
_BLOCK = 8192  # images whose boxes are looked at together

FULL_KINDS = {
    "files that cannot be read": (PROBLEM, "restore them: the loader stops at the first one"),
    "empty files": (PROBLEM, "fetch them again; an empty file is a download that never began"),
    "files that are no image": (PROBLEM, "fetch them again, and look into one: often it is a server's error page"),
    "truncated images": (PROBLEM, "fetch them again; they end in the middle"),
    "damaged images": (PROBLEM, "fetch them again; they do not decode"),
    "images of another size than the annotation file says": (
        PROBLEM, "their boxes are wrong: correct the file or its entry (exchanged sides: rotated by EXIF somewhere)"),
    "images that decode with a warning": (NOTE, "fetch them again if their pixels matter: part may be grey or shifted"),
    "images with an EXIF orientation": (NOTE, "it is never applied, here and in the reference: boxes must fit without"),
    "images with an invalid EXIF orientation": (NOTE, "not one of 1 to 8: nobody applies it"),
    "greyscale images": (NOTE, "decoded to RGB"),
    "CMYK images": (NOTE, "decoded to RGB; the colours of some are inverted"),
    "palette or transparent images": (NOTE, "decoded to RGB; transparency is ignored"),
    "files of another format than their name says": (NOTE, "read by their content; slower than JPEG"),
}  # fmt: skip


class Findings:
    """What was found: dicts with level, split, what, count, examples, do. `every` hears of each single one."""

    def __init__(self, every: Callable[[str, str, str, str], None] = lambda split, what, name, detail: None) -> None:
        self.items: list[dict] = []
        self.every = every

    def add(self, level: str, split: str, what: str, count: int, examples: list[str], do: str) -> None:
        if not count:
            return
        shown = examples[:EXAMPLES]
        for item in self.items:
            if (item["split"], item["what"]) == (split, what):
                item["count"] += count
                item["examples"] = (item["examples"] + shown)[:EXAMPLES]
                return
        keys = ("level", "split", "what", "count", "examples", "do")
        self.items.append(dict(zip(keys, (level, split, what, count, shown, do), strict=True)))

    def each(self, level: str, split: str, what: str, names: Iterator[str], do: str) -> None:
        """A finding of one name after the other."""
        for name in names:
            self.every(split, what, name, "")
            self.add(level, split, what, 1, [name], do)

    @property
    def problems(self) -> int:
        return sum(item["level"] == PROBLEM for item in self.items)


MISSING, NOT_PACKED = "images listed but missing", "images listed but not in the shards"


def check_names(
    findings: Findings, split: str, index: CocoIndex, partial: bool, empty: Sequence[str] = ()
) -> tuple[int, np.ndarray]:
    """Files against the names that the annotation file lists: the number of image files in their folders, and bool [I]:
    the images that need no further look, for they are missing or named in `empty`, the empty files found before.

    Does nothing for shards but to compare names: their index knows what they hold. partial: fewer files are no problem.
    """
    names = range(len(index))
    level = NOTE if partial else PROBLEM
    do = "fetch them; training does not start while they are missing"
    if index.shards:
        rows = np.concatenate([index.shards.find([index.file_name(i) for i in b]) for b in _blocks(len(index))])
        missing = (index.file_name(i) for i in np.flatnonzero(rows < 0).tolist())
        findings.each(level, split, NOT_PACKED, missing, "pack the data set again")
        return len(index.shards), rows < 0
    listed = np.concatenate([hash_names([index.file_name(i) for i in block]) for block in _blocks(len(index))])
    folders = sorted({os.path.dirname(index.file_name(i)) for i in names})
    have = []
    for folder in folders:
        have += [hash_names(block) for block in _listing(index.image_dir, folder)]
    there = np.concatenate(have) if have else np.empty(0, np.uint64)
    away = ~np.isin(listed, there)
    seen = away | np.isin(listed, hash_names(list(empty))) if empty else away
    missing = np.flatnonzero(away)
    findings.each(level, split, MISSING, (index.file_name(i) for i in missing.tolist()), do)
    if np.isin(there, listed, invert=True).any():
        listed.sort()
        for folder in folders:
            for block in _listing(index.image_dir, folder):
                at = np.searchsorted(listed, hashes := hash_names(block)).clip(max=len(listed) - 1)
                extra = np.flatnonzero(listed[at] != hashes).tolist()
                do = "they are not used; remove them, or list them in the annotation file"
                findings.each(
                    NOTE, split, "files that the annotation file does not list", (block[k] for k in extra), do
                )
    return len(there), seen


def _blocks(count: int, size: int = 65536) -> Iterator[range]:
    return (range(at, min(at + size, count)) for at in range(0, count, size))


def _listing(root: Path, folder: str) -> Iterator[list[str]]:
    """Names below root of the visible files of one folder, some thousand at a time; a link to nothing is no file."""
    block: list[str] = []
    try:
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.is_dir(follow_symlinks=False):
                    continue
                if not entry.is_symlink() or os.path.exists(entry.path):
                    block.append(os.path.join(folder, entry.name))
                if len(block) == 65536:
                    yield block
                    block = []
    except FileNotFoundError:
        return
    yield block


def check_boxes(findings: Findings, split: str, index: CocoIndex) -> None:
    """Boxes without area, outside of their image, and annotations that stand there twice."""
    for block in _blocks(len(index), _BLOCK):
        image, label, bbox = index.annotations(block.start, block.stop)
        height, width = index.heights[image], index.widths[image]
        _, keep, _ = training_boxes(bbox, height, width)
        flat = (bbox[:, 2:] <= 0).any(1)
        over = np.maximum(-bbox[:, :2], bbox[:, :2] + bbox[:, 2:] - np.stack([width, height], 1)).max(1)
        mixed = np.zeros(len(bbox), np.uint64)
        for column in (image, label, *(bbox[:, k].copy().view(np.uint64) for k in range(4))):
            mixed = (mixed ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
        _, first = np.unique(mixed, return_index=True)
        again = np.ones(len(bbox), bool)
        again[first] = False
        kinds = (
            ("boxes of no width or height", flat, "left out of training; evaluation sees them"),
            ("boxes wholly outside of their image", ~keep & ~flat, "left out of training: is the image the right one?"),
            ("boxes that reach out of their image by more than a pixel", keep & (over > 1), "clipped in training"),
            ("annotations that stand there twice", again, "both train; remove one if that is not meant"),
        )
        for what, bad, do in kinds:
            rows = np.flatnonzero(bad)
            shown = [f"{index.file_name(image[k])} {np.round(bbox[k], 1).tolist()}" for k in rows[:EXAMPLES].tolist()]
            findings.add(NOTE, split, what, len(rows), shown, do)


def check_images(
    findings: Findings,
    split: str,
    index: CocoIndex,
    workers: int,
    seen: Callable[[int, int], None],
    skip: np.ndarray | None = None,
) -> np.ndarray:
    """Read and decode every listed image on `workers` processes. seen(images, bytes) hears of progress.

    skip: bool [I], the images that were found wanting already, see `check_names`; None: none of them.

    Returns uint64 [I]: eight bytes of the SHA-256 of each file, 0 where there is none. Files with the same bytes are
    a finding of their own.
    """
    hashes = np.zeros(len(index), np.uint64)
    for first, rows, digests, size in _on_processes(index, workers, skip):
        hashes[first : first + len(digests)] = digests
        for what, name, detail in rows:
            findings.every(split, what, name, detail)
            level, do = FULL_KINDS[what]
            findings.add(level, split, what, 1, [f"{name} ({detail})" if detail else name], do)
        seen(len(digests), size)
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero((hashes[order][1:] == hashes[order][:-1]) & (hashes[order][1:] != 0)).tolist()
    twice = (f"{index.file_name(order[k + 1])} = {index.file_name(order[k])}" for k in same
             if index.file_name(order[k + 1]) != index.file_name(order[k]))  # fmt: skip
    findings.each(NOTE, split, "files with the same bytes as another", twice, "they count double; remove one of each")
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
        findings.each(NOTE, "val", "images that are in the training set too", names, do)


def _on_processes(index: CocoIndex, workers: int, skip: np.ndarray | None) -> Iterator[tuple]:
    """`_look` at every chunk of images, in order, with few chunks under way."""
    waiting: deque[Future] = deque()
    # Forked: nothing is imported again. No thread holds a lock here, and the children decode, which starts none.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _begin, (index, skip))
    try:
        for block in _blocks(len(index), _CHUNK):
            waiting.append(pool.submit(_look_from_pool, block.start, block.stop))
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


_index: CocoIndex | None = None  # of a process of the pool
_skip: np.ndarray | None = None


def _begin(index: CocoIndex, skip: np.ndarray | None) -> None:
    global _index, _skip
    _index, _skip = index, skip
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the work
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _look_from_pool(first: int, last: int) -> tuple:
    return _look(_index, first, last)


def _look(index: CocoIndex, first: int, last: int) -> tuple[int, list[tuple[str, str, str]], np.ndarray, int]:
    """The findings (kind, file, detail) of images first..last-1, the hashes of their bytes, and how many those are."""
    rows: list[tuple[str, str, str]] = []
    digests, size = np.zeros(last - first, np.uint64), 0
    with tempfile.TemporaryFile() as said:
        # The JPEG library writes its warnings to the process's stderr and tells nobody else.
        before = os.dup(2)
        os.dup2(said.fileno(), 2)
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
                rows += ((kind, name, detail) for kind, detail in _look_at(index, i, data))
                if length := os.lseek(2, 0, os.SEEK_CUR):
                    text = os.pread(2, length, 0).decode(errors="replace").strip()
                    os.ftruncate(2, 0)
                    os.lseek(2, 0, os.SEEK_SET)
                    if not any(row[1] == name and FULL_KINDS[row[0]][0] == PROBLEM for row in rows):
                        rows.append(("images that decode with a warning", name, text.splitlines()[-1] if text else ""))
        finally:
            os.dup2(before, 2)
            os.close(before)
    return first, rows, digests, size


def _look_at(index: CocoIndex, i: int, data: np.ndarray) -> Iterator[tuple[str, str]]:
    """(kind, detail) of all that is to be said about one image's bytes."""
    about = {"path": Path(index.file_name(i)), "image_id": int(index.image_ids[i])}
    height, width = int(index.heights[i]), int(index.widths[i])
    try:
        found = transforms.decode(data, **about).shape[1:]
    except UserError as error:
        yield _damage(str(error).partition(" does not decode ")[2].rpartition("; replace")[0].strip("()") or str(error))
        return
    if tuple(found) != (height, width):
        exchanged = ", sides exchanged" if tuple(found) == (width, height) else ""
        yield ("images of another size than the annotation file says",
               f"{found[1]}x{found[0]}, listed {width}x{height}{exchanged}")  # fmt: skip
    yield from _header(data, about["path"].suffix.lower())


def _header(data: np.ndarray, suffix: str) -> Iterator[tuple[str, str]]:
    """What Pillow sees in the header of an image that decodes."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
            orientation, mode, kind = _orientation(image), image.mode, image.format
    except Exception as error:  # its readers raise whatever a file makes them stumble over
        yield "images that decode with a warning", f"Pillow cannot read the header: {error}"
        return
    if orientation in range(2, 9):
        yield "images with an EXIF orientation", str(orientation)
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
    """The EXIF tag as it stands, None without one; as openimages_to_coco.py: without XMP's, which Pillow takes."""
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
