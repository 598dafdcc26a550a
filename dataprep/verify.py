"""Says whether a data set is whole and fit to train on, before the clock starts.

    public-scripts/verify_dataset.py DIR                       quick: counts, bytes, manifest, classes, boxes, names
    public-scripts/verify_dataset.py DIR --full                and reads and decodes every image, on all processors
    public-scripts/verify_dataset.py DIR --write-manifest      if all is well, note files and bytes of every folder in
                                                               DIR/expected-mounts.csv
    public-scripts/verify_dataset.py --annotations FILE --images FOLDER [--full]      any COCO-format pair, shards too

run.sub compares each node's mounts with that manifest: VERIFY_MOUNTS=quick (numbers of files) or full (bytes too).
DIR is recognised by its annotation files: openimages-mlperf, openimages, coco (2017), coco2014, waymo, custom. The
published counts of all but the last are known; --partial leaves them out, for a part of a data set.

Exit codes: 0 fine (notes at most), 1 problems were found, 2 it could not be looked at (one line says why).
"""

import argparse
import contextlib
import csv
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dataprep.interpreter import with_packages

if __name__ == "__main__":
    with_packages("dataprep.verify", "numpy", "msgspec", "PIL", "torch", "torchvision")

from dataprep import data_sets
from dataprep.data_sets import Split, counted
from dataprep.findings import PROBLEM, Findings
from dataprep.verify_files import (
    MISSING,
    NOT_PACKED,
    check_annotations,
    check_boxes,
    check_bytes,
    check_counts,
    check_names,
    check_odd,
)
from detcore.cli import OK, run_main
from detcore.data import manifest
from detcore.data.classes import differing_files, told_apart
from detcore.training.progress import Meter, duration

PROBLEMS_FOUND = 1


def check(args: argparse.Namespace, splits: list[Split], findings: Findings) -> list[dict[str, Any]]:
    """All checks; returns one row for each split."""
    folder = None if args.annotations else args.folder
    counts, empty = {}, {}
    if folder:
        counts, odd = check_counts(findings, folder, args)
        empty = check_odd(findings, folder, splits, odd)
    indexes, hashes, skip, rows = {}, {}, {}, []
    for split in splits:
        index = check_annotations(findings, split, args)
        here = counts.get(os.path.relpath(split.images, folder)) if folder else None
        row = {"split": split.name, "image_files": here and here.files, "bytes": here and here.bytes}
        rows.append(row)
        if index is None:
            continue
        indexes[split.name] = index
        row |= {"images": len(index), "annotations": index.counts["annotations"], "classes": index.num_classes}
        row |= {"sha256": index.content_hash}
        there, skip[split.name] = check_names(findings, split.name, index, args.partial, empty.get(split.name, ()))
        row["image_files"] = row["image_files"] or there
        check_boxes(findings, split.name, index)
    if {"train", "val"} <= indexes.keys():
        train, val = indexes["train"], indexes["val"]
        entries = [list(zip(i.category_ids.tolist(), i.category_names, strict=True)) for i in (train, val)]
        apart = differing_files(*entries, *told_apart(train.annotation_file, val.annotation_file))
        do = "training needs the same ids with the same names in both files: convert them together"
        findings.add(PROBLEM, "", "categories that differ between train and val", len(apart), apart, do)
    if args.full:
        from dataprep import verify_images  # imports torch, which takes seconds

        for name, index in indexes.items():
            meter = Meter(f"decoding {name}", len(index))
            hashes[name] = verify_images.check_images(findings, name, index, args.workers, meter.add, skip[name])
            meter.close()
        verify_images.check_leaks(findings, {name: (indexes[name], hashes[name]) for name in indexes})
    for split, row in zip(splits, rows):
        if row["bytes"] is not None:
            bad = any(item["level"] == PROBLEM and item["split"] == split.name for item in findings.items)
            count = manifest.Count(row["image_files"], row["bytes"])
            check_bytes(findings, split, count, decoded=args.full and split.name in indexes and not bad)
    return rows


