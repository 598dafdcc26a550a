"""Turn OpenImages' published tables and image folders into COCO annotation files.

    openimages_to_coco.py DIR [--split train|validation|all] [--classes mlperf|all|FILE] [--category-base 0|1]
    openimages_to_coco.py --boxes CSV --class-descriptions CSV --images FOLDER --output JSON [--image-ids CSV] ...

DIR/SPLIT/{data,labels,metadata} as fiftyone lays them out; the published names of the tables are found as well. Writes
DIR/SPLIT/labels/openimages-mlperf.json (--classes all: openimages.json; FILE: openimages-<name of FILE>.json).

images: those with at least one box of a listed class, in order of their hex id, ids 1..N; width and height as stored
in the JPEG header, never rotated. annotations: ids 1..M, in the order of the images and then of the table; bbox
[x, y, w, h] in pixels, not rounded, area w * h, the five Is... attributes, iscrowd = IsGroupOf. categories: in the
order of the list, ids from --category-base, with their MID. licence and coco_url (OriginalURL): from the image list if
there is one, else null. The bytes are the same on every machine and for any --workers; their SHA-256 is printed.

How: the box table is cut into pieces of 16 MB that become compact records; the records and files of one range of ids
(a bucket) at a time are then matched and the headers read; at last the buckets become JSON in order. A process takes
some 140 MB, whatever the number of images. Finished pieces lie in .<output>.work beside the output, take about half the
room of the box table and are removed at the end, so a run that was killed continues where it was: give the same command
again. An image that is written anew in place meanwhile is not noticed; one that is replaced is.

What happens when things are wrong (each is counted, with examples, in the summary):

| fault                                              | outcome                                                      |
|----------------------------------------------------|--------------------------------------------------------------|
| box with XMin > XMax or YMin > YMax; NaN, infinity | that box is skipped                                          |
| or an empty field; unknown label; id that is not   |                                                              |
| 16 hexadecimal digits                              |                                                              |
| image with boxes but without a file                | image and boxes are skipped                                  |
| file that is empty, no JPEG, cut off in its header | image and boxes are skipped (cut off later: only a decoder   |
| or cannot be opened                                | sees that, see verify_dataset.py --full)                     |
| file without a box of a listed class               | not listed                                                   |
| ids in capitals, in the table or as file name      | the same image; file_name is the file's own name             |
| two files of one id (.jpg and .jpeg)               | the first by name is used                                    |
| the same row twice; box outside 0..1; box without  | kept, as the original conversion does                        |
| area; attribute -1 (unknown: true)                 |                                                              |
| CRLF line ends, a BOM, quotes                      | read like any other                                          |
| missing column, text instead of a number, a row    | error, exit code 2, nothing is written                       |
| that ends early                                    |                                                              |
| a disk that fills up, a killed process, Ctrl-C     | error; the same command continues later                      |
| inputs that changed since the interrupted run      | starts over and says so; while running: error                |
| another result is there already                    | error, --force replaces it; the same result: says so, exit 0 |
| the same output is being written by another run    | error                                                        |
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dataprep.interpreter import with_packages

if __name__ == "__main__":
    with_packages("dataprep.openimages", "numpy", "msgspec", "pyarrow")

from dataprep import openimages_tables as tables
from dataprep.data_sets import MLPERF_CLASSES
from dataprep.openimages_pieces import Tally, Workers, disk_errors, locked
from dataprep.openimages_stages import (
    Job,
    Outcome,
    encode_annotations,
    encode_head,
    encode_images,
    files_found,
    match,
    outcome,
    read_table,
    table_tasks,
)  # fmt: skip
from dataprep.openimages_tables import Source
from detcore import UserError
from detcore.cli import OK, run_main
from detcore.training.progress import Meter

PUBLISHED = {"train": 1_170_301, "validation": 24_781}  # images of the MLPerf subset
SMALL = 8 << 20  # bytes of boxes that one process reads sooner than others start


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{sys.executable} has no pyarrow, which reads the tables: pip install 'pyarrow>=18'")
    workers = args.workers or len(os.sched_getaffinity(0))
    wanted = {"mlperf": MLPERF_CLASSES, "all": None}.get(args.classes, Path(args.classes))
    single = {"--boxes": args.boxes, "--class-descriptions": args.class_descriptions, "--images": args.images}
    if args.dir is None or args.output:
        missing = [option for option, value in {**single, "--output": args.output}.items() if value is None]
        if missing:
            raise UserError(f"{', '.join(missing)} missing: give DIR, or all of {', '.join(single)} and --output")
        source = Source(args.boxes, args.class_descriptions, args.image_ids, args.images)
        summaries = [convert(source, args.output, wanted, args, workers, None)]
    else:
        given = [option for option, value in {**single, "--image-ids": args.image_ids}.items() if value is not None]
        if given:
            raise UserError(f"{given[0]} names a single file: give --output as well, instead of DIR")
        name = {"mlperf": "openimages-mlperf", "all": "openimages"}.get(
            args.classes, f"openimages-{wanted and wanted.stem}"
        )
        splits = ("train", "validation") if args.split == "all" else (args.split,)
        sources = [tables.find_source(args.dir, split) for split in splits]  # all of them, before the first starts
        summaries = []
        for split, source in zip(splits, sources):
            output = args.dir / split / "labels" / f"{name}.json"
            published = PUBLISHED[split] if args.classes == "mlperf" else None
            summaries.append(convert(source, output, wanted, args, workers, published))
    if args.summary:
        text = json.dumps(summaries[0] if len(summaries) == 1 else summaries, indent=1) + "\n"
        with disk_errors(args.summary):
            args.summary.write_text(text)
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="openimages_to_coco.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dir", nargs="?", type=Path, metavar="DIR", help="the data set's root")
    parser.add_argument("--split", choices=("train", "validation", "all"), default="all", help="default: all")
    parser.add_argument(
        "--classes", default="mlperf", help="mlperf: the 264 of MLPerf; all; or a file, one name or MID a line"
    )
    parser.add_argument(
        "--category-base", type=int, choices=(0, 1), default=0, help="the first category id; default: 0"
    )
    parser.add_argument("--boxes", type=Path, metavar="CSV", help="instead of DIR: the table of boxes")
    parser.add_argument("--class-descriptions", type=Path, metavar="CSV", help="instead of DIR: MID,name of each class")
    parser.add_argument("--image-ids", type=Path, metavar="CSV", help="instead of DIR: the image list; may be left out")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="instead of DIR: the image files")
    parser.add_argument("--output", type=Path, metavar="JSON", help="instead of DIR: the file to write")
    parser.add_argument(
        "--workers", type=_positive, metavar="N", help="processes; default: the number of processors. Images on a slow "
        "network file system are read sooner with more",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace a different result that is there already")
    parser.add_argument("--summary", type=Path, metavar="JSON", help="write the summary's numbers to a file as well")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def convert(
    source: Source, output: Path, wanted: Path | None, args: argparse.Namespace, workers: int, published: int | None
) -> dict[str, Any]:
    """Convert one split and print its summary, which is also returned. Raises UserError, see the top of the file."""
    if not source.images.is_dir():
        raise UserError(f"{source.images}: no such folder; it should hold the images")
    if source.image_list and not source.image_list.is_file():
        raise UserError(f"{source.image_list}: no such file; check the path, or leave the image list out")
    work = output.with_name(f".{output.name}.work")
    job = Job.of(source, tables.choose_classes(source.descriptions, wanted), work, args.category_base)
    begin = time.perf_counter()
    with locked(work, output):
        before = _same_inputs_or_fresh(job)
        # A few megabytes are read sooner than processes start.
        with Workers(workers if job.end > SMALL else 1, job) as pool:
            _run(pool, f"{output.name}: boxes, bytes", read_table, table_tasks(job), job.end - job.begin)
            buckets = [(i,) for i in range(1 << job.bits)]
            _run(pool, f"{output.name}: image headers", match, buckets, files_found(job))
            found = outcome(job)
            if not found.images:
                raise UserError(_nothing(job, found.tally))
            part = output.with_name(f".{output.name}.part")
            with disk_errors(part):
                digest, size = _write(job, pool, found, part, output.name)
        if job.fingerprint() != before:
            part.unlink()
            raise UserError(f"{source.boxes} or its images changed while they were read; give the command again")
        same = _same_there(output, digest, size, part, args.force, work)
        if same:  # left as it is: what was built from it stays valid
            part.unlink()
            print(f"{output} was there already, with the same content")
        else:
            os.replace(part, output)
        shutil.rmtree(work)
    return _report(job, found, {"file": str(output), "size": size, "sha256": digest}, published, begin)


def _same_inputs_or_fresh(job: Job) -> dict[str, Any]:
    """Empties the work folder unless its pieces were made from these inputs. Returns the inputs' fingerprint."""
    state, now = job.work / "inputs.json", job.fingerprint()
    try:
        then = json.loads(state.read_text())
    except (OSError, ValueError):
        then = None
    if then == now:
        _log(f"continuing in {job.work}, {len(list(job.work.glob('b*-*'))):,} parts are finished")
        return now
    if then is not None:
        changed = [what for what in now if then.get(what) != now[what]]
        _log(f"starting over: {' and '.join(changed)} changed since the interrupted run")
    state.unlink(missing_ok=True)  # first, so that what is left after a kill here is not continued
    for path in job.work.iterdir():
        if path.name != "lock":
            path.unlink()
    part = state.with_suffix(".part")
    with disk_errors(part):
        part.write_text(json.dumps(now))
        os.replace(part, state)
    return now


