"""One segment of the Waymo Open Dataset: its JPEG files written as they are, its entries kept as one piece."""

import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from dataprep import openimages_pieces as pieces
from dataprep import waymo_parquet, waymo_records
from dataprep.openimages_pieces import Tally, disk_errors
from dataprep.waymo_records import CAMERAS, Fault, Label, Picture
from detcore import UserError
from detcore.data.jpeg_header import BadHeader, read_header

CATEGORIES = {1: "vehicle", 2: "pedestrian", 3: "cyclist"}
ROUNDING = 0.01  # pixels that a box may reach out of its image, as detcore.data.coco allows
_OF_KIND = {1: 1, 2: 2, 4: 3}  # the data set's label types; 0 is unknown and 3 a sign, which 2D labels do not have


class Source(NamedTuple):
    """What one piece is made from. key: its name; number: its place among all sources, from 0."""

    key: str
    number: int
    files: dict[str, Path]  # "records" alone for v1, the components that are there for v2

    @property
    def records(self) -> Path | None:
        """The TFRecord file, of v1."""
        return self.files.get("records")

    def size(self) -> int:
        """Bytes, for the progress."""
        return sum(path.stat().st_size for path in self.files.values())


class Job(NamedTuple):
    """What every segment is converted with."""

    out: Path
    cameras: tuple[int, ...]
    stride: int
    legacy: bool
    labelled_only: bool

    @property
    def images(self) -> Path:
        return self.out / "images"

    @property
    def work(self) -> Path:
        return self.out / ".waymo_to_coco"

    def piece(self, key: str) -> Path:
        return self.work / f"{key}.piece"

    def fingerprint(self, source: Source) -> dict[str, Any]:
        """What a piece depends on, apart from the options."""
        try:
            about = {name: path.stat() for name, path in source.files.items()}
        except FileNotFoundError as error:
            raise UserError(f"{error.filename} was there and is gone; give the command again") from error
        files = {name: [found.st_size, found.st_mtime_ns] for name, found in about.items()}
        return {"files": files, "number": source.number if self.legacy else None}


def convert(job: Job, source: Source) -> int:
    """Write the images and the piece of one segment; returns the bytes of the source.

    The piece's meta: source (its fingerprint), contexts, images and boxes (how many; boxes by category), faults, tally.
    Its arrays: see `entries`. Raises UserError if the disk is full.
    """
    piece = job.piece(source.key)
    _forget(job, piece)
    before, size = job.fingerprint(source), source.size()
    if source.records:
        found = waymo_records.pictures(source.records, job.stride)
    else:
        found = waymo_parquet.pictures(source.files, job.stride)
    tally, faults, rows, boxes = Tally(), [], [], Counter()
    for item in _once(found):
        if isinstance(item, Fault):
            faults.append(item)
        elif item.camera in job.cameras and (row := _picture(job, source, item, tally)):
            if isinstance(row, Fault):
                faults.append(row)
            else:  # kept as JSON, which takes a fifth of the memory
                boxes.update(box["category_id"] for box in row[2])
                rows.append((row[0], *(msgspec.Raw(msgspec.json.encode(part)) for part in row[1:])))
    rows.sort(key=lambda row: row[0])
    meta = {
        "source": before, "contexts": sorted({row[0][0] for row in rows}), "images": len(rows),
        "boxes": [boxes[category] for category in CATEGORIES], "faults": faults, "tally": tally,
    }  # fmt: skip
    lists = {"images": [row[1] for row in rows], "boxes": [row[2] for row in rows]}
    texts = {name: np.frombuffer(msgspec.json.encode(found), np.uint8) for name, found in lists.items()}
    pieces.write(piece, meta, **texts)
    return size


def entries(piece: Path, name: str) -> Iterator[Any]:
    """COCO entries of a piece, without the ids that its place gives: "images", or "boxes": a list for each image."""
    for text in msgspec.json.decode(pieces.read(piece, name).data, type=list[msgspec.Raw]):
        yield msgspec.json.decode(text)


def _forget(job: Job, piece: Path) -> None:
    """Removes what an earlier state of the source became."""
    if piece.exists():
        for image in entries(piece, "images") if pieces.check(piece) else ():
            (job.images / image["file_name"]).unlink(missing_ok=True)
        piece.unlink()


