"""Turns the instances of Cityscapes' fine annotations into COCO files.

    public-scripts/cityscapes_to_coco.py DIR       DIR holds gtFine/ and leftImg8bit/, as Cityscapes' archives unpack

writes DIR/annotations/instancesonly_filtered_gtFine_<split>.json for train, val and test (whose published objects are
none) and, where there is none, the link DIR/images to leftImg8bit: what maskrcnn-benchmark calls
cityscapes_fine_instanceonly_seg_<split>_cocostyle. Check them with public-scripts/verify_dataset.py --annotations FILE
--images DIR/images.

The eight classes that have instances, 1 to 8. A group of objects that are not told apart becomes one of COCO's crowds:
it does not train and does not count against a detector.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from dataprep.interpreter import with_packages

if __name__ == "__main__":
    with_packages("dataprep.cityscapes", "numpy", "msgspec", "PIL", "pycocotools")

import numpy as np

from dataprep.coco_file import instance, label_image, write
from detcore import UserError
from detcore.cli import OK, run_main

CLASSES = {
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
"""Cityscapes' own number and the name, in the order of the categories 1 to 8."""

_END = "_gtFine_instanceIds.png"


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    truth = args.folder / "gtFine"
    splits = [split for split in ("train", "val", "test") if (truth / split).is_dir()]
    if not splits:
        raise UserError(f"{truth} has none of train, val and test; unpack gtFine_trainvaltest.zip in {args.folder}")
    for split in splits:
        files = sorted((truth / split).glob(f"*/*{_END}"))
        if not files:
            raise UserError(f"{truth / split} holds no file *{_END}; unpack gtFine_trainvaltest.zip in {args.folder}")
        with ProcessPoolExecutor(min(args.workers or len(os.sched_getaffinity(0)), len(files))) as pool:
            found = list(pool.map(objects_of, files, chunksize=8))
        images, objects = [], []
        for number, (path, (height, width, own)) in enumerate(zip(files, found, strict=True), 1):
            name = f"{split}/{path.parent.name}/{path.name.removesuffix(_END)}_leftImg8bit.png"
            images.append({"id": number, "file_name": name, "width": width, "height": height})
            objects += [{"image_id": number, **one} for one in own]
        output = args.folder / "annotations" / f"instancesonly_filtered_gtFine_{split}.json"
        print(write(output, f"Cityscapes, fine instances, {split}", [*CLASSES.values()], images, objects))
    if not os.path.lexists(args.folder / "images"):
        (args.folder / "images").symlink_to("leftImg8bit")
    return OK


def objects_of(path: Path) -> tuple[int, int, list[dict[str, Any]]]:
    """Height, width and COCO's entries of the objects of one *_instanceIds.png.

    Its values are the class times 1000 plus the object's number, or the class alone for a group. Raises UserError
    where it can't be read.
    """
    values = label_image(path)
    order, objects = [*CLASSES], []
    for value in np.unique(values).tolist():
        kind = value // 1000 or value
        if kind in CLASSES:
            crowd = int(value < 1000)
            objects.append({"category_id": order.index(kind) + 1, "iscrowd": crowd, **instance(values == value)})
    return *values.shape, objects


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cityscapes_to_coco.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="holds gtFine/ and leftImg8bit/")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: the number of processors")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