def _run(pool: Workers, what: str, function: Callable, tasks: list[tuple], total: int) -> None:
    meter = Meter(what, total)
    for amount in pool.run(function, tasks):
        meter.add(amount)
    meter.close()


def _write(job: Job, pool: Workers, found: Outcome, part: Path, name: str) -> tuple[str, int]:
    """Write the whole file to `part`, to the disk; returns its SHA-256 and size."""
    digest, size = hashlib.sha256(), 0
    meter = Meter(f"{name}: annotations written", found.boxes)
    images = ((i, first, found.licenses) for i, (first, _) in enumerate(found.first))
    annotations = ((i, *first) for i, first in enumerate(found.first))
    with open(part, "wb") as file:

        def put(data: bytes) -> None:
            nonlocal size
            file.write(data)
            digest.update(data)
            size += len(data)

        def put_list(texts: Iterable[bytes], amounts: Iterable[int]) -> None:
            comma = b""
            for text, amount in zip(texts, amounts):
                if text:
                    put(comma)
                    put(text)
                    comma = b","
                meter.add(amount)

        put(encode_head(job, found))
        put_list(pool.run(encode_images, images), [0] * len(found.first))
        put(b'],"annotations":[')
        ends = [first for _, first in found.first[1:]] + [found.boxes + 1]
        put_list(pool.run(encode_annotations, annotations), [b - a for (_, a), b in zip(found.first, ends)])
        put(b"]}")
        file.flush()
        os.fsync(file.fileno())
    meter.close()
    return digest.hexdigest(), size