def show(rows: list[dict[str, Any]], findings: Findings, seconds: float, full: bool) -> None:
    """The table."""
    columns = ("images", "annotations", "classes", "image_files", "bytes")
    print(f"{'split':12}" + "".join(f"{name.replace('_', ' '):>16}" for name in columns))
    for row in rows:
        cells = (row.get(name) for name in columns)
        print(f"{row['split']:12}" + "".join(f"{'-' if c is None else format(c, ','):>16}" for c in cells))
    ordered = sorted(findings.items, key=lambda item: (item["level"] != PROBLEM, item["split"]))
    if ordered:
        print(f"\n{'':9}{'split':7}{'how many':>12}  what, for example, what to do")
    for item in ordered:
        print(f"{item['level'].upper() if item['level'] == PROBLEM else item['level']:9}{item['split'] or '-':7}"
              f"{item['count']:12,}  {item['what']}")  # fmt: skip
        for example in item["examples"][:3]:
            print(f"{'':30}  {example}")
        print(f"{'':30}  -> {item['do']}")
    notes = len(findings.items) - findings.problems
    how = "every image read and decoded" if full else "quick: no image was opened; --full reads and decodes each"
    verdict = counted(findings.problems, "problem") if findings.problems else "fine"
    print(f"\n{verdict}, {counted(notes, 'note')}, in {duration(seconds)} ({how})")


@contextlib.contextmanager
def findings_file(path: Path | None) -> Iterator[Callable[[str, str, str, str], None]]:
    """A CSV of each single finding, written beside its final name and renamed at the end."""
    if path is None:
        yield lambda *row: None
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(("split", "what", "file", "detail"))
            yield lambda *row: rows.writerow(row)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="verify_dataset.py", usage=argparse.SUPPRESS,
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    data_sets.add_arguments(parser)
    add = parser.add_argument
    add("--full", action="store_true", help="read and decode every image")
    add("--masks", action="store_true", help="read the masks too, as programs do that train or score them")
    add("--partial", action="store_true", help="a part of a data set: missing images are notes, no published counts")
    add("--workers", type=int, default=0, metavar="N", help="processes of --full; 0: one for each processor")
    add("--write-manifest", action="store_true", help=f"if there are no problems, write {manifest.NAME} into DIR")
    add("--force", action="store_true", help="with --write-manifest: replace one with other counts")
    add("--json", type=Path, metavar="FILE", help="the findings for a program")
    add("--list", type=Path, metavar="FILE", help="every single file of every finding about files, as CSV")
    add("--cache-dir", type=Path, metavar="FOLDER", help="of the annotation index; without: beside the annotation file")
    args = parser.parse_args(argv)
    args.workers = args.workers or len(os.sched_getaffinity(0))
    if args.workers < 1:
        parser.error("--workers is not negative")
    if args.write_manifest and args.annotations:
        parser.error("--write-manifest goes with DIR: the manifest is of a whole folder")
    if args.force and not args.write_manifest:
        parser.error("--force goes with --write-manifest")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    begin = time.perf_counter()
    splits = data_sets.splits_from(args)
    with findings_file(args.list) as on_each:
        findings = Findings(on_each)
        rows = check(args, splits, findings)
    seconds = time.perf_counter() - begin
    show(rows, findings, seconds, args.full)
    if args.json:
        part = args.json.with_name(f".{args.json.name}.{os.getpid()}.part")
        about = {"data_set": str(args.folder or args.annotations), "layout": splits[0].layout, "full": args.full}
        about |= {"problems": findings.problems, "splits": rows, "findings": findings.items, "seconds": seconds}
        part.write_text(json.dumps(about, indent=1) + "\n")
        os.replace(part, args.json)
    if findings.problems:
        if args.write_manifest:
            print(f"{args.folder / manifest.NAME}: not written, for there are problems")
        return PROBLEMS_FOUND
    if args.write_manifest:
        missing = sum(i["count"] for i in findings.items if i["what"] in (MISSING, NOT_PACKED))
        if missing:  # with --partial a note
            print(f"{args.folder / manifest.NAME}: not written, for {counted(missing, 'listed image')} missing")
            return PROBLEMS_FOUND
        made = manifest.write(args.folder, force=args.force)
        files, size = sum(c.files for c in made.values()), sum(c.bytes for c in made.values())
        print(f"{args.folder / manifest.NAME}: {len(made):,} folders, {files:,} files, {size:,} bytes.")
        print("run.sub compares it on every node: VERIFY_MOUNTS=quick sbatch ... run.sub (full: bytes too)")
    return OK


if __name__ == "__main__":
    sys.exit(run_main(main))
