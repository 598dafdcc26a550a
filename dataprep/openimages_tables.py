"""The published files of OpenImages: where they lie, its class lists, and its tables read into compact records.

Records are keyed by the image id as a number: 16 hexadecimal digits are 64 bits, and sorting the numbers sorts the ids.
A table becomes pieces (openimages_pieces) of records sorted by id, with the places where each of 2**bits buckets
(the leading bits of the id) begins, so that later one bucket of all pieces can be read without the rest.

Needs pyarrow (the extra `convert`), which is imported where it is used.
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataprep import openimages_pieces as pieces
from dataprep.openimages_pieces import Tally
from detcore import UserError

FLAGS = ("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside")
_SIDES = ("XMin", "XMax", "YMin", "YMax")
_NEEDED = ("ImageID", "LabelName", *_SIDES, *FLAGS)
BOX = np.dtype([("id", "<u8"), ("cls", "<u2"), ("flags", "u1"), *((side.lower(), "<f8") for side in _SIDES)])
FILE = np.dtype([("id", "<u8"), ("name", "S21")])
_BATCH = 100_000  # names of files that become one piece
_BLOCK = 16 << 20  # bytes of the image list that become one piece
_LINE = 1 << 20  # bytes; what has longer lines is no table
_FILE_NAME = re.compile(r"[0-9a-f]{16}\.jpe?g", re.IGNORECASE | re.ASCII)
_DIGITS = np.full(256, 255, np.uint8)  # the value of a character as hexadecimal digit
_DIGITS[list(b"0123456789abcdef")] = _DIGITS[list(b"0123456789ABCDEF")] = range(16)

BAD_ID = "rows whose ImageID is not 16 hexadecimal digits: skipped"
UPPER_ID = "rows with an ImageID in capitals: taken as the same image"
NOT_FINITE = "boxes with NaN, an infinity or an empty field: skipped"
REVERSED = "boxes with XMin > XMax or YMin > YMax: skipped"
OUTSIDE = "boxes that reach out of the image: kept as they are"
UNKNOWN = "rows with a label that the class descriptions do not have: skipped"
OTHER_CLASS = "boxes of classes that were not asked for: left out"
UNCERTAIN = "boxes with an Is... attribute of -1, unknown: taken as true"
OTHER_FILES = "files not named <16 hexadecimal digits>.jpg: not used"


class Source(NamedTuple):
    """The files of one split. image_list None: licence and URL become null."""

    boxes: Path
    descriptions: Path
    image_list: Path | None
    images: Path


class Classes(NamedTuple):
    """names, mids: of the categories, in their order; labels: every label that is known, as MID and as name, and the
    position of its category, -1 for one that was not asked for."""

    names: list[str]
    mids: list[str]
    labels: dict[str, int]


def find_source(root: Path, split: str) -> Source:
    """The files of a split below `root`, under fiftyone's names or the published ones. Raises UserError without."""

    def find(*patterns: str) -> Path | None:
        own = [root / split / "labels", root / split / "metadata", root / split]
        for pattern in patterns:
            for folder in own if "/" in pattern else [*own, root / "labels", root / "metadata", root]:
                found = sorted(folder.glob(pattern.removeprefix("/")))
                if found:
                    return found[0]
        return None

    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the one that holds {split}/data")
    boxes = find("/detections.csv", f"*{split}-annotations-bbox.csv", f"*{split}-annotations-human-bbox.csv")
    descriptions = find("classes.csv", "*class-descriptions-boxable.csv", "*class-descriptions*.csv")
    image_list = find("/image_ids.csv", f"*{split}-images-*with-rotation.csv", "image_ids_and_rotation.csv")
    for path, what in (
        (boxes, f"{split}/labels/detections.csv (published as {split}-annotations-bbox.csv), the boxes, is"),
        (descriptions, f"{split}/metadata/classes.csv (published as class-descriptions-boxable.csv), the names, is"),
    ):
        if path is None:
            raise UserError(f"{root}: {what} not there; download it, or name the files by options (--help)")
    return Source(boxes, descriptions, image_list, root / split / "data")


