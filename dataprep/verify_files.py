"""Annotation files, counts, names and boxes of a data set, checked without opening an image.

Memory: the annotation index is memory-mapped (`CocoIndex`, built here if it is not there yet, so that training starts
from it), and eight bytes are kept for each file.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dataprep import data_sets
from dataprep.data_sets import MLPERF_CLASSES, Split
from dataprep.findings import EXAMPLES, IMAGE_KINDS, NOTE, PROBLEM, Findings
from detcore import UserError
from detcore.data import manifest, segmentations, signs
from detcore.data.coco import CocoIndex, training_boxes
from detcore.data.shards import hash_names
from detcore.training.progress import Meter

MISSING, NOT_PACKED = "images listed but missing", "images listed but not in the shards"
_BLOCK = 8192  # images whose boxes are checked together


def check_counts(
    findings: Findings, folder: Path, args: argparse.Namespace
) -> tuple[dict[str, manifest.Count], manifest.Odd]:
    """Files and bytes of each folder, compared with the manifest if there is one, and what was unusual among them."""
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
                findings.add_names(PROBLEM, split, what, [short], do)
            elif split:
                findings.add_names(PROBLEM, split, what, [short], IMAGE_KINDS[what][1])
                empty[split].append(short)
            else:
                findings.add_names(NOTE, split, what, [short], "outside of the image folders; is that meant?")
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


def check_annotations(findings: Findings, split: Split, args: argparse.Namespace) -> CocoIndex | None:
    """Open the annotation file and compare counts and classes; None where it cannot be used."""
    try:
        masks = segmentations.EDGES if args.masks else None
        index = CocoIndex.open(split.annotations, split.images, cache_dir=args.cache_dir, masks=masks)
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
        ("duplicate categories", "the first entry stays"),
        ("categories that share a name", "they are classes of their own, told apart by their ids; is that meant?"),
        ("names of another spelling", "the file that is there is taken; correct the names for other programs"),
        ("areas below 0", "evaluation ignores such boxes, as COCO's does; write width * height"),
        ("boxes under one pixel", "they train, though a resized image may hold nothing of them"),
        (segmentations.SHORT, "they enclose nothing; remove them"),
        (segmentations.OUTSIDE, "they train and are scored as empty masks: is the image the right one?"),
        (
            segmentations.BARE[segmentations.EDGES],
            "programs with masks do not train with them; give them a segmentation",
        ),
    ):
        shown = [f"annotation {one}" for one in index.named.get(what, [])]
        findings.add(NOTE, split.name, what, index.counts.get(what, 0), shown, do)
    check_signs(findings, split, index)
    return index


def check_signs(findings: Findings, split: Split, index: CocoIndex) -> None:
    """What all boxes together look like, and whether any is left to train with or to score."""
    told, name = index.signs, split.name
    for words in signs.suspicions(told):
        findings.add(PROBLEM, name, "boxes that are likely stored in another way", told["boxes"], [], words)
    layout = data_sets.ALL.get(split.layout)
    crowd = layout.crowd if layout else "drop"
    if crowd == "drop":
        do = "left out as crowd, as COCO has it; evaluation does not score them"
        findings.add(NOTE, name, "crowd boxes left out of training", told["crowd left out"], [], do)
    if name != "val" and not told["trained" if crowd == "keep" else "trained without crowd"]:
        do = "nothing would be learnt: see the counts of boxes here, and iscrowd in the file"
        findings.add(PROBLEM, name, "files without a box to train with", 1, [], do)
    if name == "val" and not told["scored"]:
        do = "no mAP can be computed: validation wants boxes that are no crowd, with an area of 0 or more"
        findings.add(PROBLEM, name, "files with nothing to score", 1, [], do)


def check_classes(findings: Findings, split: Split, index: CocoIndex) -> None:
    layout = data_sets.ALL.get(split.layout)
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
    if split.layout == "openimages-mlperf" and len(ids) == layout.classes:
        names = MLPERF_CLASSES.read_text(encoding="utf-8").splitlines()
        wrong = [f"{a} instead of {b}" for a, b in zip(index.category_names, names) if a != b]
        do = "the classes are not those of the benchmark, or in another order: convert again"
        findings.add(PROBLEM, split.name, "classes of another name than the benchmark's list", len(wrong), wrong, do)


def check_names(
    findings: Findings, split: str, index: CocoIndex, partial: bool, empty: Sequence[str] = ()
) -> tuple[int, np.ndarray]:
    """Files against the names that the annotation file lists: the number of image files in their folders, and bool [I]:
    the images that need no further check: they are missing, or named in `empty`, the empty files found before.

    Does nothing for shards but to compare names: their index knows what they hold. partial: fewer files are no problem.
    """
    names = range(len(index))
    level = NOTE if partial else PROBLEM
    do = "fetch them; training does not start while they are missing"
    if index.shards:
        rows = np.concatenate([index.shards.find([index.file_name(i) for i in b]) for b in blocks(len(index))])
        missing = (index.file_name(i) for i in np.flatnonzero(rows < 0).tolist())
        findings.add_names(level, split, NOT_PACKED, missing, "pack the data set again")
        return len(index.shards), rows < 0
    listed = np.concatenate([hash_names([index.file_name(i) for i in block]) for block in blocks(len(index))])
    folders = sorted({os.path.dirname(index.file_name(i)) for i in names})
    have = []
    for folder in folders:
        have += [hash_names(block) for block in _listing(index.image_dir, folder)]
    there = np.concatenate(have) if have else np.empty(0, np.uint64)
    absent = ~np.isin(listed, there)
    skip = absent | np.isin(listed, hash_names(list(empty))) if empty else absent
    missing = np.flatnonzero(absent)
    findings.add_names(level, split, MISSING, (index.file_name(i) for i in missing.tolist()), do)
    beside = {os.path.relpath(index.annotation_file, index.image_dir)}  # the JSON itself, where it lies with the images
    if np.isin(there, listed, invert=True).any():
        listed.sort()
        for folder in folders:
            for block in _listing(index.image_dir, folder):
                at = np.searchsorted(listed, hashes := hash_names(block)).clip(max=len(listed) - 1)
                extra = np.flatnonzero(listed[at] != hashes).tolist()
                do = "they are not used; remove them, or list them in the annotation file"
                found = (block[k] for k in extra if block[k] not in beside)
                findings.add_names(NOTE, split, "files that the annotation file does not list", found, do)
    return len(there), skip


def blocks(count: int, size: int = 65536) -> Iterator[range]:
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
    for block in blocks(len(index), _BLOCK):
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
