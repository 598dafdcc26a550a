#!/usr/bin/env python3
"""Says whether a data set is whole and fit to train on, before the clock starts.

    public-scripts/verify_dataset.py DIR                       quick: counts, bytes, manifest, classes, boxes, names
    public-scripts/verify_dataset.py DIR --full                and reads and decodes every image, on all processors
    public-scripts/verify_dataset.py DIR --write-manifest      if all is well, note files and bytes of every folder in
                                                               DIR/expected-mounts.csv
    public-scripts/verify_dataset.py --annotations FILE --images FOLDER [--full]      any COCO-format pair, shards too

run.sub compares each node's mounts with that manifest: VERIFY_MOUNTS=quick (numbers of files) or full (bytes too).
DIR is recognised by its annotation files: openimages-mlperf, openimages, coco (2017), coco2014, custom. The published
counts of the first four are known; --partial leaves them out, for a part of a data set.

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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import dataset_layouts

if __name__ == "__main__":
    dataset_layouts.with_packages("numpy", "msgspec", "PIL", "torch", "torchvision")

import numpy as np
from dataset_layouts import Split, counted

from detcore import UserError
from detcore.cli import OK, run_main
from detcore.data import manifest, verify
from detcore.data.coco import CocoIndex
from detcore.data.verify import NOTE, PROBLEM, Findings
from detcore.progress import Meter, duration

PROBLEMS_FOUND = 1
CLASS_LIST = Path(__file__).resolve().parent / "openimages_mlperf_classes.txt"


def check_annotations(findings: Findings, split: Split, args: argparse.Namespace) -> CocoIndex | None:
    """Open the annotation file and compare counts and classes; None where it cannot be used."""
    try:
        index = CocoIndex.open(split.annotations, split.images, cache_dir=args.cache_dir)
    except UserError as error:
        what = "annotation file or image folder that cannot be used"
        findings.add(
            PROBLEM, split.name, what, 1, [str(error)], "mend that first: what depends on it was not looked at"
        )
        return None
    check_classes(findings, split, index)
    published = split.published
    if published and not args.partial:
        for what, want, have in (
            ("images", published.images, len(index)),
            ("annotations", published.annotations, index.counts["annotations"]),
        ):
            if want not in (None, have):
                do = "convert or download again; --partial if a part is what you want"
                shown = [f"{have:,} listed, {want:,} published"]
                findings.add(PROBLEM, split.name, f"{what} more or fewer than published", abs(want - have), shown, do)
    for what, do in (
        ("duplicate images", "the first entry stays"),
        ("duplicate file names", "both train, with the boxes of each: give each picture one entry"),
        ("duplicate annotation ids", "harmless here; pycocotools keeps only the last of them"),
        ("images without annotations", "they train as background"),
    ):
        findings.add(NOTE, split.name, what, index.counts[what], [], do)
    return index


def check_classes(findings: Findings, split: Split, index: CocoIndex) -> None:
    layout = dataset_layouts.ALL.get(split.layout)
    if not layout:
        return
    ids = index.category_ids
    if layout.classes not in (None, len(ids)):
        shown = [f"{len(ids)} in the file, {layout.classes} in {split.layout}"]
        do = "convert again; training with this --dataset refuses the file"
        findings.add(PROBLEM, split.name, "another number of classes", abs(len(ids) - layout.classes), shown, do)
    if layout.contiguous and not any(np.array_equal(ids, np.arange(k, k + len(ids))) for k in (0, 1)):
        shown = [f"{ids[0]} to {ids[-1]}"]
        findings.add(PROBLEM, split.name, "category ids that are not 0..n-1 or 1..n", 1, shown, "convert again")
    elif layout.contiguous and ids[0] == 1:
        do = "fine here; programs that take the id as class index need 0..n-1 (openimages_to_coco.py --category-base 0)"
        findings.add(NOTE, split.name, "category ids count from 1", len(ids), [f"1 to {ids[-1]}"], do)
    if split.layout == "openimages-mlperf" and CLASS_LIST.exists() and len(ids) == layout.classes:
        names = CLASS_LIST.read_text(encoding="utf-8").splitlines()
        wrong = [f"{a} instead of {b}" for a, b in zip(index.category_names, names) if a != b]
        do = "the classes are not those of the benchmark, or in another order: convert again"
        findings.add(PROBLEM, split.name, "classes of another name than the benchmark's list", len(wrong), wrong, do)


def check_counts(
    findings: Findings, folder: Path, args: argparse.Namespace
) -> tuple[dict[str, manifest.Count], manifest.Odd]:
    """Files and bytes of each folder, compared with the manifest if there is one, and what stood out in counting."""
    meter = Meter(f"counting files of {folder}", 0)
    odd = manifest.Odd([], [])
    counts: dict[str, manifest.Count] = {}
    try:
        counts = manifest.build(folder, progress=lambda files: meter.add(files - meter.done), odd=odd)
        path = folder / manifest.NAME
        if path.exists() and not args.write_manifest:
            wrong = manifest.compare(manifest.read(path), counts, full=True)
            do = (
                "replace single files, not folders: --full --list FILE names the damaged ones, or run the downloader "
                f"again; if the data is right: --write-manifest --force ({path})"
            )
            findings.add(PROBLEM, "", "folders that are not as the manifest says", len(wrong), wrong, do)
    except UserError as error:  # the other checks may still say what is wrong
        findings.add(PROBLEM, "", "files or a manifest that cannot be read", 1, [str(error)], "mend that first")
    return counts, odd


def check_odd(findings: Findings, folder: Path, splits: list[Split], odd: manifest.Odd) -> dict[str, list[str]]:
    """Links to nothing and empty files of the data set; returns the latter's names in each split's image folder."""
    empty: dict[str, list[str]] = {split.name: [] for split in splits}
    places = {split.name: os.path.relpath(split.images, folder) + "/" for split in splits}
    for what, names in (("links to nothing", odd.dangling), ("empty files", odd.empty)):
        for name in names:
            split = next((s for s, place in places.items() if name.startswith(place)), "")
            short = name.removeprefix(places.get(split, ""))
            if what == "links to nothing":
                do = "mount or fetch what they lead to, or remove them; they count as not there"
                findings.each(PROBLEM, split, what, [short], do)
            elif split:
                findings.each(PROBLEM, split, what, [short], verify.FULL_KINDS[what][1])
                empty[split].append(short)
            else:
                findings.each(NOTE, split, what, [short], "outside of the image folders; is that meant?")
    return empty


def check_bytes(findings: Findings, split: Split, count: manifest.Count, decoded: bool) -> None:
    """The bytes of the image folder against the published ones; a note once every image has decoded."""
    published = split.published
    if published and published.image_bytes and published.images == count.files != 0:
        difference = count.bytes - published.image_bytes
        do = (
            "--full finds the files"
            if not decoded
            else "every image decodes in its listed size, so only the sum differs"
        )
        shown = [f"{count.bytes:,} here, {published.image_bytes:,} published"]
        level = NOTE if decoded else PROBLEM
        findings.add(level, split.name, "bytes more or fewer than published", abs(difference), shown, do)


def look(args: argparse.Namespace, splits: list[Split], findings: Findings) -> list[dict[str, Any]]:
    """All checks; returns one row for each split."""
    folder = None if args.annotations else args.folder
    counts, empty = {}, {}
    if folder:
        counts, odd = check_counts(findings, folder, args)
        empty = check_odd(findings, folder, splits, odd)
    indexes, hashes, seen, rows = {}, {}, {}, []
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
        there, seen[split.name] = verify.check_names(
            findings, split.name, index, args.partial, empty.get(split.name, ())
        )
        row["image_files"] = row["image_files"] or there
        verify.check_boxes(findings, split.name, index)
    if {"train", "val"} <= indexes.keys():
        train, val = indexes["train"].category_ids.tolist(), indexes["val"].category_ids.tolist()
        apart = sorted(set(train) ^ set(val))
        do = "training needs the same in both files: convert them together"
        findings.add(PROBLEM, "", "category ids of only one of train and val", len(apart), [str(k) for k in apart], do)
    if args.full:
        for name, index in indexes.items():
            meter = Meter(f"decoding {name}", len(index))
            hashes[name] = verify.check_images(findings, name, index, args.workers, meter.add, seen[name])
            meter.close()
        verify.check_leaks(findings, {name: (indexes[name], hashes[name]) for name in indexes})
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
def every_finding(path: Path | None) -> Iterator[Callable[[str, str, str, str], None]]:
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
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    dataset_layouts.add_arguments(parser)
    add = parser.add_argument
    add("--full", action="store_true", help="read and decode every image")
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
    splits = dataset_layouts.splits_from(args)
    with every_finding(args.list) as every:
        findings = Findings(every)
        rows = look(args, splits, findings)
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
        missing = sum(i["count"] for i in findings.items if i["what"] in (verify.MISSING, verify.NOT_PACKED))
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
