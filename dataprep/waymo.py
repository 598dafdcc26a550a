"""Turn the Waymo Open Dataset's camera images and 2D labels into a COCO annotation file and JPEG files.

    waymo_to_coco.py --dataset training|validation|testing --tf-dir FOLDER --out-dir FOLDER [--cameras ...] ...

FOLDER of --tf-dir: TFRecord files of v1 (segment-*.tfrecord), or Parquet files of v2 (camera_image/*.parquet,
camera_box/*.parquet, of use also camera_calibration), there or in its subfolder DATASET. TensorFlow is not needed.
You get the files from https://waymo.com/open after accepting the licence. For training, --out-dir is
ROOT/training and ROOT/validation: then ROOT is the layout "waymo".

Writes OUT/annotations/annotations.json and OUT/images/SEGMENT/MICROSECONDS_CAMERA.jpg, the JPEG files as they are in
the data set. images: in the order of segment, time and camera, ids 1..N; annotations: ids 1..M, bbox [x, y, w, h] in
pixels; categories 1 vehicle, 2 pedestrian, 3 cyclist; each annotation with its difficulty (1 or 2) and track_id. The
bytes are the same for v1 and v2 of the same content, for any --workers and however often the run was interrupted.

How: each process reads one segment, a frame at a time, and takes some 50 MB for v1 (v2: up to 0.4 GB), whatever the
size of the data set. A finished segment leaves a piece in OUT/.waymo_to_coco, some 2 MB. Give the same command again
after a kill and it goes on; with more files it adds them; a file that was copied anew is converted anew; one that you
removed meanwhile stays in the result, so the data set may come in parts. When you are done, the folder may be removed.

What happens when things are wrong:

| fault                                                   | outcome                                             |
|---------------------------------------------------------|-----------------------------------------------------|
| damaged record length, truncated file                   | frames before it stay, the rest is lost: listed     |
| wrong CRC of a record, record that does not parse or is | that record is skipped: listed                      |
| no Frame (tf.Example, Scenario)                         |                                                     |
| gzip, tar, web page, empty file, no Parquet, a column   | the file is skipped, with what it is: listed        |
| or the component camera_image missing                   |                                                     |
| image that is no whole JPEG, of another size than       | the image is skipped with its boxes: listed         |
| calibrated, or twice; labels twice or without an image  |                                                     |
| no labels for an image (no entry of its camera; v2:     | image without boxes, counted; --labelled-only       |
| no camera_box file)                                     | leaves it out                                       |
| camera entry without labels                             | image without boxes: nothing is there to be seen    |
| box beyond the image                                    | clipped, left out below 1 pixel: counted            |
| no, NaN or negative size; 3D box; unknown type; sign    | that box is left out: counted                       |
| fields and columns that are not known                   | ignored                                             |
| the same segment in two files                           | error                                               |
| a disk that fills up, a killed process, Ctrl-C          | error; the same command goes on later               |
| OUT made with other options                             | error; --force begins anew                          |

"listed": one line in --log-file for each, a count and examples in the summary, exit code 1. Exit code 0: all is
there; 2: nothing could be made.
"""

import argparse
import contextlib
import csv
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataprep.interpreter import with_packages

if __name__ == "__main__":
    with_packages("dataprep.waymo", "numpy", "msgspec")

import msgspec

from dataprep import openimages_pieces as pieces
from dataprep import waymo_parquet, waymo_records
from dataprep.openimages_pieces import Tally, Workers, disk_errors, locked
from dataprep.waymo_records import CAMERAS
from dataprep.waymo_segment import CATEGORIES, Job, Source, convert, entries
from detcore import UserError
from detcore.cli import OK, run_main
from detcore.training.progress import Meter