def _same_there(output: Path, digest: str, size: int, part: Path, force: bool, work: Path) -> bool:
    """Whether `output` is there with the same content. UserError if it has another, unless `force`."""
    try:
        with open(output, "rb") as file:
            old_size = os.fstat(file.fileno()).st_size
            old = hashlib.file_digest(file, "sha256").hexdigest() if old_size == size or not force else ""
    except FileNotFoundError:
        return False
    if old == digest or force:
        return old == digest
    part.unlink()
    raise UserError(
        f"{output} is there already and differs: {old_size:,} bytes, sha256 {old[:16]}; now {size:,} bytes, "
        f"{digest[:16]}. "
        f"Nothing was replaced; with --force it is (quickly: the finished parts stay in {work}, a folder that may be "
        "removed)"
    )


def _nothing(job: Job, tally: Tally) -> str:
    met = "; ".join(f"{count:,} {kind}" for kind, (count, _) in tally.items() if count)
    return f"{job.source.boxes} and {job.source.images}: no image has both a file and a box of a listed class ({met})"


def _report(job: Job, found: Outcome, written: dict[str, Any], published: int | None, begin: float) -> dict[str, Any]:
    """Print the summary, and return it as JSON-like values."""
    tally = dict(found.tally)
    rows, _ = tally.pop("rows")
    all_ = len(found.class_counts)
    empty = [name for name, count in zip(job.classes.names, found.class_counts) if not count]
    orientations = ", ".join(f"{value}: {count:,}" for value, count in found.orientations.items()) or "none"
    without = f", without a box: {', '.join(empty[:5])}{' ...' if empty[5:] else ''}" if empty else ""
    expected = "" if published is None or published == found.images else f" (the published subset has {published:,})"
    lines = [
        ("images", f"{found.images:,}{expected}, {found.bytes:,} bytes"),
        ("boxes", f"{found.boxes:,} of {rows:,} rows"),
        ("classes", f"{all_ - len(empty)} of {all_} have boxes{without}; ids from {job.base}"),
        ("EXIF orientation", f"{orientations} (never applied: width and height are as stored)"),
        *((f"{count:,}", f"{kind}{' (' + '; '.join(examples) + ')' if examples else ''}")
          for kind, (count, examples) in tally.items()),
        ("file", f"{written['file']}, {written['size']:,} bytes"),
        ("content hash", f"sha256 {written['sha256']}"),
        ("time", f"{time.perf_counter() - begin:.1f} s"),
    ]  # fmt: skip
    for name, text in lines:
        print(f"{name:>16}  {text}")
    turned = sum(count for value, count in found.orientations.items() if value != "1")
    if turned:
        _log(
            f"warning: {turned:,} images carry an EXIF orientation that turns or mirrors them. The boxes are those of "
            "the table on the stored pixels; a decoder that applies EXIF would move the images under them"
        )
    return {
        **written, "images": found.images, "boxes": found.boxes, "rows": rows, "image_bytes": found.bytes,
        "classes": len(found.class_counts), "classes_without_boxes": empty, "category_base": job.base,
        "orientations": found.orientations, "met": tally, "seconds": time.perf_counter() - begin,
    }  # fmt: skip


def _log(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_main(main))
