"""Makes the two parts of COCO 2014's validation set that Detectron and maskrcnn-benchmark train and evaluate with.

    public-scripts/coco_minival.py DIR

reads DIR/annotations/instances_val2014.json and writes beside it instances_minival2014.json (5,000 images) and
instances_valminusminival2014.json (35,504). The 5,000 are those of COCO 2017's validation set, whose file
instances_val2017.json says which they are; --ids FILE takes any COCO file, or a list of image ids, one a line, instead.
"""

import argparse
import sys
from pathlib import Path

from dataprep.interpreter import with_packages

if __name__ == "__main__":
    with_packages("dataprep.coco_minival", "numpy", "msgspec")

import msgspec

from dataprep.coco_file import save
from detcore import UserError
from detcore.cli import OK, run_main


class _Id(msgspec.Struct):
    id: int


class _OfImage(msgspec.Struct):
    image_id: int


class _File(msgspec.Struct):
    images: list[msgspec.Raw]
    annotations: list[msgspec.Raw]


class _Ids(msgspec.Struct):
    images: list[_Id]


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    folder = args.folder / "annotations"
    source = folder / "instances_val2014.json"
    chosen = image_ids(args.ids or folder / "instances_val2017.json")
    content, file = _read(source, msgspec.json.Decoder(_File))
    rest = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    ids = [msgspec.json.decode(image, type=_Id).id for image in file.images]
    unknown = chosen - {*ids}
    if unknown:
        raise UserError(
            f"{source} has no image {min(unknown)}, nor {len(unknown) - 1:,} others that were chosen; give the ids of "
            "images of COCO 2014's validation set"
        )
    of = [msgspec.json.decode(one, type=_OfImage).image_id for one in file.annotations]
    for part, inside in (("minival", True), ("valminusminival", False)):
        images = [image for image, id_ in zip(file.images, ids, strict=True) if (id_ in chosen) == inside]
        annotations = [one for one, id_ in zip(file.annotations, of, strict=True) if (id_ in chosen) == inside]
        path = folder / f"instances_{part}2014.json"
        save(path, msgspec.json.encode({**rest, "images": images, "annotations": annotations}))
        print(f"{path}: {len(images):,} images, {len(annotations):,} annotations")
    return OK


def image_ids(path: Path) -> set[int]:
    """The image ids in a COCO file, or in a file with one a line. Raises UserError for what is neither."""
    if path.suffix == ".json":
        return {image.id for image in _read(path, msgspec.json.Decoder(_Ids))[1].images}
    try:
        words = path.read_text(encoding="utf-8").split()
        return {int(word) for word in words}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as a list of image ids ({error}); one a line") from error


def _read(path: Path, decoder: msgspec.json.Decoder):
    try:
        content = path.read_bytes()
        return content, decoder.decode(content)
    except OSError as error:
        raise UserError(
            f"{path} can't be read ({error.strerror}); fetch it with public-scripts/download_coco2014.sh or "
            "download_coco2017.sh, which need only annotations_trainval for this"
        ) from error
    except msgspec.MsgspecError as error:
        raise UserError(f"{path} is no COCO file: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="coco_minival.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the data set, with annotations/")
    text = "which images are minival; default: those of DIR/annotations/instances_val2017.json"
    parser.add_argument("--ids", type=Path, metavar="FILE", help=text)
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
