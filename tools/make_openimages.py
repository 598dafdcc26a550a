"""Make a data set of any size that looks like OpenImages: its tables with the published columns, and JPEG files.

    python -m tools.make_openimages --out DIR --images 3000 [--boxes-per-image 12.5] [--splits train]

Layout: DIR/SPLIT/{data,labels/detections.csv,metadata/{classes,image_ids}.csv}, as fiftyone has it. Random
ids, boxes and classes (the 264 names of MLPerf and 337 others) from a seed. Of the images --headers (default 256) are
really made: baseline and progressive, grey, colour and CMYK, with and without EXIF (every orientation, both byte
orders, with a thumbnail), colour profiles and comments; the others are hard links to them, which verify_dataset.py
--full reports as files with the same bytes, in both splits. With --pixels 8 a file has a
realistic header and next to no pixels, which is what a million files take room for. Needs pyarrow.
"""

import argparse
import io
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

NAMES = Path(__file__).resolve().parents[1] / "dataprep" / "openimages_mlperf_classes.txt"
CLASSES = 601
BATCH = 20_000  # images whose rows exist at a time
FLAGS = {"IsOccluded": 0.6, "IsTruncated": 0.2, "IsGroupOf": 0.06, "IsDepiction": 0.05, "IsInside": 0.01}
CLICKS = tuple(f"XClick{number}{axis}" for axis in "XY" for number in range(1, 5))
LICENSE = "https://creativecommons.org/licenses/by/2.0/"


def class_rows() -> list[tuple[str, str]]:
    """(MID, name) of 601 classes sorted by name; the names of MLPerf's are the real ones, the MIDs are made up."""
    names = NAMES.read_text().splitlines()
    names += [f"Other thing {number}" for number in range(CLASSES - len(names))]
    return [(f"/m/0{number:05x}", name) for number, name in enumerate(sorted(names))]


def jpeg(seed: int, pixels: int) -> bytes:
    """One JPEG file; `seed` decides its kind of header, `pixels` its longer side."""
    rng = np.random.default_rng([seed, 1])
    mode = ("RGB", "RGB", "RGB", "L", "CMYK")[seed % 5] if seed % 4 == 0 else "RGB"
    short = max(1, int(pixels * rng.uniform(0.4, 1)))
    size = (pixels, short) if seed % 3 else (short, pixels)
    options: dict[str, Any] = {"quality": int(rng.integers(30, 96)), "progressive": seed % 7 == 0}
    if mode == "RGB" and seed % 2:
        options["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() * (1 + seed % 40)
    if seed % 3 == 1:
        options["exif"] = exif(seed % 10, "<>"[seed % 2], int(rng.integers(0, 20_000)))
    if seed % 11 == 0:
        options["comment"] = b"made by hand, " * 40
    image = Image.new(mode, size)
    image.putpixel((0, 0), tuple(rng.integers(0, 256, len(image.getbands())).tolist()) if mode != "L" else 7)
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def exif(orientation: int, order: str, thumbnail: int) -> bytes:
    """An EXIF segment; orientation 0: without that tag; `thumbnail` bytes of something behind the directory."""
    entries = [struct.pack(order + "HHI", 0x010F, 2, 4) + b"Cam\0"]
    if orientation:
        entries.append(struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0))
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8)
    return b"Exif\0\0" + head + struct.pack(order + "H", len(entries)) + b"".join(entries) + bytes(4 + thumbnail)


def box_table(rng: np.random.Generator, ids: np.ndarray, mean: float, mids: list[str]) -> Any:
    """The rows of the box table of some images [I], at least one each, on average `mean`, as a pyarrow table."""
    import pyarrow as pa

    of_image = np.repeat(ids, 1 + rng.poisson(mean - 1, len(ids)))
    n = len(of_image)
    sides = np.sort(rng.random((2, 2, n)), axis=1)  # axis, min and max, row
    sides = np.where(rng.random(n) < 0.5, sides.round(6), sides.round(9))  # the published tables have both
    drawn = rng.random(n) < 0.9
    columns = {
        "ImageID": of_image,
        "Source": np.where(drawn, "xclick", "activemil"),
        "LabelName": np.array(mids)[(rng.random(n) ** 2 * len(mids)).astype(int)],
        "Confidence": np.ones(n, np.int8),
        "XMin": sides[0, 0], "XMax": sides[0, 1], "YMin": sides[1, 0], "YMax": sides[1, 1],
        **{flag: np.where(drawn, rng.random(n) < chance, -1).astype(np.int8) for flag, chance in FLAGS.items()},
        **{click: np.where(drawn, rng.random(n).round(6), -1.0) for click in CLICKS},
    }  # fmt: skip
    return pa.table(columns)