LOST = 1  # exit code: something could not be converted
SPLITS = ("training", "validation", "testing")
LICENSE = {
    "id": 1, "name": "Waymo Dataset License Agreement for Non-Commercial Use", "url": "https://waymo.com/open/terms",
}  # fmt: skip
_NO_DATA = ("_$folder$", ".gstmp")  # what listings of the bucket and unfinished copies leave
_COMPONENTS = ("camera_image", "camera_box", "camera_calibration")


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    begin = time.perf_counter()
    sources = find_sources(args.tf_dir, args.dataset)
    chosen = sources[args.seg_min : args.seg_max]
    if not chosen:
        raise UserError(f"--seg-min {args.seg_min} --seg-max {args.seg_max} choose none of the {len(sources):,} files")
    if args.legacy and not chosen[0].records:
        raise UserError("--legacy numbers images by their place in a TFRecord frame, which Parquet files do not keep")
    _require(waymo_records.PACKAGES if chosen[0].records else waymo_parquet.PACKAGES)
    cameras = tuple(CAMERAS.index(name) + 1 for name in args.cameras)
    job = Job(args.out_dir.absolute(), cameras, args.frame_stride, args.legacy, args.labelled_only)
    output = job.out / "annotations" / "annotations.json"
    log = args.log_file if len(args.log_file.parts) > 1 else job.out / args.log_file
    with locked(_place_for(job), output):
        _same_options_or_fresh(job, args.dataset, args.force)
        _convert(job, chosen, args.workers or len(os.sched_getaffinity(0)))
        metas = _finished(job, sources)
        _write_log(metas, log)
        tally, faults, counts = _summary(metas)
        if not counts["images"]:
            told = [f"{count:,} {kind} ({found[0]})" for kind, (count, found) in faults.items()] + list(tally)
            raise UserError(
                f"{output}: not written, for there is no image ({'; '.join(told) or 'the files hold none'})"
            )
        counts["sha256"] = _write(job, metas, args.dataset, output)
    return _report(tally, faults, counts, output, log, begin)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="waymo_to_coco.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", choices=SPLITS, default="validation", help="the split; default: %(default)s")
    add("--tf-dir", type=Path, required=True, metavar="FOLDER", help="the data set's files; they are only read")
    add("--out-dir", type=Path, required=True, metavar="FOLDER", help="for images and annotations")
    add("--seg-min", type=_number(0), default=0, metavar="N", help="first file, counted from 0 by name; default: 0")
    add("--seg-max", type=_number(1), metavar="N", help="the file after the last one; default: all")
    add("--log-file", type=Path, default=Path("waymo-converter.csv"), metavar="FILE",
        help="every fault, as CSV; a bare name lies in --out-dir; default: %(default)s")  # fmt: skip
    add("--cameras", nargs="+", choices=CAMERAS, default=CAMERAS, metavar="NAME", help=f"of {', '.join(CAMERAS)}")
    add("--frame-stride", type=_number(1), default=1, metavar="N", help="each N-th frame of a segment alone; default 1")
    add("--labelled-only", action="store_true", help="leave out images that nobody labelled")
    add("--legacy", action="store_true", help="names, image ids (segment * 10^7 + frame * 100 + place in the frame) "
        "and unclipped boxes like the original; segment is the file's number here, not its tar's")  # fmt: skip
    add("--workers", type=_number(1), metavar="N", help="processes; default: the number of processors. v2 takes some "
        "0.4 GB for each")  # fmt: skip
    add("--force", action="store_true", help="remove what other options made in --out-dir, and begin anew")
    return parser


def _number(least: int) -> Any:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least}")
        return int(text)

    return number


def find_sources(folder: Path, dataset: str) -> list[Source]:
    """The segments below `folder`, by name. Raises UserError where there is none, or a file name twice."""
    if not folder.is_dir():
        raise UserError(f"{folder}: {'is not a folder' if folder.exists() else 'no such folder'}; check --tf-dir")
    here = [name for name in SPLITS if (folder / name).is_dir()]
    if here and dataset not in here:
        raise UserError(f"{folder}: holds {', '.join(here)} and not {dataset}; choose with --dataset")
    folder = folder / dataset if here else folder
    found: dict[str, dict[str, Path]] = {}
    if any((folder / name).is_dir() for name in _COMPONENTS[:2]):
        for component in _COMPONENTS:
            for path in (folder / component).glob("*.parquet"):
                found.setdefault(path.stem, {})[component] = path
    else:
        for path in folder.rglob("*"):
            is_record = ".tfrecord" in path.name or path.name.startswith("segment-")
            if is_record and path.is_symlink() and not path.exists():
                raise UserError(f"{path}: a link to nothing; remove it or bring back {os.readlink(path)}")
            if is_record and not path.name.endswith(_NO_DATA) and path.is_file():
                key = path.name.split(".tfrecord")[0].removeprefix("segment-").removesuffix("_with_camera_labels")
                if key in found:
                    raise UserError(f"{path} and {found[key]['records']} are the same segment; remove one of them")
                found[key] = {"records": path}
    if not found:
        tars = next(folder.rglob("*.tar"), None)
        advice = f"unpack the tar files, as {tars.name}" if tars else "check --tf-dir"
        raise UserError(f"{folder}: holds neither *.tfrecord files nor camera_image/*.parquet; {advice}")
    return [Source(key, number, files) for number, (key, files) in enumerate(sorted(found.items()))]


