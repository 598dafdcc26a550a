"""Reading a COCO annotation file of any size into arrays, a few megabytes of objects at a time.

The file is memory-mapped and checked as JSON once; its three lists are then decoded in pieces, cut between two
objects. A place that looks like such a cut but lies inside a string or a nested list leaves a piece that is not a
JSON list, so a piece that decodes was cut in the right place and the next candidate is tried otherwise.
"""

import gc
import hashlib
import itertools
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta, Struct

from detcore import UserError
from detcore.data import segmentations
from detcore.foreign import kind_of

_PIECE = 8 << 20
_NAMED = 5  # annotations of a treatment whose ids are kept
_CUT = re.compile(rb"\}\s*(,)\s*\{")

_RECODE = "if it was saved on Windows or in an old program: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
_BOM = b"\xef\xbb\xbf"

# Ids travel as float64 in COCO result rows, and -1 marks padding, so only these are usable.
_Id = Annotated[int, Meta(ge=0, le=2**53)]
_Side = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class _File(Struct):
    images: msgspec.Raw
    annotations: msgspec.Raw
    categories: msgspec.Raw


class _Image(Struct, gc=False):
    id: _Id
    file_name: Annotated[str, Meta(min_length=1)]
    height: _Side
    width: _Side


class _Annotation(Struct, gc=False):
    id: _Id
    image_id: _Id
    category_id: _Id
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: Annotated[int, Meta(ge=0, le=1)] | bool = 0


class _Category(Struct, gc=False):
    id: _Id
    name: str


class Parsed(NamedTuple):
    """The contents of a file, I images, K categories, B annotations.

    columns: image_ids int64 [I], heights and widths int32 [I], category_ids int64 [K] ascending, ann_image int32 [B]
    (position of the image), ann_class int32 [B] (position of the category), bbox float64 [B, 4] x, y, w, h in pixels,
    area float64 [B], iscrowd uint8 [B]; with masks those of `segmentations.masks`. named: by a treatment of masks that
    has a count, the ids of the first annotations that got it.
    """

    columns: dict[str, np.ndarray]
    file_names: list[str]
    category_names: list[str]
    counts: dict[str, int]
    content_hash: str
    named: dict[str, list[int]]


def parse(file: Path, masks: str | None = None) -> Parsed:
    """Read and check one annotation file. Raises UserError naming the file and the place; OSError if unreadable.

    masks: one of `segmentations.KINDS`; None: they are passed over.
    """
    with open(file, "rb") as handle:
        if not handle.seek(0, 2):
            raise UserError(f"{file}: the annotation file is empty; download or write it again.")
        handle.seek(0)
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    # The collector would walk millions of live tuples again and again; nothing here makes cycles.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _parse(file, data, digest, masks)
    finally:
        if collecting:
            gc.enable()


def _parse(file: Path, data: mmap.mmap, digest: str, masks: str | None) -> Parsed:
    start = len(_BOM) if data[: len(_BOM)] == _BOM else 0
    try:
        lists = msgspec.json.decode(memoryview(data)[start:], type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file}: {_other_kind(data) or _explain(error, data)}") from error
    images = list(itertools.chain.from_iterable(_objects(file, "images", lists.images, _Image)))
    image_columns, file_names, image_counts = _images(file, images)
    del images
    category_ids, category_names, category_counts = _categories(file, lists.categories)
    annotations, annotation_counts, named = _annotations(file, lists.annotations, image_columns, category_ids, masks)
    counts = {
        "images": len(file_names),
        "annotations": len(annotations["bbox"]),
        "categories": len(category_ids),
        **image_counts,
        **category_counts,
        **annotation_counts,
    }
    columns = {**image_columns, "category_ids": category_ids, **annotations}
    return Parsed(columns, file_names, category_names, counts, digest, named)


