"""The stages of turning OpenImages into COCO: tables to records, records and JPEG headers to buckets, buckets to JSON.

Each function of a stage takes the Job and the number of one part, leaves a piece in the work folder and does nothing if
that is there already, so an interrupted conversion continues. Only `encode_*` leave nothing: they are quick.
"""

import errno
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from dataprep import openimages_pieces as pieces
from dataprep import openimages_tables as tables
from dataprep.openimages_pieces import Tally
from dataprep.openimages_tables import BOX, FILE, FLAGS, Classes, Source
from detcore import UserError
from detcore.data.jpeg_header import BadHeader, read_header

_VERSION = 1  # of the pieces; others are not continued
_CHUNK = 16 << 20  # bytes of the box table that become one piece
_BUCKET = 2 << 20  # bytes of the box table whose boxes are matched at a time
_OBJECTS = 20_000  # JSON objects that exist at a time
_NOT_THERE = (errno.EACCES, errno.EISDIR, errno.ELOOP, errno.ENOENT, errno.EPERM)
_IMAGE = [("id", "<u8"), ("name", "S21"), ("width", "<u4"), ("height", "<u4"), ("boxes", "<u4")]
_PLACED = np.dtype([("cls", "<u2"), ("flags", "u1"), *((name, "<f8") for name in "xywh")])

NO_FILE = "images with boxes but without a file: left out"
NO_ROW = "files without a box of a listed class: left out"
TWO_FILES = "files of an id that another file has too: the first by name is used"
UNREADABLE = "files that can't be opened: left out"
SAME_ROW = "rows that stand there twice: both are kept"


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str
    height: int
    width: int
    license: int | None
    coco_url: str | None


class _Annotation(msgspec.Struct, gc=False):
    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float
    IsOccluded: bool
    IsTruncated: bool
    IsGroupOf: bool
    IsDepiction: bool
    IsInside: bool
    iscrowd: int


