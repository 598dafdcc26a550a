"""A COCO annotation file as arrays: read once, kept in a cache beside it, memory-mapped by every later start.

Treatments, each with its count in `CocoIndex.counts`:

* image listed twice with the same name and size: the first stays ("duplicate images"); with another name or size:
  error. Two images with one file name: both stay ("duplicate file names").
* category listed twice with the same name: the first stays ("duplicate categories"); with another name: error. Two
  categories with one name: both stay ("categories that share a name").
* file name that is there in another spelling (`detcore.data.image_names`): that file ("names of another spelling").
* annotation id used twice: both stay, for ids of annotations are used for nothing ("duplicate annotation ids").
* annotation of an image or category that is not listed, box or area that is not a finite number: error.
* box without area (zero, negative or wholly outside the image): left out of training ("boxes dropped").
* box that reaches out of the image by more than 0.01 pixel: clipped for training ("boxes clipped").
* box narrower or lower than a pixel: kept ("boxes under one pixel"). Area below 0: kept; evaluation ignores such truth
  as COCO's does ("areas below 0").
* crowd box: kept, with its flag ("crowd boxes"). Area missing or null: width * height. `iscrowd` missing: 0.
* only where masks are asked for (`CocoIndex.open`): a polygon of fewer than three points is left out ("polygons under
  three points left out"). A box without any mask is left out of training, unless it is crowd ("boxes without a mask
  left out"), and scored as a mask without pixels ("annotations scored as empty masks"). One whose polygons all lie
  outside of the image is kept, without pixels ("masks wholly outside of their image"). The first annotations of each
  of these are named. A polygon with an odd number of coordinates, an RLE of another size than its image, or one whose
  counts do not sum to it: error.
* image listed but not in the folder ("missing images"): the folder is read once, when the cache is built, and again
  at each start while images are missing; the loaders refuse to start. All of them missing: error at once.
* image in the folder but not listed: not used ("unlisted files").

Evaluation sees every box as it stands in the file (`CocoIndex.ground_truth`).

The cache is trusted when the annotation file's path, size and modification time, the image folder and the length and
checksums of the cache (`detcore.data.columns`) agree. Anything else is rebuilt. The SHA-256 of the annotation file
stands in it. The image folder may hold shards instead of files (`detcore.data.shards`); then its index counts too.
"""

import contextlib
import copy
import fcntl
import functools
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from detcore import UserError
from detcore.data import columns as columns_file
from detcore.data import exif, image_names, segmentations, shards, signs
from detcore.data.collect import collect, training_boxes, within
from detcore.data.files import read_bytes

_MAGIC = b"detcore index 3\n"
_LARGE = 16 << 20  # bytes of an annotation file from which reading it takes so long that it is announced