def read_descriptions(path: Path) -> list[tuple[str, str]]:
    """(MID, name) of a class description file, with or without a header line. Raises UserError."""
    rows: dict[str, str] = {}
    for line, row in _rows(path):
        if len(row) < 2 or (line == 1 and not row[0].startswith("/")):
            if line > 1:
                raise UserError(f"{path}, line {line}: {','.join(row)!r} is not MID,name; download the file again")
            continue
        mid, name = row[0].strip(), row[1].strip()
        if rows.setdefault(mid, name) != name:
            raise UserError(f"{path}, line {line}: {mid} is {rows[mid]!r} and {name!r}; correct the file")
    if not rows:
        raise UserError(f"{path}: no class stands in it; download the file again")
    return list(rows.items())


def choose_classes(descriptions: Path, wanted: Path | None) -> Classes:
    """The classes of the file `wanted` (a name or MID a line), in its order; None: all, in the descriptions' order.

    Raises UserError for classes that the descriptions do not have, or have twice.
    """
    known = read_descriptions(descriptions)
    by_name: dict[str, list[str]] = {}
    for mid, name in known:
        by_name.setdefault(name, []).append(mid)
    names = dict(known)
    chosen = [mid for mid, _ in known]
    if wanted is not None:
        asked = [row[0].strip() if len(row) == 1 else ",".join(row).strip() for _, row in _rows(wanted)]
        absent = [label for label in asked if label not in names and label not in by_name]
        if absent or not asked:
            what = f"{len(absent)} classes that {descriptions} does not have: {', '.join(absent[:5])}"
            raise UserError(f"{wanted} lists {what if asked else 'no class'}; one name or MID a line is expected")
        several = [label for label in asked if label not in names and len(by_name[label]) > 1]
        if several:
            raise UserError(
                f"{wanted}: {several[0]!r} is the name of {' and '.join(by_name[several[0]])}; give the MID"
            )
        chosen = [label if label in names else by_name[label][0] for label in asked]
        twice = next((mid for mid, count in Counter(chosen).items() if count > 1), None)
        if twice:
            raise UserError(f"{wanted} lists {names[twice]} ({twice}) more than once; remove one")
    position = {mid: at for at, mid in enumerate(chosen)}
    labels = {name: position.get(mids[0], -1) for name, mids in by_name.items() if len(mids) == 1}
    labels |= {mid: position.get(mid, -1) for mid, _ in known}
    return Classes([names[mid] for mid in chosen], chosen, labels)


def _rows(path: Path) -> Iterable[tuple[int, list[str]]]:
    """Line numbers and fields of a small CSV file, without empty lines."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return [(number, row) for number, row in enumerate(csv.reader(file), 1) if any(map(str.strip, row))]
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; check the path") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} can't be read as CSV: {error}; download the file again") from error


def read_header(path: Path, needed: Sequence[str] = _NEEDED) -> tuple[list[str], int]:
    """The column names of a large CSV file and where its rows begin. Raises UserError if a needed one is missing."""
    try:
        with open(path, "rb") as file:
            line = file.readline(_LINE)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; check the path") from error
    try:
        columns = [name.strip() for name in next(csv.reader([line.decode("utf-8-sig").rstrip("\r\n")]), [])]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} can't be read as CSV: {error}; download the file again") from error
    missing = [name for name in needed if columns.count(name) != 1]
    if missing:
        raise UserError(
            f"{path} has no column {', '.join(missing)}, its first line is {', '.join(columns)[:300]!r}; is it the "
            "right file?"
        )
    return columns, len(line)


def hex_ids(characters: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers uint64 [N] of ids given as characters uint8 [N, 16]; bool [N]: whether each is valid, has capitals."""
    digits = _DIGITS[characters]
    packed = np.ascontiguousarray(digits[:, 0::2] << 4 | digits[:, 1::2] & 15)
    capitals = ((characters >= ord("A")) & (characters <= ord("F"))).any(1)
    return packed.view(">u8")[:, 0].astype(np.uint64), (digits < 16).all(1), capitals


def write_records(path: Path, meta: dict[str, Any], records: np.ndarray, bits: int) -> None:
    """One piece: the records (with a field `id`) sorted by id, equal ids as they come, and the buckets' starts."""
    if (records["id"][1:] < records["id"][:-1]).any():
        records = records[np.argsort(records["id"], kind="stable")]
    bounds = np.arange(1, 1 << bits, dtype=np.uint64) << np.uint64(64 - bits) if bits else np.empty(0, np.uint64)
    starts = np.searchsorted(records["id"], bounds)
    pieces.write(path, meta, records=records, starts=np.r_[0, starts, len(records)].astype(np.int64))