def _other_kind(data: mmap.mmap) -> str | None:
    """What the file is instead of JSON in UTF-8, and what to do; None if that cannot be told from its beginning."""
    head = data[:512]
    for mark, code in ((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"),
                       (b"\xfe\xff", "UTF-16")):  # fmt: skip
        if head.startswith(mark):
            return f"this is {code} text, and JSON is UTF-8: iconv -f {code} -t UTF-8 OLD > NEW"
    if head[:4].count(0) in (2, 3):
        return "this is UTF-16 or UTF-32 text, and JSON is UTF-8; save the file as UTF-8."
    if head.startswith(b"PK\3\4"):
        return "this is a zip archive: unzip it first, and name the JSON file inside."
    if told := kind_of(head):
        return f"this is {told}. COCO's format is JSON; other annotations must be converted."
    if re.match(rb"\{\s*'", head.lstrip()):
        return "this is what Python prints of a dictionary, not JSON: write it with json.dump instead of str."
    if re.match(rb"\{[^\n]*\}\s*\n\s*\{", data[: 1 << 16]):
        return "this is one JSON object a line (JSON Lines); a COCO file is one object with three lists."
    return None


def _explain(error: Exception, data: mmap.mmap) -> str:
    text = str(error)
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text ({text}); {_RECODE}"
    if isinstance(error, RecursionError):
        return "nested too deeply for an annotation file; is it the right file?"
    if isinstance(error, msgspec.ValidationError):
        return f"{text}; a COCO file is an object with the lists images, annotations and categories."
    place = re.search(r"byte (\d+)", text)
    if "truncated" in text or (place and int(place[1]) >= len(data)):
        return f"the file ends in the middle, after {len(data):,} bytes; copy or download it again."
    if place is None:
        return f"not a JSON file ({text})."
    at = int(place[1])
    around = bytes(data[max(0, at - 40) : at + 20]).decode("utf-8", "replace")
    hint = " NaN and Infinity are no JSON numbers: correct or remove that value." if "N" in around[-22:] else ""
    return f"not valid JSON at byte {at:,}, near {around!r}.{hint}"


def _objects(file: Path, name: str, raw: msgspec.Raw, kind: type) -> Iterator[list]:
    """Lists of decoded objects, together the whole JSON list."""
    decoder = msgspec.json.Decoder(list[kind])
    count = 0
    try:
        for items in _pieces(memoryview(raw), decoder):
            yield items
            count += len(items)
    except msgspec.DecodeError as error:
        place = re.search(r"`\$\[(\d+)\](.*)`$", str(error))
        where = f"{name}[{count + int(place[1])}]{place[2]}" if place else name
        reason = re.sub(r" - at `.*`$", "", str(error))
        raise UserError(f"{file}: {where}: {reason}; correct it in the annotation file.") from error
    except (UnicodeDecodeError, RecursionError) as error:
        advice = f"; {_RECODE}" if isinstance(error, UnicodeDecodeError) else "."
        raise UserError(f"{file}: {name}, somewhere after entry {count}: {error}{advice}") from error


def _pieces(raw: memoryview, decoder: msgspec.json.Decoder) -> Iterator[list]:
    if len(raw) <= _PIECE or raw[0] != ord("["):
        yield decoder.decode(raw)
        return
    begin, last = 1, len(raw) - 1
    while begin < last:
        cuts = (match.start(1) for match in _CUT.finditer(raw, begin + _PIECE))
        for end in itertools.chain(cuts, [last]):
            try:
                items = decoder.decode(b"".join((b"[", raw[begin:end], b"]")))
            except msgspec.ValidationError:
                raise
            except msgspec.DecodeError:
                if end == last:
                    raise
                continue
            yield items
            begin = end + 1
            break


def _images(file: Path, images: list[_Image]) -> tuple[dict[str, np.ndarray], list[str], dict[str, int]]:
    if not images:
        raise UserError(f"{file}: the list of images is empty; is it the right file?")
    unique: dict[int, _Image] = {}
    for image in images:
        first = unique.setdefault(image.id, image)
        if first != image:
            raise UserError(
                f"{file}: image id {image.id} stands for {first.file_name} ({first.width}x{first.height}) and for "
                f"{image.file_name} ({image.width}x{image.height}); give each image its own id."
            )
    kept = list(unique.values())
    columns = {
        "image_ids": np.array([image.id for image in kept], np.int64),
        "heights": np.array([image.height for image in kept], np.int32),
        "widths": np.array([image.width for image in kept], np.int32),
    }
    names = [image.file_name for image in kept]
    counts = {
        "duplicate images": len(images) - len(kept),
        "duplicate file names": len(names) - len(set(names)),
    }
    return columns, names, counts


def _categories(file: Path, raw: msgspec.Raw) -> tuple[np.ndarray, list[str], dict[str, int]]:
    categories = list(itertools.chain.from_iterable(_objects(file, "categories", raw, _Category)))
    if not categories:
        raise UserError(f"{file}: the list of categories is empty; is it the right file?")
    unique: dict[int, str] = {}
    for category in categories:
        if unique.setdefault(category.id, category.name) != category.name:
            raise UserError(
                f"{file}: category id {category.id} stands for {unique[category.id]!r} and for {category.name!r}; give "
                "each category its own id."
            )
    ids = sorted(unique)
    names = [unique[i] for i in ids]
    counts = {
        "duplicate categories": len(categories) - len(ids),
        "categories that share a name": len(names) - len(set(names)),
    }
    return np.array(ids, np.int64), names, counts


def _annotations(
    file: Path, raw: msgspec.Raw, images: dict[str, np.ndarray], category_ids: np.ndarray, masks: str | None
) -> tuple[dict[str, np.ndarray], dict[str, int], dict[str, list[int]]]:
    by_id = np.argsort(images["image_ids"])
    ascending = images["image_ids"][by_id]
    kind = segmentations.annotation_type(_Annotation) if masks else _Annotation
    columns: dict[str, list[np.ndarray]] = {"ids": [np.empty(0, np.int64)]} | {
        name: [np.empty(0, np.int32)] for name in ("ann_image", "ann_class")
    }
    columns |= {"bbox": [np.empty((0, 4))], "area": [np.empty(0)], "iscrowd": [np.empty(0, np.uint8)]}
    columns |= {name: [column] for name, column in segmentations.empty(masks).items()} if masks else {}
    counts: dict[str, int] = {}
    named: dict[str, list[int]] = {}
    for items in _objects(file, "annotations", raw, kind):
        piece, of_image = _piece(file, items, by_id, ascending, category_ids)
        if masks:
            sizes = np.stack([images["heights"], images["widths"]], 1)[piece["ann_image"]]

            def refuse(k: int, words: str, ids: np.ndarray = piece["ids"], of: np.ndarray = of_image) -> UserError:
                return UserError(f"{file}: annotation {ids[k]} of image {of[k]} {words}; correct or remove it.")

            found = segmentations.masks(masks, [a.segmentation for a in items], sizes, refuse)
            piece |= found.columns
            for name, rows in found.treated.items():
                if name == segmentations.BARE[segmentations.EDGES]:
                    rows = [k for k in rows if not piece["iscrowd"][k]]
                counts[name] = counts.get(name, 0) + len(rows)
                more = dict.fromkeys(piece["ids"][rows].tolist())
                named[name] = [*dict.fromkeys([*named.get(name, []), *more])][:_NAMED]
        for name, column in piece.items():
            columns[name].append(column)
    # one at a time, so that only one column exists twice
    joined = {name: np.concatenate(columns.pop(name)) for name in list(columns)}
    ids = np.sort(joined.pop("ids"))
    counts |= {
        "duplicate annotation ids": int((ids[1:] == ids[:-1]).sum()),
        "crowd boxes": int(joined["iscrowd"].sum()),
    }
    return joined, counts, {name: found for name, found in named.items() if found}


def _piece(
    file: Path, items: list[_Annotation], by_id: np.ndarray, ascending: np.ndarray, category_ids: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The columns of some annotations, and int64 [n], the ids of their images."""
    n = len(items)
    ids = np.fromiter((a.id for a in items), np.int64, n)
    of_image = np.fromiter((a.image_id for a in items), np.int64, n)
    of_category = np.fromiter((a.category_id for a in items), np.int64, n)
    bbox = np.fromiter(itertools.chain.from_iterable(a.bbox for a in items), np.float64, 4 * n).reshape(n, 4)
    area = np.fromiter((a.bbox[2] * a.bbox[3] if a.area is None else a.area for a in items), np.float64, n)
    piece = {
        "ids": ids,
        "ann_image": by_id[_positions(file, "image", of_image, ascending, ids)].astype(np.int32),
        "ann_class": _positions(file, "category", of_category, category_ids, ids).astype(np.int32),
        "bbox": bbox,
        "area": area,
        "iscrowd": np.fromiter((a.iscrowd for a in items), np.uint8, n),
    }
    bad = ~(np.isfinite(bbox).all(1) & np.isfinite(area))
    if bad.any():
        row = int(bad.argmax())
        raise UserError(
            f"{file}: annotation {ids[row]} of image {of_image[row]} has bbox {bbox[row].tolist()} and area "
            f"{area[row]}: they must be finite numbers; correct or remove it."
        )
    return piece, of_image


def _positions(file: Path, what: str, wanted: np.ndarray, ascending: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Positions in `ascending` of the wanted ids; UserError naming the first annotation whose id is not there."""
    at = np.searchsorted(ascending, wanted).clip(max=len(ascending) - 1)
    bad = ascending[at] != wanted
    if bad.any():
        row = int(bad.argmax())
        raise UserError(
            f"{file}: annotation {ids[row]} is of {what} {wanted[row]}, which the file does not list "
            f"({int(bad.sum())} or more such); add the {what} or remove the annotation."
        )
    return at