class CocoIndex:
    """The images, categories and boxes of one COCO file. Open it with `CocoIndex.open`.

    image_ids: int64 [I], the file's ids in the file's order; heights, widths: int32 [I], pixels.
    category_ids: int64 [K], the file's ids, ascending; the class index 0..K-1 is the position. category_names: K names.
    counts: what was found and how it was treated. missing: int64, positions of images that are not in the folder.
    content_hash: SHA-256 of the annotation file, in hexadecimal. signs: see `detcore.data.signs`; exif: what
    `detcore.data.exif.survey` found. named: ids of the first annotations of a count about masks.
    """

    def __init__(self, cache_file: Path, key: dict, header: dict, columns: dict[str, np.ndarray]) -> None:
        self.annotation_file, self.image_dir = Path(key["annotation_file"]), Path(key["image_dir"])
        self.image_ids, self.heights, self.widths = columns["image_ids"], columns["heights"], columns["widths"]
        self.category_ids, self.category_names = columns["category_ids"], header["category_names"]
        self.counts: dict[str, int] = dict(header["counts"])
        self.content_hash: str = header["content_hash"]
        self.signs: dict[str, int] = header["signs"]
        self.exif: dict[str, int] = header["exif"]
        self.named: dict[str, list[int]] = header["named"]
        self.missing = np.empty(0, np.int64)
        self.shards = shards.open_folder(self.image_dir) if key["shards"] else None
        self._cache_file, self._key, self._columns = cache_file, key, columns
        self._class_of = np.arange(len(self.category_ids))  # the class index of each category of the file
        self._given_ids: tuple[int, ...] | None = None  # of the classes, where `with_classes` gave them
        self._renamed: dict[int, str] = {}  # file names that came to light after the cache was built

    @classmethod
    def open(
        cls,
        annotation_file: str | Path,
        image_dir: str | Path,
        *,
        cache_dir: str | Path | None = None,
        expected_classes: int | None = None,
        masks: str | None = None,
    ) -> "CocoIndex":
        """Open the cache of an annotation file, building it first if it is absent, stale or damaged.

        The cache lies in cache_dir; without one next to the annotation file or, where that cannot be written, in
        $XDG_CACHE_HOME/detcore (~/.cache/detcore). Processes that start together wait for the one that builds.
        expected_classes: refuse category ids other than 0..n-1 or 1..n. masks: `segmentations.EDGES` to train with,
        RLE to score against; each has a cache of its own. None: masks are passed over, and cost nothing. Raises
        UserError for files that are not what they should be, naming the file and the place.
        """
        file, images = Path(annotation_file).absolute(), Path(image_dir).absolute()
        try:
            stat = file.stat()
        except OSError as error:
            raise UserError(f"{file}: cannot read the annotation file ({error.strerror}); check the path.") from error
        if not images.is_dir():
            raise UserError(f"{images}: the image folder of {file.name} is not a directory; check the path.")
        if pack := shards.open_folder(images):
            pack.check()
        key = {
            "annotation_file": str(file),
            "image_dir": str(images),
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "shards": pack.content_hash if pack else None,
        } | ({"masks": masks} if masks else {})
        places = [Path(cache_dir).absolute()] if cache_dir is not None else [file.parent, _user_cache()]
        content = f"{masks}.index" if masks else "index"
        name = f".{file.name}.{hashlib.sha256(f'{file}|{images}'.encode()).hexdigest()[:12]}.{content}"
        index = next(filter(None, (_load(place / name, key) for place in places)), None)
        if index is None:
            index = _build(places, name, key)
        if index.counts["missing images"]:
            index._look_again()
        if expected_classes is not None:
            index._check_classes(expected_classes)
        return index

    def with_classes(self, ids: Sequence[int]) -> "CocoIndex":
        """The same index with given classes: a category's class index is the position of its id in `ids`.

        ids: rising, and among them all of the file's, such as 1 to 90 for COCO, whose 80 categories then keep their
        raw ids and leave ten classes without boxes, named by their number. Raises UserError for a category of the file
        that is not among them.
        """
        given = np.array(ids, np.int64)
        if (np.diff(given) <= 0).any():
            raise ValueError(f"class ids {list(ids)} do not rise")
        own, names = self.category_ids, self.category_names
        unknown = own[~np.isin(own, given)]
        if len(unknown):
            raise UserError(
                f"{self.annotation_file}: category {unknown[0]} is none of the {len(given)} classes of this model, "
                f"{given[0]} to {given[-1]}; train on a data set with these ids, or on a custom one with its own"
            )
        mapped = copy.copy(self)
        mapped._class_of = np.searchsorted(given, own)[self._class_of]
        known = dict(zip(own.tolist(), names, strict=True))
        mapped.category_ids, mapped.category_names = given, [known.get(i, str(i)) for i in given.tolist()]
        mapped._given_ids = tuple(given.tolist())
        return mapped

    def __len__(self) -> int:
        return len(self.image_ids)

    def __reduce__(self) -> tuple:
        return _reopen, (self._cache_file, self._key, self._given_ids, self._renamed)

    @property
    def num_classes(self) -> int:
        return len(self.category_ids)

    def file_name(self, i: int) -> str:
        """The image's file below the folder: as the annotation file has it, or in the spelling that is there."""
        if i in self._renamed:
            return self._renamed[i]
        ends = self._columns["name_ends"]
        return self._columns["names"][ends[i - 1] if i else 0 : ends[i]].tobytes().decode()

    def path(self, i: int) -> Path:
        """The image's file; in shards, where there is none, SHARD/NAME for messages. `read` opens either."""
        name = self.file_name(i)
        return self.shards.place(name) if self.shards else self.image_dir / name

    def read(self, i: int) -> np.ndarray:
        """The bytes of the image's file, uint8 [n]. UserError, naming file (or shard and member) and image."""
        image_id = int(self.image_ids[i])
        if self.shards:
            return self.shards.read(self.file_name(i), image_id)
        return read_bytes(self.image_dir / self.file_name(i), image_id)

    def box_count(self) -> np.ndarray:
        """int64 [I]: the number of annotations of each image as the file lists them, before any treatment."""
        return np.diff(self._columns["starts"])

    def boxes(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The boxes of image i for training, clipped to the image, those without area left out, in the file's order.

        Returns float32 [n, 4] x1, y1, x2, y2 in pixels of the original image; int64 [n] class index; bool [n] crowd.
        """
        return self.boxes_of(np.array([i]))[1:]

    def boxes_of(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The boxes of int64 [n] images, those of the first one first: int64 [m], which of the n has the box, and the
        three of `boxes`."""
        of, rows, boxes = self._training_rows(images)
        return of, boxes, self._class_of[self._columns["ann_class"][rows]], self._columns["iscrowd"][rows] != 0

    def _training_rows(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int [m], which of the images has the box, int [m], which annotation it is, and the boxes."""
        starts = self._columns["starts"]
        counts = starts[images + 1] - starts[images]
        of = np.repeat(np.arange(len(images)), counts)
        rows = self._columns["order"][within(counts) + starts[images][of]]
        boxes, keep, _ = training_boxes(self._columns["bbox"][rows], self.heights[images][of], self.widths[images][of])
        if self.has_edges:
            keep &= (self._columns["iscrowd"][rows] != 0) | (self._columns["edge_counts"][rows] > 0)
        return of[keep], rows[keep], boxes[keep]

    @property
    def has_edges(self) -> bool:
        """Whether the index was opened with the edges of the masks."""
        return self._key.get("masks") == segmentations.EDGES

    def edges(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """The edges of the masks of image i's boxes, as the file has them, box after box and part after part.

        Returns float32 [e, 4] x1, y1, x2, y2 in pixels of the original image, not clipped, and int64 [e, 2]: the
        position of the box in `boxes(i)`, and which of its parts the edge belongs to.
        """
        _, rows, _ = self._training_rows(np.array([i]))
        counts = self._columns["edge_counts"][rows]
        box = np.repeat(np.arange(len(rows)), counts)
        at = within(counts) + (self._edge_ends[rows] - counts)[box]
        part = self._columns["edge_parts"][at].astype(np.int64)
        return self._columns["edges"][at], np.stack([box, part], 1)

    @functools.cached_property
    def _edge_ends(self) -> np.ndarray:
        return np.cumsum(self._columns["edge_counts"])

    def edge_count(self, crowd: str) -> np.ndarray:
        """int64 [I]: the edges of each image's masks. crowd: "keep" or "drop" those of crowds."""
        counts = self._columns["edge_counts"]
        counts = counts if crowd == "keep" else np.where(self._columns["iscrowd"], 0, counts)
        return np.bincount(self._columns["ann_image"], counts, len(self)).astype(np.int64)

    def most_edges(self, crowd: str) -> int:
        """The edges of the image that has the most. crowd: as `edge_count` has it."""
        return int(self.edge_count(crowd).max())

    def annotations(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The annotations of images first..last-1 as the file has them, image after image.

        Returns int [n] position of the image, int [n] class index, float64 [n, 4] x, y, w, h.
        """
        column = self._columns
        rows = column["order"][column["starts"][first] : column["starts"][last]]
        return column["ann_image"][rows], self._class_of[column["ann_class"][rows]], column["bbox"][rows]

    def ground_truth(self):
        """All annotations as they stand in the file: a `detcore.evaluation.coco.GroundTruth`, in the file's order."""
        from detcore.evaluation.coco import GroundTruth

        column = self._columns
        return GroundTruth(
            image_ids=self.image_ids,
            category_ids=self.category_ids,
            ann_image_id=self.image_ids[column["ann_image"]],
            ann_category_id=self.category_ids[self._class_of[column["ann_class"]]],
            bbox=column["bbox"],
            area=column["area"],
            iscrowd=column["iscrowd"],
        )

    def masks(self):
        """The masks of all annotations, in the file's order, as a `detcore.evaluation.rle.Rles`; empty ones where there
        are none. None if the index was not opened with masks to score against."""
        from detcore.evaluation.rle import Rles

        if self._key.get("masks") != segmentations.RLE:
            return None
        at = self._columns["ann_image"]
        sizes = np.stack([self.heights[at], self.widths[at]], 1).astype(np.int64)
        return Rles.read(self._columns["rle_text"], self._columns["rle_counts"], sizes)

    def summary(self, crowd: str = "keep") -> str:
        """A few lines for the start-up log: what the file holds and how it was treated.

        crowd: what becomes of crowd boxes in training, as `Layout` has it.
        """
        main = ("images", "annotations", "categories")
        rest = [f"{name} {count:,}" for name, count in self.counts.items() if count and name not in main]
        if crowd == "drop" and self.signs["crowd left out"]:
            rest.append(f"left out as crowd {self.signs['crowd left out']:,}")
        lines = [
            f"{self.annotation_file.name}: " + ", ".join(f"{self.counts[name]:,} {name}" for name in main),
            f"  sha256 {self.content_hash[:16]}, category ids {self.category_ids[0]} to {self.category_ids[-1]}",
        ]
        lines += [f"  {', '.join(rest)}"] * bool(rest) + [f"  {line}" for line in exif.words(self.exif, len(self))]
        for name, ids in self.named.items():
            dots = ", ..." if self.counts[name] > len(ids) else ""
            found = f"annotation{'s' * (len(ids) > 1)} {', '.join(map(str, ids))}{dots}"
            lines.append(f"  Warning: {self.annotation_file}: {name} {self.counts[name]:,}: {found}")
        return "\n".join(lines + [f"  Warning: {words}." for words in signs.suspicions(self.signs)])

    def check_images(self) -> None:
        """Raise UserError if images are missing, naming the first three."""
        if len(self.missing):
            names = ", ".join(self.file_name(i) for i in self.missing[:3])
            raise UserError(
                f"{self.image_dir}: {len(self.missing):,} of the {len(self):,} images that {self.annotation_file.name} "
                f"lists are not there ({names}...); fetch them, or remove them from the annotation file."
                f"{self._meant(self.file_name(self.missing[0]))}"
            )

    def check_inside(self) -> None:
        """Raise UserError for a name that leads out of the image folder: a tar program would write it there."""
        for i in range(len(self)):
            if image_names.leaves_folder(name := self.file_name(i)):
                raise UserError(
                    f"{self.annotation_file}: image {self.image_ids[i]} is {name!r}, which leads out of "
                    f"{self.image_dir}; a shard must not hold such a name, so put the images below one folder."
                )

    def _look_again(self) -> None:
        names = [self.file_name(i) for i in range(len(self))]
        found = image_names.scan(names, self.image_dir, self.shards)
        self.missing, self._renamed = found.missing, found.renamed
        self.counts |= {"missing images": len(found.missing), "unlisted files": found.unlisted}
        self.counts["names of another spelling"] += len(found.renamed)
        if len(self.missing) == len(self):
            raise UserError(
                f"{self.image_dir}: holds none of the {len(self):,} images that {self.annotation_file.name} lists, "
                f"such as {names[0]}; is it the right folder?{self._meant(names[0])}"
            )

    def _meant(self, name: str) -> str:
        near = None if self.shards else image_names.closest(name, self.image_dir)
        return f" There is {near}: if that is meant by {name}, write so in the annotation file." if near else ""

    def _check_classes(self, expected: int) -> None:
        ids = self.category_ids
        if any(np.array_equal(ids, np.arange(first, first + expected)) for first in (0, 1)):
            return
        raise UserError(
            f"{self.annotation_file}: {len(ids)} categories with ids {ids[0]} to {ids[-1]}, but this benchmark wants "
            f"exactly {expected}, numbered 0 to {expected - 1} or 1 to {expected}; convert the data set again, or "
            "choose the data set layout that fits it."
        )


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "detcore"


def _reopen(cache_file: Path, key: dict, class_ids: Sequence[int] | None, renamed: dict[int, str]) -> CocoIndex:
    index = _load(cache_file, key)
    if index is None:
        raise UserError(f"{cache_file}: the cache of the annotation file changed while it was in use; start again.")
    index._renamed = renamed
    return index.with_classes(class_ids) if class_ids else index


def _build(places: list[Path], name: str, key: dict) -> CocoIndex:
    """Build the cache in the first place that takes it."""
    refusals = []
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            if not os.access(place, os.W_OK):
                raise PermissionError(f"{place}: not writable")
            with _only_one_builder(place):
                index = _load(place / name, key)
                if index is None:
                    if key["size"] >= _LARGE:
                        words = (
                            f"{key['annotation_file']} ({key['size'] / 1e6:,.0f} MB) is read, once; {place} keeps it"
                        )
                        print(words, file=sys.stderr, flush=True)
                    columns_file.save(place / name, _MAGIC, *collect(key))
                    index = _load(place / name, key)
        except OSError as error:
            refusals.append(str(error))
            continue
        if index is None:
            raise UserError(f"{place / name}: the cache cannot be read back after writing; check the disk.")
        return index
    raise UserError(f"no place for the cache of {key['annotation_file']}: {'; '.join(refusals)}. Set XDG_CACHE_HOME.")


@contextlib.contextmanager
def _only_one_builder(directory: Path) -> Iterator[None]:
    """Hold the directory's lock, so that ranks starting together parse a large file once.

    Where the file system has no locks each builds its own and the last rename wins, which is harmless.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _load(path: Path, key: dict) -> CocoIndex | None:
    """The cache at path, or None if there is none for this key or it is damaged."""
    found = columns_file.load(path, _MAGIC, lambda header: header["key"] == key)
    return CocoIndex(path, key, *found) if found else None