def _require(packages: dict[str, str]) -> None:
    """UserError for packages that are missing. They are imported by the processes, which start without threads."""
    missing = []
    for module, package in packages.items():
        try:
            there = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # the package around it
            there = None
        missing += [] if there else [package]
    if missing:
        raise UserError(f"{sys.executable} has no {', '.join(missing)}: pip install {' '.join(missing)}")


def _place_for(job: Job) -> Path:
    """The work folder. UserError if what is in the output folder is not this program's."""
    theirs = [path for path in (job.images, job.out / "annotations") if path.exists()]
    if theirs and not (job.work / "options.json").exists():
        raise UserError(f"{theirs[0]} was not made by this program, or without its {job.work.name}; choose another "
                        "--out-dir")  # fmt: skip
    return job.work


def _same_options_or_fresh(job: Job, dataset: str, force: bool) -> None:
    state, options = job.work / "options.json", {"dataset": dataset, **job._asdict(), "out": ""}
    now = json.loads(json.dumps(options))
    then = json.loads(state.read_text()) if state.exists() else now
    changed = [f"{name}: {then.get(name)}, now {value}" for name, value in now.items() if then.get(name) != value]
    if changed:
        if not force:
            raise UserError(
                f"{job.out} was made with other options ({'; '.join(changed)}). Nothing was changed; choose another "
                "--out-dir, or --force to remove its images and annotations and begin anew"
            )
        for path in job.work.glob("*.piece"):  # first: a piece says that its images are there
            path.unlink()
        for folder in (job.images, job.out / "annotations"):
            shutil.rmtree(folder, ignore_errors=True)
    part = state.with_suffix(".part")
    with disk_errors(part):
        part.write_text(json.dumps(now))
        os.replace(part, state)


def _convert(job: Job, chosen: list[Source], workers: int) -> None:
    """Convert what is not there yet."""
    waiting, done = [], 0
    for source in chosen:
        current = (pieces.check(job.piece(source.key)) or {}).get("source") == job.fingerprint(source)
        done += source.size() if current else 0
        waiting += [] if current else [source]
    if len(waiting) < len(chosen):
        print(f"{len(chosen) - len(waiting):,} of {len(chosen):,} segments are there already", file=sys.stderr)
    _warn_of_space(job, waiting)
    meter = Meter(f"{len(chosen):,} segments, bytes", done + sum(source.size() for source in waiting))
    meter.skip(done)
    with Workers(min(workers, len(waiting)), job) as pool:
        for size in pool.run(convert, ((source,) for source in waiting)):
            meter.add(size)
    meter.close()


def _warn_of_space(job: Job, waiting: list[Source]) -> None:
    """What the images will take, roughly: all of a camera_image file, two fifths of a TFRecord file."""
    bytes_ = sum(source.size() * (0.4 if source.records else 1) for source in waiting)
    wanted = bytes_ * len(job.cameras) / len(CAMERAS) / job.stride
    free = shutil.disk_usage(job.work).free
    if wanted > free:
        print(f"warning: {wanted / 1e9:,.0f} GB of images are to be expected, and {job.out} has {free / 1e9:,.0f} GB "
              "free; what is converted until then is kept", file=sys.stderr)  # fmt: skip


def _finished(job: Job, sources: list[Source]) -> dict[str, dict]:
    """The meta of all pieces by key, in the order of the result. UserError if two hold the same segment."""
    numbers = {source.key: source.number for source in sources}
    metas, of = {}, {}
    for path in sorted(job.work.glob("*.piece")):
        key = path.stem
        meta = metas[key] = pieces.check(path)
        if meta is None:
            raise UserError(f"{path} is damaged: remove it, and bring its file back to have it converted again")
        for context in meta["contexts"]:
            if of.setdefault(context, key) != key:
                raise UserError(
                    f"the files of {of[context]} and {key} hold the same segment, {context}: remove one of the two "
                    f"and {path}, then give the command again"
                )
    gone = [key for key in metas if key not in numbers]
    if gone and job.legacy:
        raise UserError(f"--legacy numbers the files by their order, and {gone[0]} is no longer there: bring it back")
    if gone:
        print(f"{len(gone):,} segments, whose files are no longer there, stay in the result", file=sys.stderr)
    return metas


