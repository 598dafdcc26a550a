"""Turns Pascal VOC's XML files into COCO files, with masks where VOC has them.

    public-scripts/voc_to_coco.py DIR              DIR holds VOC2007/ or VOC2012/ (as VOCdevkit does), or both
    public-scripts/voc_to_coco.py DIR --masks      the images of ImageSets/Segmentation, with the masks of
                                                   SegmentationObject; otherwise those of ImageSets/Main, whose masks
                                                   are their boxes: for detectors of boxes

writes DIR/VOC<year>/Annotations/pascal_<split><year>.json for train, val and test, where VOC has published them: the
names of maskrcnn-benchmark's data sets voc_<year>_<split>_cocostyle. Check them with public-scripts/verify_dataset.py
--annotations FILE --images DIR/VOC<year>/JPEGImages.

Objects that VOC calls difficult become COCO's crowds: they neither train nor count against a detector. Boxes, whose
pixels VOC counts from 1, the last one included, are in COCO's coordinates.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from dataprep.interpreter import with_packages

if __name__ == "__main__":
    with_packages("dataprep.voc", "numpy", "msgspec", "PIL", "pycocotools")

from dataprep.coco_file import instance, label_image, rectangle, write
from detcore import UserError
from detcore.cli import OK, run_main

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
SPLITS = ("train", "val", "test")


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    inside = args.folder / "VOCdevkit"
    folder = inside if inside.is_dir() else args.folder
    years = [path for path in (folder / "VOC2007", folder / "VOC2012") if path.is_dir()]
    if not years:
        raise UserError(f"{args.folder} holds neither VOC2007 nor VOC2012; unpack VOCtrainval and VOCtest there")
    for year in years:
        lists = year / "ImageSets" / ("Segmentation" if args.masks else "Main")
        found = [split for split in SPLITS if (lists / f"{split}.txt").is_file()]
        if not found:
            raise UserError(f"{lists} has none of train.txt, val.txt and test.txt; unpack VOCtrainval there")
        for split in found:
            print(_convert(year, lists / f"{split}.txt", split, args.masks))
    return OK


def _convert(folder: Path, listed: Path, split: str, masks: bool) -> str:
    """One split; returns what to print."""
    images, objects = [], []
    output = folder / "Annotations" / f"pascal_{split}{folder.name.removeprefix('VOC')}.json"
    description = f"Pascal VOC {folder.name}, {split} of ImageSets/{listed.parent.name}"
    if output.exists() and (known := _description(output)) != description:
        raise UserError(
            f"{output} holds {known or 'something else'}, not {description}; move it away, or convert a folder of "
            "its own (links to VOC's folders will do)"
        )
    try:
        names = listed.read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise UserError(f"{listed} can't be read as VOC's list of images ({error}); unpack it again") from error
    for number, name in zip(_numbers(names), names, strict=True):
        if split == "test" and not (folder / "Annotations" / f"{name}.xml").exists():
            return f"{output}: not written, for VOC has not published the objects of {name}"
        image, found = read(folder, name, number, masks)
        images.append(image)
        objects += found
    return write(output, description, CLASSES, images, objects)


def _numbers(names: list[str]) -> list[int]:
    """COCO's ids of images: their names' digits, as VOC's own have them (2007_000027); otherwise 1, 2, ..."""
    plain = [name.replace("_", "") for name in names]
    if all(name.isascii() and name.isdecimal() for name in plain) and len({*map(int, plain)}) == len(names):
        return [int(name) for name in plain]
    return list(range(1, len(names) + 1))


def _description(path: Path) -> str:
    """Of a COCO file; empty where it has none, or is no such file."""
    try:
        return str(json.loads(path.read_bytes())["info"]["description"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def read(folder: Path, name: str, number: int, masks: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """COCO's entries of an image, whose id is `number`, and of its objects.

    Raises UserError that names the file and what is wrong in it.
    """
    path = folder / "Annotations" / f"{name}.xml"
    try:
        root = ElementTree.parse(path).getroot()
        width, height = (int(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{path} can't be read as VOC's XML ({error}); unpack it again") from error
    image = {"id": number, "file_name": f"{name}.jpg", "width": width, "height": height}
    shapes = _masks(folder, name, (height, width)) if masks else {}
    objects = []
    for i, one in enumerate(root.findall("object"), 1):
        kind = one.findtext("name", "")
        if kind not in CLASSES:
            raise UserError(f"{path}: object {i} is a {kind!r}, which is no class of VOC")
        if not masks:
            shape = rectangle(*_box(path, one))
        elif i in shapes:
            shape = shapes[i]
        else:  # an object without a pixel
            continue
        crowd = int(one.findtext("difficult", "0").strip() == "1")
        objects.append({"image_id": number, "category_id": CLASSES.index(kind) + 1, "iscrowd": crowd, **shape})
    return image, objects


def _box(path: Path, one: ElementTree.Element) -> tuple[float, float, float, float]:
    """Left, top, width and height."""
    try:
        left, top, right, bottom = (float(one.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError as error:
        raise UserError(f"{path}: a bndbox lacks a number ({error})") from error
    return left - 1, top - 1, right - left + 1, bottom - top + 1


def _masks(folder: Path, name: str, size: tuple[int, int]) -> dict[int, dict[str, Any]]:
    """Masks of the objects that have pixels, by their number in the XML file, from 1; 255 is nobody's."""
    path = folder / "SegmentationObject" / f"{name}.png"
    values = label_image(path)
    if values.shape != size:
        raise UserError(f"{path} has {values.shape[1]} x {values.shape[0]} pixels, its XML says {size[1]} x {size[0]}")
    return {int(i): instance(values == i) for i in sorted({*values.ravel().tolist()} - {0, 255})}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="voc_to_coco.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="holds VOC2007/, VOC2012/ or VOCdevkit/")
    parser.add_argument("--masks", action="store_true", help="the images that have masks, with them")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
