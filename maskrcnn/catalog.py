"""The original's names of data sets, and where their images and annotations are below one folder.

A name that the original does not know is a data set of the user's own, in the hierarchy that the original documents:
`my_dataset_train` has its images in my_dataset/images_train and its annotations in my_dataset/instances_train.json.
"""

import difflib
from pathlib import Path
from typing import NamedTuple

from detcore import UserError


class Place(NamedTuple):
    """Folder of the images and COCO-format JSON, both below the data's folder, and the command that makes the JSON."""

    images: str
    annotations: str
    command: str


def _coco(part: str, images: str, command: str) -> Place:
    return Place(images, f"annotations/instances_{part}.json", command)


def _places() -> dict[str, Place]:
    whole, minival = "public-scripts/download_coco{}.sh", "public-scripts/coco_minival.py"
    found = {f"coco_2017_{part}": _coco(f"{part}2017", f"{part}2017", whole.format(2017)) for part in ("train", "val")}
    found |= {f"coco_2014_{part}": _coco(f"{part}2014", f"{part}2014", whole.format(2014)) for part in ("train", "val")}
    found |= {f"coco_2014_{part}": _coco(f"{part}2014", "val2014", minival) for part in ("minival", "valminusminival")}
    for year in (2007, 2012):
        for part in ("train", "val", "test"):
            folder = f"VOC{year}"
            place = Place(
                f"{folder}/JPEGImages", f"{folder}/Annotations/pascal_{part}{year}.json",
                "public-scripts/voc_to_coco.py",
            )  # fmt: skip
            found |= dict.fromkeys((f"voc_{year}_{part}", f"voc_{year}_{part}_cocostyle"), place)
    for part in ("train", "val", "test"):
        annotations = f"annotations/instancesonly_filtered_gtFine_{part}.json"
        place = Place("images", annotations, "public-scripts/cityscapes_to_coco.py")
        found[f"cityscapes_fine_instanceonly_seg_{part}_cocostyle"] = place
    return found


PLACES = _places()
_FOLDERS = {"coco": "coco", "voc": "voc", "cityscapes": "cityscapes"}
"""Folder that the original's own catalog has between the root and a data set, by the beginning of the set's name."""


def is_coco(name: str) -> bool:
    """Whether a data set has COCO's categories."""
    return name in PLACES and name.startswith("coco_")


def find(name: str, root: Path) -> tuple[Path, Path]:
    """Annotation file and image folder of the data set `name`.

    root: the folder that holds them, as the original's /datasets (with data/ below) or its data/; of a data set of the
    user's own also the set's folder itself. Raises UserError for keypoints, which the program has not, and where the
    annotation file does not exist.
    """
    if name.startswith("keypoints_"):
        raise UserError(f"{name}: there is no keypoint head; coco_... has the boxes and masks of the same images")
    place = PLACES.get(name) or _own(name)
    roots = [root, root / "data"]
    if name in PLACES:
        roots += [above / _FOLDERS[name.partition("_")[0]] for above in roots]
    else:
        roots += [root.parent]
    for folder in roots:
        if (folder / place.annotations).is_file():
            return folder / place.annotations, folder / place.images
    looked = f"{name}: there is no {root / place.annotations}"
    if name in PLACES:
        raise UserError(f"{looked}; make it with {place.command}, or say with --dataset-path FOLDER where it is")
    near = difflib.get_close_matches(name, PLACES, 1, 0.8)
    raise UserError(
        f"{looked}, as a data set of your own has it, beside its images in {place.images}; "
        + (f"did you mean {near[0]}?" if near else "say with --dataset-path FOLDER where they are")
    )


def _own(name: str) -> Place:
    """Of a name such as my_dataset_train."""
    folder, _, part = name.rpartition("_")
    if not folder or not part or Path(name).name != name:
        raise UserError(
            f"data set {name!r} is unknown; names are {', '.join([*PLACES][:3])}, ... or FOLDER_PART, for "
            "FOLDER/instances_PART.json and FOLDER/images_PART"
        )
    return Place(f"{folder}/images_{part}", f"{folder}/instances_{part}.json", "")
