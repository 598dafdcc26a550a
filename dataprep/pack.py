"""Packs the images of a data set into large tar files, which a shared file system reads better than a million files.

    public-scripts/pack_dataset.py DIR OUT [--split train|val|all] [--shard-size 1G] [--shuffle SEED]
    public-scripts/pack_dataset.py OUT --check                     read every shard again and compare with the index
    public-scripts/pack_dataset.py --annotations FILE --images FOLDER --split train OUT

OUT/train and OUT/val receive 00000.tar, 00001.tar, ... with their indexes. Training reads them with `--shards OUT` and
gets the same batches as from the files; the annotation files stay where they are. Interrupted, the same command goes on
with the first shard that is missing; a shard that was removed is written again.

What it is good for, and what not, says detcore/data/shards.py. Exit codes: 0 done, 2 an error in one line.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

from dataprep.interpreter import with_packages

if __name__ == "__main__":
    with_packages("dataprep.pack", "numpy", "msgspec")

from dataprep import data_sets, shard_writer
from dataprep.data_sets import counted
from detcore import UserError
from detcore.cli import OK, run_main
from detcore.data import shards
from detcore.data.coco import CocoIndex
from detcore.training.progress import Meter, duration


def size(text: str) -> int:
    """Bytes: 500M, 1G, 1.5G or a plain number, decimal units."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMGT]?)B?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 500M or 1G")
    count = int(float(match[1]) * 1000 ** "_kMGT".index(match[2] or "_"))
    if not 10_240 <= count < 2**53:
        raise argparse.ArgumentTypeError(f"{text!r}: a shard holds 10 kB at least")
    return count


def pack_split(split: data_sets.Split, out: Path, args: argparse.Namespace) -> None:
    index = CocoIndex.open(split.annotations, split.images, cache_dir=args.cache_dir)
    meter = Meter(f"packing {split.name}", len(index))

    def done(images: int, length: int, new: bool) -> None:
        meter.add(images, length) if new else meter.skip(images)

    begin = time.perf_counter()
    threads = args.threads or 4 * len(os.sched_getaffinity(0))
    made = shard_writer.pack(
        index, out, shard_bytes=args.shard_size, shuffle=args.shuffle, threads=threads, force=args.force, done=done
    )
    if made.written:
        meter.close()
    seconds = time.perf_counter() - begin
    rate = f", {meter.bytes / seconds / 1e6:,.0f} MB/s read, written and read back" if made.written else ""
    print(f"{out}: {counted(made.images, 'image')} in {counted(made.shards, 'shard')}, {made.bytes:,} bytes")
    print(f"  written now: {counted(made.written, 'shard')} in {duration(seconds)}{rate}")
    print(f"  content {made.content_hash[:16]} (the same for the same images on any machine)")


def check_folder(folder: Path) -> None:
    """Read every shard below a folder again. UserError for the first that differs."""
    found = [part for part in (folder, folder / "train", folder / "val") if part.is_dir() and shards.open_folder(part)]
    if not found:
        raise UserError(f"{folder}: holds no shards, nor do its folders train and val; check the path")
    for part in found:
        opened = shards.open_folder(part)
        meter = Meter(f"checking {part.name}", len(opened))
        shard_writer.check(opened, lambda images, length, new, meter=meter: meter.add(images, length))
        meter.close()
        print(f"{part}: {len(opened):,} images in {len(opened.names):,} shards are as they were packed")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="pack_dataset.py", usage=argparse.SUPPRESS,
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    data_sets.add_arguments(parser)
    add = parser.add_argument
    add("out", nargs="?", type=Path, metavar="OUT", help="where the shards go")
    add("--shard-size", type=size, default=10**9, metavar="SIZE", help="of one tar file at most (1G)")
    add("--shuffle", type=int, metavar="SEED", help="pack in a random order; without: in that of the annotation file")
    add("--threads", type=int, default=0, metavar="N", help="readers; 0: four for each processor")
    add("--cache-dir", type=Path, metavar="FOLDER", help="of the annotation index; without: beside the annotation file")
    add("--force", action="store_true", help="replace a packing of other images, size or order in OUT")
    add("--check", action="store_true", help="only read what is packed in OUT, whole, and compare")
    args = parser.parse_args(argv)
    if args.threads < 0 or (args.shuffle is not None and args.shuffle < 0):
        parser.error("--threads and --shuffle are not negative")
    if args.out is None and (args.check or args.annotations):  # one path: it is OUT
        args.folder, args.out = None, args.folder
    if args.out is None:
        parser.error("say where the shards go: OUT")
    if args.check:
        check_folder(args.out)
        return OK
    splits = data_sets.splits_from(args)
    if args.annotations and args.split == "all":
        parser.error("--annotations: say with --split which split it is; training looks for OUT/train and OUT/val")
    for split in splits:
        pack_split(split, args.out / split.name, args)
    print(f"train with --shards {args.out}")
    return OK


if __name__ == "__main__":
    sys.exit(run_main(main))
