"""Reading images from shards against reading them from files: the bytes alone, in random order, warm and cold.

Files of random bytes (nothing is decoded here: tools.bench.loader has that). Cold: the kernel is asked to drop the
files from the page cache before each round. Every round reads the same images in the same order from both, alternately;
the numbers are medians of images per second. Also: the speed of packing.
Usage: python -m tools.bench.shards [--images 4000] [--size 309021] [--threads 1 8] [--rounds 3] [--folder DIR]
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dataprep import shard_writer
from detcore.data.coco import CocoIndex


def make(folder: Path, images: int, size: int) -> CocoIndex:
    """Files of `size` bytes on average, half of it to one and a half."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    content: dict[str, list] = {"images": [], "annotations": [], "categories": [{"id": 0, "name": "thing"}]}
    for number in range(images):
        (folder / "images" / f"{number:08}.jpg").write_bytes(rng.bytes(int(rng.uniform(0.5, 1.5) * size)))
        content["images"].append({"id": number, "file_name": f"{number:08}.jpg", "height": 768, "width": 1024})
    (folder / "annotations.json").write_text(json.dumps(content))
    return CocoIndex.open(folder / "annotations.json", folder / "images")


def rate(index: CocoIndex, order: np.ndarray, threads: int) -> float:
    """Images per second."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda block: [index.read(i) for i in block], np.array_split(order, 8 * threads)):
            pass
    return len(order) / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--size", type=int, default=309_021)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files are made; the default is the temporary folder")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from detcore.training.mlperf import drop_file_cache  # which imports torch

    with tempfile.TemporaryDirectory(prefix="bench_shards_", dir=args.folder) as name:
        folder = Path(name)
        files = make(folder, args.images, args.size)
        begin = time.perf_counter()
        made = shard_writer.pack(files, folder / "shards", shuffle=1)
        packing = made.bytes / (time.perf_counter() - begin) / 1e6
        packed = CocoIndex.open(folder / "annotations.json", folder / "shards")
        sources, results = {"files": files, "shards": packed}, {}
        for cold in (False, True):
            for threads in args.threads:
                rates: dict[str, list[float]] = {key: [] for key in sources}
                for number in range(args.rounds):
                    order = np.random.default_rng(number).permutation(args.images)
                    for key, index in sources.items():
                        if cold:
                            drop_file_cache([folder / "images", folder / "shards"])
                        rates[key].append(rate(index, order, threads))
                results[f"{'cold' if cold else 'warm'}, {threads} threads"] = {
                    key: statistics.median(values) for key, values in rates.items()
                }
    print(f"{made.images:,} images of {args.size / 1e3:,.0f} kB in {made.shards} shards; packed at {packing:,.0f} MB/s")
    print(f"{'':20}{'files/s':>10}{'shards/s':>10}{'ratio':>8}   on {os.cpu_count()} processors")
    for name, row in results.items():
        print(f"{name:20}{row['files']:10,.0f}{row['shards']:10,.0f}{row['shards'] / row['files']:8.2f}")
    if args.json:
        args.json.write_text(json.dumps({"packing_mb_s": packing, **results}, indent=1))


if __name__ == "__main__":
    main()