@dataclass(frozen=True)
class Job:
    """One conversion: what is read, into which folder the pieces go, and how the work is cut. Cut only by the inputs,
    never by the number of processes."""

    source: Source
    classes: Classes
    work: Path
    base: int  # the first category id
    columns: list[str]
    begin: int  # of the rows, in the box table
    end: int
    bits: int  # 2**bits buckets

    @classmethod
    def of(cls, source: Source, classes: Classes, work: Path, base: int) -> "Job":
        columns, begin = tables.read_header(source.boxes)
        end = source.boxes.stat().st_size
        return cls(source, classes, work, base, columns, begin, end, min(max((end // _BUCKET).bit_length() - 1, 0), 12))

    def fingerprint(self) -> dict[str, Any]:
        """What the pieces depend on. An image that is written anew in place is not noticed, one that is replaced is."""
        found: dict[str, Any] = {"version": _VERSION, "classes": self.classes.mids, "labels": self.classes.labels}
        found = {"the program or the classes": hashlib.sha256(json.dumps(found).encode()).hexdigest()}
        for what, path in (
            ("boxes", self.source.boxes),
            ("image list", self.source.image_list),
            ("images", self.source.images),
        ):
            about = path.stat() if path else None
            found[f"the {what}"] = about and [str(path.absolute()), about.st_size, about.st_mtime_ns]
        return found

    def chunks(self) -> list[Path]:
        """The pieces of the box table."""
        return [self.work / f"boxes-{i:05}" for i in range(-(-(self.end - self.begin) // _CHUNK))]

    def others(self, kind: str) -> list[Path]:
        """The pieces of the "files" or of the "list", once that is finished."""
        return [self.work / f"{kind}-{i:05}" for i in range(pieces.meta(self.work / kind)["pieces"])]

    def buckets(self) -> list[Path]:
        return [self.work / f"bucket-{i:04}" for i in range(1 << self.bits)]


def table_tasks(job: Job) -> list[tuple[str, int]]:
    """Arguments of read_table."""
    return [("files", 0), ("list", 0), *(("boxes", i) for i in range(len(job.chunks())))]


def read_table(job: Job, kind: str, part: int) -> int:
    """Records of one part of the box table, of the image list or of the folder; returns the bytes of boxes read."""
    if kind == "boxes":
        path, begin = job.chunks()[part], job.begin + part * _CHUNK
        end = min(begin + _CHUNK, job.end)
        if pieces.check(path) is None:
            boxes, tally = tables.read_boxes(job.source.boxes, job.columns, begin, end, job.classes.labels)
            tables.write_records(path, {"tally": tally}, boxes, job.bits)
        return end - begin
    done = job.work / kind
    if pieces.check(done) is None or None in map(pieces.check, job.others(kind)):
        count, tally = 0, Tally()
        if kind == "files":
            count, tally = tables.list_images(job.source.images, lambda i: job.work / f"{kind}-{i:05}", job.bits)
        elif job.source.image_list:
            count = tables.read_image_list(job.source.image_list, lambda i: job.work / f"{kind}-{i:05}", job.bits)
        pieces.write(done, {"pieces": count, "tally": tally})
    return 0


def files_found(job: Job) -> int:
    """How many image files the folder holds."""
    return sum(int(pieces.starts(path)[-1]) for path in job.others("files"))


def match(job: Job, bucket: int) -> int:
    """Join the boxes, files and list entries of one bucket and read the headers; returns how many files there were."""
    files = _joined(tables.read_bucket(job.others("files"), bucket), FILE)
    path = job.buckets()[bucket]
    if pieces.check(path) is not None:
        return len(files)
    tally = Tally()
    files = files[np.lexsort((files["name"], files["id"]))]
    again = np.r_[False, files["id"][1:] == files["id"][:-1]] if len(files) else np.empty(0, bool)
    tally.add(TWO_FILES, again.sum(), _names(files[again]))
    files = files[~again]
    boxes = _joined(tables.read_bucket(job.chunks(), bucket), BOX)
    boxes = boxes[np.argsort(boxes["id"], kind="stable")]
    _count_same(boxes, tally)
    ids, counts = np.unique(boxes["id"], return_counts=True)
    at = np.searchsorted(files["id"], ids)
    there = files["id"][at.clip(max=len(files) - 1)] == ids if len(files) else np.zeros(len(ids), bool)
    tally.add(NO_FILE, (~there).sum(), (f"{i:016x}" for i in ids[~there][: Tally.EXAMPLES].tolist()))
    unused = ~np.isin(files["id"], ids[there], assume_unique=True)
    tally.add(NO_ROW, unused.sum(), _names(files[unused]))
    sizes, orientations, image_bytes = _headers(job.source.images, files["name"][at[there]].tolist(), tally)
    good = there.copy()
    good[there] = sizes[:, 0] > 0
    sizes = sizes[sizes[:, 0] > 0]

    images = _described(ids[good], _joined(tables.read_bucket(job.others("list"), bucket), None))
    images["name"], images["boxes"] = files["name"][at[good]], counts[good]
    images["width"], images["height"] = sizes[:, 0], sizes[:, 1]
    placed = _placed(boxes[np.repeat(good, counts)], images)
    meta = {
        "tally": tally, "images": len(images), "boxes": len(placed), "bytes": image_bytes, "orientations": orientations,
        "licenses": sorted({text.decode(errors="replace") for text in np.unique(images["license"]).tolist()}),
        "classes": np.bincount(placed["cls"], minlength=len(job.classes.mids)).tolist(),
    }  # fmt: skip
    pieces.write(path, meta, images=images, boxes=placed)
    return len(files)


def _joined(parts: list[np.ndarray], dtype: np.dtype | None) -> np.ndarray | None:
    return np.concatenate(parts) if parts else None if dtype is None else np.empty(0, dtype)


def _names(files: np.ndarray) -> list[str]:
    return [name.decode() for name in files["name"][: Tally.EXAMPLES].tolist()]


def _count_same(boxes: np.ndarray, tally: Tally) -> None:
    """Rows that agree in every field, found by a 64-bit hash of the fields."""
    mixed = np.zeros(len(boxes), np.uint64)
    for name in BOX.names:
        column = boxes[name]
        bits = column.copy().view(np.uint64) if column.dtype.itemsize == 8 else column.astype(np.uint64)
        mixed = (mixed ^ bits) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    order = np.argsort(mixed, kind="stable")
    same = order[1:][mixed[order][1:] == mixed[order][:-1]]
    tally.add(SAME_ROW, len(same), (f"{i:016x}" for i in np.sort(boxes["id"][same])[: Tally.EXAMPLES].tolist()))


def _headers(folder: Path, names: list[bytes], tally: Tally) -> tuple[np.ndarray, dict[str, int], int]:
    """Width and height int32 [N, 2] (0: not usable), how often each EXIF orientation occurs, and the files' bytes."""
    sizes = np.zeros((len(names), 2), np.int64)
    orientations: dict[str, int] = {}
    total, root = 0, str(folder)
    for i, raw in enumerate(names):
        name = raw.decode()
        try:
            header = read_header(f"{root}/{name}")
        except BadHeader as error:
            tally.add(f"{error}: left out", 1, [name])
            continue
        except OSError as error:
            # Others (a server that does not answer) would lose images that are there.
            if error.errno not in _NOT_THERE:
                raise UserError(
                    f"{folder / name} can't be read: {error.strerror}. What was finished is kept: when the file system "
                    "is well again, give the same command"
                ) from error
            tally.add(UNREADABLE, 1, [f"{name} ({error.strerror})"])
            continue
        sizes[i] = header.width, header.height
        total += header.size
        if header.orientation:
            key = str(header.orientation)
            orientations[key] = orientations.get(key, 0) + 1
    return sizes, orientations, total


def _described(ids: np.ndarray, listed: np.ndarray | None) -> np.ndarray:
    """Image records for these ascending ids, with licence and URL where the image list has them."""
    if listed is None:
        images = np.zeros(len(ids), [*_IMAGE, ("license", "S1"), ("url", "S1")])
    else:
        images = np.zeros(len(ids), [*_IMAGE, ("license", listed.dtype["license"]), ("url", listed.dtype["url"])])
        listed = listed[np.argsort(listed["id"], kind="stable")]
        at = np.searchsorted(listed["id"], ids).clip(max=len(listed) - 1)
        there = listed["id"][at] == ids
        for name in ("license", "url"):
            images[name][there] = listed[name][at[there]]
    images["id"] = ids
    return images


def _placed(boxes: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Boxes in pixels, by the same operations in the same order as the original conversion."""
    width, height = (np.repeat(images[name].astype(np.float64), images["boxes"]) for name in ("width", "height"))
    placed = np.empty(len(boxes), _PLACED)
    placed["cls"], placed["flags"] = boxes["cls"], boxes["flags"]
    placed["x"], placed["y"] = boxes["xmin"] * width, boxes["ymin"] * height
    placed["w"], placed["h"] = (boxes["xmax"] - boxes["xmin"]) * width, (boxes["ymax"] - boxes["ymin"]) * height
    return placed


class Outcome(NamedTuple):
    """What all pieces together hold. first: the first image and annotation id of each bucket; licenses: id by text."""

    images: int
    boxes: int
    bytes: int
    orientations: dict[str, int]
    class_counts: list[int]
    licenses: dict[str, int]
    tally: Tally
    first: list[tuple[int, int]]


def outcome(job: Job) -> Outcome:
    """Add up the finished pieces, in order."""
    tally = Tally()
    for path in (*job.chunks(), job.work / "files"):
        tally.merge(pieces.meta(path)["tally"])
    images = boxes = size = 0
    orientations: dict[str, int] = {}
    classes = np.zeros(len(job.classes.mids), np.int64)
    licenses: set[str] = set()
    first = []
    for path in job.buckets():
        meta = pieces.meta(path)
        first.append((images + 1, boxes + 1))
        images, boxes, size = images + meta["images"], boxes + meta["boxes"], size + meta["bytes"]
        for value, count in meta["orientations"].items():
            orientations[value] = orientations.get(value, 0) + count
        classes += np.array(meta["classes"], np.int64)
        licenses |= set(meta["licenses"])
        tally.merge(meta["tally"])
    by_text = {text: i for i, text in enumerate(sorted(licenses - {""}), 1)}
    return Outcome(images, boxes, size, dict(sorted(orientations.items())), classes.tolist(), by_text, tally, first)


def encode_head(job: Job, found: Outcome) -> bytes:
    """The file up to the first image."""
    head = {
        "info": {"description": "OpenImages in COCO format", "url": "https://storage.googleapis.com/openimages/web"},
        "licenses": [{"id": i, "name": text, "url": text} for text, i in found.licenses.items()],
        "categories": [
            {"id": i, "name": name, "supercategory": None, "mid": mid}
            for i, (name, mid) in enumerate(zip(job.classes.names, job.classes.mids), job.base)
        ],
    }
    return msgspec.json.encode(head)[:-1] + b',"images":['


def encode_images(job: Job, bucket: int, first: int, licenses: dict[str, int]) -> bytes:
    """The images of one bucket as JSON objects with commas between; `first` is the first one's id."""
    found = pieces.read(job.buckets()[bucket], "images")
    return _encoded(
        _Image, len(found), lambda at: (
            range(first + at.start, first + at.stop),
            map(bytes.decode, found["name"][at].tolist()),
            found["height"][at].tolist(),
            found["width"][at].tolist(),
            (licenses.get(text.decode(errors="replace")) for text in found["license"][at].tolist()),
            (text.decode(errors="replace") or None for text in found["url"][at].tolist()),
        ),
    )  # fmt: skip


def encode_annotations(job: Job, bucket: int, first_image: int, first: int) -> bytes:
    """The annotations of one bucket as JSON objects with commas between; ids from `first` on."""
    path = job.buckets()[bucket]
    boxes, counts = pieces.read(path, "boxes"), pieces.read(path, "images")["boxes"]
    of_image = np.repeat(np.arange(first_image, first_image + len(counts)), counts)
    area = boxes["w"] * boxes["h"]
    cls = boxes["cls"].astype(np.int64) + job.base
    flags = [(boxes["flags"] >> bit & 1).astype(bool) for bit in range(len(FLAGS))]
    crowd = flags[FLAGS.index("IsGroupOf")].astype(np.int8)
    return _encoded(
        _Annotation, len(boxes), lambda at: (
            range(first + at.start, first + at.stop),
            of_image[at].tolist(),
            cls[at].tolist(),
            zip(*(boxes[name][at].tolist() for name in "xywh")),
            area[at].tolist(),
            *(flag[at].tolist() for flag in flags),
            crowd[at].tolist(),
        ),
    )  # fmt: skip


def _encoded(kind: type, count: int, columns: Callable[[slice], tuple]) -> bytes:
    parts = []
    for begin in range(0, count, _OBJECTS):
        parts.append(msgspec.json.encode(list(map(kind, *columns(slice(begin, min(begin + _OBJECTS, count))))))[1:-1])
    return b",".join(parts)