def _once(found: Iterator[Picture | Fault]) -> Iterator[Picture | Fault]:
    """Without images whose segment, time and camera were there before."""
    seen = set()
    for item in found:
        if isinstance(item, Picture):
            key = (item.context, item.timestamp, item.camera)
            if key in seen:
                what = "images that are there twice"
                item = Fault(what, _place(item), "the second one is left out")
            seen.add(key)
        yield item


def _place(picture: Picture) -> str:
    return f"frame {picture.frame}, time {picture.timestamp}, {CAMERAS[picture.camera - 1]}"


def _picture(
    job: Job, source: Source, picture: Picture, tally: Tally
) -> tuple[tuple, dict[str, Any], list[dict[str, Any]]] | Fault | None:
    """Sort key, image entry and box entries of one image, whose file is written; None for one that nobody wants."""
    place = f"{picture.context}/{picture.timestamp}_{CAMERAS[picture.camera - 1]}"
    if picture.labels is None:
        tally.add(f"images without labels{', left out' if job.labelled_only else ''}", 1, [place])
        if job.labelled_only:
            return None
    entry: dict[str, Any] = {"file_name": f"{place}.jpg"}
    key: tuple = (picture.context, picture.timestamp, picture.camera)
    if job.legacy:
        numbers = (source.number, picture.frame + 1, picture.position)
        entry = {"id": numbers[0] * 10_000_000 + numbers[1] * 100 + numbers[2]}
        entry["file_name"] = "_".join(map(str, numbers)) + ".jpg"
        key = (picture.context, *numbers)
    size = _write(job.images / entry["file_name"], picture)
    if isinstance(size, Fault):
        return size
    entry |= dict(zip(("width", "height"), size), license=1)
    entry |= {"segment": picture.context, "timestamp_micros": picture.timestamp}
    entry["camera"] = CAMERAS[picture.camera - 1]
    boxes = [box for label in picture.labels or () if (box := _box(label, size, job.legacy, place, tally))]
    boxes.sort(key=lambda box: (box["track_id"], box["bbox"]))
    tally.add("images without a box", not boxes)
    return key, entry, boxes


def _write(path: Path, picture: Picture) -> tuple[int, int] | Fault:
    """Write the JPEG file; returns its width and height. Nothing stays of one that is not whole."""
    if not picture.jpeg.rstrip(b"\0").endswith(b"\xff\xd9"):
        whole = picture.jpeg.startswith(b"\xff\xd8")
        detail = "its end is missing" if whole else f"{len(picture.jpeg):,} bytes that are no JPEG"
        return Fault("damaged images", _place(picture), detail)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with disk_errors(part):
        part.write_bytes(picture.jpeg)
        try:
            header = read_header(part)
        except BadHeader as error:
            part.unlink()
            return Fault("damaged images", _place(picture), str(error))
        size = (header.width, header.height)
        if picture.size and tuple(picture.size) != size and all(picture.size):
            part.unlink()
            told = "x".join(map(str, picture.size))
            return Fault("images of another size than calibrated", _place(picture), f"{size[0]}x{size[1]}, not {told}")
        os.replace(part, path)
    return size


def _box(label: Label, size: tuple[int, int], legacy: bool, place: str, tally: Tally) -> dict[str, Any] | None:
    """One annotation without ids, or None for a label that is not listed."""
    if label.kind not in _OF_KIND:
        tally.add(f"labels of type {label.kind}{' (sign)' if label.kind == 3 else ''}, left out", 1, [place])
        return None
    if not all(map(math.isfinite, label[1:5])) or label.length <= 0 or label.width <= 0:
        tally.add("boxes without a size or place in pixels, left out", 1, [place])
        return None
    x, y, w, h = label.center_x - label.length / 2, label.center_y - label.width / 2, label.length, label.width
    inside = min(x, y) >= -ROUNDING and x + w <= size[0] + ROUNDING and y + h <= size[1] + ROUNDING
    if not inside and not legacy:
        right, bottom = min(x + w, size[0]), min(y + h, size[1])
        x, y = max(x, 0.0), max(y, 0.0)
        w, h = right - x, bottom - y
        if w < 1 or h < 1:
            tally.add("boxes outside of their image, left out", 1, [place])
            return None
        tally.add("boxes clipped to their image", 1, [place])
    elif not inside:
        tally.add("boxes that reach out of their image, kept", 1, [place])
    level = 2 if label.level == 2 else 1  # set by hand where it is 2; not set means 1
    tally.add("boxes of LEVEL_2", level == 2)
    return {
        "category_id": _OF_KIND[label.kind], "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0,
        "difficulty": level, "track_id": label.track,
    }  # fmt: skip