def read_bucket(paths: Iterable[Path], bucket: int) -> list[np.ndarray]:
    """The records of one bucket in each of the pieces that has some."""
    slices = ((path, pieces.starts(path)[bucket : bucket + 2]) for path in paths)
    return [pieces.read(path, "records", begin, end) for path, (begin, end) in slices if begin < end]


def read_boxes(
    file: Path, columns: list[str], begin: int, end: int, labels: dict[str, int]
) -> tuple[np.ndarray, Tally]:
    """The usable boxes [N] of BOX in the lines that begin in bytes begin..end of a CSV file, and what else was there.

    Raises UserError for lines that are not rows of the table.
    """
    import pyarrow as pa
    from pyarrow import csv as pacsv

    data = _lines(file, begin, end)
    tally = Tally({"rows": [0, []]})
    if not data.strip():
        return np.empty(0, BOX), tally
    numbers = {side: pa.float64() for side in _SIDES} | {flag: pa.int8() for flag in FLAGS}
    try:
        table = pacsv.read_csv(
            pa.BufferReader(data),
            pacsv.ReadOptions(use_threads=False, block_size=len(data) + 1, column_names=columns),
            convert_options=pacsv.ConvertOptions(
                include_columns=list(_NEEDED),
                column_types={"ImageID": pa.string(), "LabelName": pa.dictionary(pa.int32(), pa.string()), **numbers},
            ),
        )
    except pa.ArrowInvalid as error:
        where = f"{file}, in bytes {begin:,} to {end:,}"
        raise UserError(f"{where}: {error}; the file is damaged or cut off: download it again") from error
    tally.add("rows", len(table))
    return _checked_boxes(table, labels, tally), tally


def _checked_boxes(table: Any, labels: dict[str, int], tally: Tally) -> np.ndarray:
    label = table["LabelName"].combine_chunks()
    known = np.array([labels.get(name, -2) for name in label.dictionary.to_pylist()] + [-2], np.int32)
    indices = label.indices if not label.null_count else label.indices.fill_null(len(known) - 1)
    cls = known[_values(indices)]
    ids, valid, capitals = _ids_of(table["ImageID"])

    def drop(bad: np.ndarray, kind: str) -> None:
        nonlocal valid
        bad &= valid
        if bad.any():
            tally.add(kind, bad.sum(), _examples(table, bad))
            valid &= ~bad

    if not valid.all():
        tally.add(BAD_ID, (~valid).sum(), _examples(table, ~valid))
    drop(cls == -2, UNKNOWN)
    unlisted = valid & (cls == -1)
    tally.add(OTHER_CLASS, unlisted.sum())
    valid &= ~unlisted
    empty = np.zeros(len(table), bool)
    for name in (*_SIDES, *FLAGS):
        if table[name].null_count:
            empty |= table[name].is_null().to_numpy()
    sides = {side: _values(table[side], np.nan) for side in _SIDES}
    for values in sides.values():
        empty |= ~np.isfinite(values)
    drop(empty, NOT_FINITE)
    with np.errstate(invalid="ignore"):
        drop((sides["XMin"] > sides["XMax"]) | (sides["YMin"] > sides["YMax"]), REVERSED)
        outside = (sides["XMin"] < 0) | (sides["XMax"] > 1) | (sides["YMin"] < 0) | (sides["YMax"] > 1)
    flags, uncertain = np.zeros(len(table), np.uint8), np.zeros(len(table), bool)
    for bit, name in enumerate(FLAGS):
        values = _values(table[name], 0)
        flags |= (values != 0).astype(np.uint8) << bit
        uncertain |= values < 0
    tally.add(UNCERTAIN, (uncertain & valid).sum())
    for kind, where in ((OUTSIDE, outside), (UPPER_ID, capitals)):
        where &= valid
        if where.any():
            tally.add(kind, where.sum(), _examples(table, where))
    boxes = np.empty(int(valid.sum()), BOX)
    boxes["id"], boxes["cls"], boxes["flags"] = ids[valid], cls[valid], flags[valid]
    for side in _SIDES:
        boxes[side.lower()] = sides[side][valid]
    return boxes


def _values(column: Any, instead: float | None = None) -> np.ndarray:
    """The numbers of a column, with another for what is empty. Its memory is shared, not copied."""
    if column.null_count:
        column = column.fill_null(instead)
    array = column.combine_chunks() if hasattr(column, "chunks") else column
    width = array.type.bit_width // 8
    kind = {"double": "f8"}.get(str(array.type), f"i{width}")
    return np.frombuffer(array.buffers()[1], kind, len(array), array.offset * width)