def _write_log(metas: dict[str, dict], log: Path) -> None:
    part = log.with_name(f".{log.name}.part")
    with disk_errors(part):
        with open(part, "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(("file", "what", "where", "detail"))
            for key, meta in metas.items():
                rows.writerows((key, *fault) for fault in meta["faults"])
        os.replace(part, log)


def _summary(metas: dict[str, dict]) -> tuple[Tally, Tally, dict[str, Any]]:
    """What was met, what was lost, and counts."""
    tally, faults = Tally(), Tally()
    counts: dict[str, Any] = {"segments": 0, "images": 0, "boxes": 0} | dict.fromkeys(CATEGORIES.values(), 0)
    for key, meta in metas.items():
        tally.merge(meta["tally"])
        for what, where, detail in meta["faults"]:
            faults.add(what, 1, [": ".join(filter(None, (f"{key} {where}".strip(), detail)))])
        counts["segments"] += len(meta["contexts"])
        counts["images"] += meta["images"]
        counts["boxes"] += sum(meta["boxes"])
        for name, count in zip(CATEGORIES.values(), meta["boxes"]):
            counts[name] += count
    return tally, faults, counts


def _write(job: Job, metas: dict[str, dict], dataset: str, output: Path) -> str:
    """Write the annotation file, with one segment in memory at a time; returns its SHA-256."""
    output.parent.mkdir(exist_ok=True)
    part, written = output.with_name(f".{output.name}.part"), hashlib.sha256()
    with disk_errors(part):
        with open(part, "wb") as file:
            for text in _json(job, list(metas), dataset):
                file.write(text)
                written.update(text)
            file.flush()
            os.fsync(file.fileno())
        digest = written.hexdigest()
        with contextlib.suppress(FileNotFoundError), open(output, "rb") as old:
            if hashlib.file_digest(old, "sha256").hexdigest() == digest:  # what was built from it stays valid
                part.unlink()
                print(f"{output} was there already, with the same content")
                return digest
        os.replace(part, output)
    return digest


def _json(job: Job, keys: list[str], dataset: str) -> Iterator[bytes]:
    """The file, in pieces. All numbers follow from the order of the keys."""
    info = {
        "description": f"Waymo Open Dataset, {dataset}: camera images and 2D boxes",
        "contributor": "Waymo LLC",
        "url": "https://waymo.com/open",
        "attribution": "This file was made using the Waymo Open Dataset, provided by Waymo LLC under the Waymo Dataset "
        "License Agreement for Non-Commercial Use, available at waymo.com/open",
    }
    categories = [{"id": id_, "name": name, "supercategory": "object"} for id_, name in CATEGORIES.items()]
    head = {"info": info, "licenses": [LICENSE], "categories": categories}
    yield msgspec.json.encode(head)[:-1] + b',"images":['
    yield from _joined(_images(job, keys))
    yield b'],"annotations":['
    yield from _joined(_annotations(job, keys))
    yield b"]}\n"


def _images(job: Job, keys: list[str]) -> Iterator[dict[str, Any]]:
    numbers = itertools.count(1)
    for key in keys:
        for image in entries(job.piece(key), "images"):
            yield {"id": next(numbers), **image}  # --legacy has put its own there


def _annotations(job: Job, keys: list[str]) -> Iterator[dict[str, Any]]:
    images, numbers = _images(job, keys), itertools.count(1)
    for key in keys:
        for boxes in entries(job.piece(key), "boxes"):
            image_id = next(images)["id"]
            for box in boxes:
                yield {"id": next(numbers), "image_id": image_id, **box}


def _joined(objects: Iterator[dict[str, Any]]) -> Iterator[bytes]:
    encode, comma = msgspec.json.Encoder().encode, b""
    for item in objects:
        yield comma + encode(item)
        comma = b","


def _report(tally: Tally, faults: Tally, counts: dict[str, Any], output: Path, log: Path, begin: float) -> int:
    """Print the summary; returns the exit code."""
    lost = sum(count for count, _ in faults.values())
    classes = ", ".join(f"{counts[name]:,} {name}" for name in CATEGORIES.values())
    lines = [
        ("segments", f"{counts['segments']:,}"),
        ("images", f"{counts['images']:,}"),
        ("boxes", f"{counts['boxes']:,} ({classes})"),
        *((f"{count:,}", f"{kind}{' (' + '; '.join(examples) + ')' if examples else ''}")
          for kind, (count, examples) in sorted(tally.items()) if count),
        *((f"LOST {count:,}", f"{kind} ({'; '.join(examples)})") for kind, (count, examples) in sorted(faults.items())),
        ("file", f"{output}, {output.stat().st_size:,} bytes"),
        ("content hash", f"sha256 {counts['sha256']}"),
        ("time", f"{time.perf_counter() - begin:.1f} s"),
    ]  # fmt: skip
    for name, text in lines:
        print(f"{name:>16}  {text}")
    if lost:
        print(f"{lost:,} faults, each in {log}; copy such files again and give the same command", file=sys.stderr)
    return LOST if lost else OK


if __name__ == "__main__":
    sys.exit(run_main(main))
