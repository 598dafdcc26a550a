"""The data sets that verify and pack know: where they keep their parts, and what was published of them.

The layouts are those of `detcore.data.layouts`, which training uses, and COCO 2014 besides.
"""

from pathlib import Path
from typing import NamedTuple

from detcore import UserError
from detcore.data.layouts import LAYOUTS, Layout

MLPERF_CLASSES = Path(__file__).with_name("openimages_mlperf_classes.txt")  # one name a line, in the order of their ids

ALL = LAYOUTS | {
    "coco2014": Layout(
        "train2014", "annotations/instances_train2014.json",
        "val2014", "annotations/instances_val2014.json", 80, False, "drop",
    ),
}  # fmt: skip


def counted(count: int, word: str) -> str:
    return f"{count:,} {word}{'s' * (count != 1)}"


class Published(NamedTuple):
    """What the makers of a split say that it holds; None where they say nothing."""

    images: int
    image_bytes: int | None = None
    annotations: int | None = None


PUBLISHED = {
    ("openimages-mlperf", "train"): Published(1_170_301, 361_647_688_260),
    ("openimages-mlperf", "val"): Published(24_781, 7_574_074_865),
    ("openimages", "train"): Published(1_743_042),
    ("openimages", "val"): Published(41_620),
    ("coco", "train"): Published(118_287, None, 860_001),
    ("coco", "val"): Published(5_000, None, 36_781),
    ("waymo", "train"): Published(790_405),
    ("waymo", "val"): Published(199_935),
    ("coco2014", "train"): Published(82_783, None, 604_907),
    ("coco2014", "val"): Published(40_504, None, 291_875),
}


class Split(NamedTuple):
    """One annotation file and its images. layout: a name of ALL, "" for a pair that was named by its paths."""

    name: str
    layout: str
    annotations: Path
    images: Path

    @property
    def published(self) -> Published | None:
        return PUBLISHED.get((self.layout, self.name))


def splits_of(folder: Path, layout: str, split: str) -> list[Split]:
    """The splits of a data set below `folder`. layout "auto" takes the one whose parts are there.

    A split counts as there if its annotation file or its image folder is; naming it asks for it in any case. Raises
    UserError where no layout fits, or several do.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: {'is not a folder' if folder.exists() else 'no such folder'}; check the path")
    names = ("train", "val") if split == "all" else (split,)
    found: dict[str, list[Split]] = {}
    for name in ALL if layout == "auto" else (layout,):
        here = [
            Split(s, name, folder / getattr(ALL[name], f"{s}_annotations"), folder / getattr(ALL[name], f"{s}_images"))
            for s in names
        ]
        wanted = layout != "auto" and split != "all"
        here = [s for s in here if s.annotations.exists() or (layout != "auto" and s.images.exists()) or wanted]
        if here:
            found[name] = here
    if not found:
        known = "; ".join(f"{name}: {parts.train_annotations}" for name, parts in ALL.items())
        raise UserError(
            f"{folder}: holds no annotation file of a layout that is known here ({known}); check the path, or name the "
            "parts with --annotations FILE --images FOLDER"
        )
    if len(found) > 1:
        raise UserError(f"{folder}: holds several data sets ({', '.join(found)}); choose one with --layout")
    return next(iter(found.values()))


def add_arguments(parser) -> None:
    """The options that say which data set is meant."""
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="the data set, in one of the layouts")
    parser.add_argument("--layout", choices=("auto", *ALL), default="auto", help="(%(default)s: by what is there)")
    parser.add_argument("--split", choices=("train", "val", "all"), default="all")
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="instead of DIR: one annotation file ...")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="... and its images")


def splits_from(args) -> list[Split]:
    """The splits that the command line means. UserError for a contradictory one."""
    if (args.annotations is None) != (args.images is None):
        raise UserError("--annotations and --images belong together: name both, or neither")
    if args.annotations:
        return [Split(args.split if args.split != "all" else args.annotations.stem, "", args.annotations, args.images)]
    if args.folder is None:
        raise UserError("say which data set: DIR, or --annotations FILE --images FOLDER")
    return splits_of(args.folder, args.layout, args.split)