def _ids_of(column: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """hex_ids of a column of strings; what has not 16 bytes is not valid."""
    strings = column.combine_chunks()
    if not isinstance(strings, type(column.chunk(0))):
        strings = strings.chunk(0)
    offsets = np.frombuffer(strings.buffers()[1], np.int32)[strings.offset : strings.offset + len(strings) + 1]
    data = np.frombuffer(strings.buffers()[2] or b"", np.uint8)
    right = np.diff(offsets) == 16
    if right.all():
        return hex_ids(data[offsets[0] : offsets[-1]].reshape(-1, 16))
    characters = np.zeros((len(right), 16), np.uint8)  # zeros are no digits
    characters[right] = data[offsets[:-1][right, None] + np.arange(16)]
    return hex_ids(characters)


def _examples(table: Any, where: np.ndarray) -> list[str]:
    rows = [table.slice(int(at), 1).to_pylist()[0] for at in np.flatnonzero(where)[: Tally.EXAMPLES]]
    return [f"{row['ImageID']} {row['LabelName']} {' '.join(str(row[side]) for side in _SIDES)}" for row in rows]


def _lines(file: Path, begin: int, end: int) -> bytes:
    """The lines that begin in bytes begin..end; `begin` of the first range must be the begin of a line."""
    with open(file, "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        first, last = (_line_begin(handle, at, size) for at in (begin, end))
        handle.seek(first)
        return handle.read(last - first)


def _line_begin(handle: Any, at: int, size: int) -> int:
    if at >= size:
        return size
    handle.seek(at - 1)
    if not handle.readline(_LINE).endswith(b"\n") and handle.tell() < size:
        raise UserError(f"{handle.name}: a line at byte {at:,} is longer than a megabyte; this is no CSV file")
    return handle.tell()


def list_images(folder: Path, name_piece: Any, bits: int) -> tuple[int, Tally]:
    """Write pieces of FILE records of the images in a folder to name_piece(0), name_piece(1), ... and say how many."""
    tally, batch, count = Tally(), [], 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if _FILE_NAME.fullmatch(entry.name):
                batch.append(entry.name)
            elif not entry.name.startswith("."):
                tally.add(OTHER_FILES, 1, [repr(entry.name)])
            if len(batch) == _BATCH:
                _write_names(name_piece(count), batch, bits)
                batch, count = [], count + 1
    if batch:
        _write_names(name_piece(count), batch, bits)
        count += 1
    return count, tally


def _write_names(path: Path, names: list[str], bits: int) -> None:
    records = np.empty(len(names), FILE)
    records["name"] = np.array(names, FILE["name"])
    characters = records["name"].copy().view(np.uint8).reshape(len(names), -1)[:, :16]
    records["id"] = hex_ids(characters)[0]
    write_records(path, {}, records, bits)


def read_image_list(file: Path, name_piece: Any, bits: int) -> int:
    """Write pieces of (id, license, url) records of an image list; returns how many. What is no row is left out."""
    import pyarrow as pa
    from pyarrow import csv as pacsv

    columns, _ = read_header(file, ("ImageID", "OriginalURL"))
    wanted = ["ImageID", "OriginalURL", *(["License"] if "License" in columns else [])]
    count = 0
    try:
        reader = pacsv.open_csv(
            file,
            pacsv.ReadOptions(use_threads=False, block_size=_BLOCK, column_names=columns, skip_rows=1),
            pacsv.ParseOptions(newlines_in_values=True, invalid_row_handler=lambda row: "skip"),
            pacsv.ConvertOptions(include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string())),
        )
        for batch in reader:
            table = pa.Table.from_batches([batch])
            if not len(table):
                continue
            ids, valid, _ = _ids_of(table["ImageID"])
            texts = [
                np.array([text.encode() for text in table[name].to_pylist()] if name in wanted else [b""] * len(table))
                for name in ("License", "OriginalURL")
            ]
            records = np.empty(len(table), [("id", "<u8"), ("license", texts[0].dtype), ("url", texts[1].dtype)])
            records["id"], records["license"], records["url"] = ids, *texts
            write_records(name_piece(count), {}, records[valid], bits)
            count += 1
    except pa.ArrowInvalid as error:
        raise UserError(f"{file} can't be read as CSV: {error}; download it again") from error
    return count