def list_table(ids: np.ndarray, split: str) -> Any:
    """The rows of the image list."""
    import pyarrow as pa

    photo = [f"{int(i, 16) % 10**10}" for i in ids.tolist()]
    paths = [f"{p[:4]}/{p}_{i[:10]}" for p, i in zip(photo, ids)]
    return pa.table(
        {
            "ImageID": ids,
            "Subset": [split] * len(ids),
            "OriginalURL": [f"https://farm4.staticflickr.com/{path}_o.jpg" for path in paths],
            "OriginalLandingURL": [f"https://www.flickr.com/photos/someone/{p}" for p in photo],
            "License": [LICENSE] * len(ids),
            "AuthorProfileURL": ["https://www.flickr.com/people/someone/"] * len(ids),
            "Author": ["Jane Doe"] * len(ids),
            "Title": [f'A "nice" picture, {p}' for p in photo],
            "OriginalSize": [str(int(p) % 4_000_000) for p in photo],
            "OriginalMD5": [f"{i[:11]}==" for i in ids],
            "Thumbnail300KURL": [f"https://c1.staticflickr.com/5/{path}_z.jpg" for path in paths],
            "Rotation": ["0.0"] * len(ids),
        }
    )


def make(out: Path, split: str, images: int, mean: float, headers: int, pixels: int, seed: int) -> int:
    """Write one split; returns the number of rows in the box table."""
    from pyarrow import csv as pacsv

    rng = np.random.default_rng([seed, sum(split.encode())])
    for name in ("data", "labels", "metadata"):
        (out / split / name).mkdir(parents=True, exist_ok=True)
    classes = class_rows()
    (out / split / "metadata" / "classes.csv").write_text("".join(f"{mid},{name}\n" for mid, name in classes))
    listed = set(NAMES.read_text().splitlines())
    order = np.random.default_rng(seed).permutation(classes).tolist()
    # The first are the most frequent: most boxes are of MLPerf's classes, as in the original.
    mids = [mid for mid, _ in sorted(order, key=lambda row: row[1] not in listed)]
    made, rows = {}, 0
    tables = {}
    try:
        for begin in range(0, images, BATCH):
            # The leading digits grow from batch to batch, so that the whole is sorted, as the published tables are.
            span = 2**64 // images
            numbers = [(begin + i) * span + int(rng.integers(0, span)) for i in range(min(BATCH, images - begin))]
            ids = np.array([f"{number:016x}" for number in numbers])
            boxes = box_table(rng, ids, mean, mids)
            rows += len(boxes)
            for name, table in {
                "labels/detections.csv": boxes,
                "metadata/image_ids.csv": list_table(ids, split),
            }.items():
                if name not in tables:
                    quotes = "needed" if "image_ids" in name else "none"
                    options = pacsv.WriteOptions(quoting_style=quotes, quoting_header="none")
                    tables[name] = pacsv.CSVWriter(out / split / name, table.schema, write_options=options)
                tables[name].write_table(table)
            for i in ids.tolist():
                which = int(rng.integers(0, headers))
                path = out / split / "data" / f"{i}.jpg"
                if which in made:
                    os.link(made[which], path)
                else:
                    path.write_bytes(jpeg(which, pixels * 4 // (3 + which % 3)))
                    made[which] = path
    finally:
        for table in tables.values():
            table.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make it in")
    parser.add_argument("--images", type=int, required=True, metavar="N", help="of each split")
    parser.add_argument("--boxes-per-image", type=float, default=12.5, help="on average (%(default)s)")
    parser.add_argument("--splits", nargs="+", default=["train", "validation"], help="(train validation)")
    parser.add_argument("--headers", type=int, default=256, help="images that are really made (%(default)s)")
    parser.add_argument("--pixels", type=int, default=768, help="about the longer side of an image (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (%(default)s)")
    args = parser.parse_args()
    for split in args.splits:
        rows = make(args.out, split, args.images, args.boxes_per_image, args.headers, args.pixels, args.seed)
        print(f"{args.out / split}: {args.images:,} images, {rows:,} boxes")


if __name__ == "__main__":
    main()
