"""Where the data sets and weights are published, how large they are, and which images of OpenImages a benchmark needs.

Sizes and md5 of OpenImages' files are those of the MLPerf subset's published directory (its files are the bucket's,
renamed); those of COCO have been the same since 2014 and 2017 and are repeated by many projects, torchvision's hashes
stand in its file names.
"""

import csv
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from dataprep.download_fetch import Item
from detcore import UserError
from detcore.nn import detectron

OPENIMAGES_METADATA = "https://storage.googleapis.com/openimages"
OPENIMAGES_IMAGES = "https://open-images-dataset.s3.amazonaws.com"  # the bucket of the Common Visual Data Foundation
# The bucket's own domain, images.cocodataset.org, has no certificate that fits; this address of it has.
COCO = "https://s3.amazonaws.com/images.cocodataset.org"
BACKBONES = "https://download.pytorch.org/models"

# (name below metadata or labels, path at the server, bytes); the names are those that fiftyone gives them.
_BOTH = (
    ("metadata/classes.csv", "v5/class-descriptions-boxable.csv", 12_011),
    ("metadata/hierarchy.json", "2018_04/bbox_labels_600_hierarchy.json", 24_252),
)
METADATA = {
    "train": (
        *_BOTH,
        ("metadata/image_ids.csv", "2018_04/train/train-images-boxable-with-rotation.csv", 638_407_721),
        ("labels/detections.csv", "v6/oidv6-train-annotations-bbox.csv", 2_258_447_590),
    ),
    "validation": (
        *_BOTH,
        ("metadata/image_ids.csv", "2018_04/validation/validation-images-with-rotation.csv", 15_245_485),
        ("labels/detections.csv", "v5/validation-annotations-bbox.csv", 25_105_048),
    ),
}
MEAN_IMAGE = 309_021  # bytes of a training image of the MLPerf subset


@dataclass(frozen=True)
class Archive:
    """A zip of COCO: what it unpacks to, and with how many files a folder of it is whole."""

    path: str
    size: int
    md5: str
    folder: str
    files: tuple[str, ...] | int

    def complete(self, target: Path, strict: bool) -> bool:
        """Whether it is unpacked in `target` already. Not strict: any files will do, of a smaller copy for example."""
        folder = target / self.folder
        if isinstance(self.files, int):
            found = sum(1 for path in folder.iterdir() if path.suffix == ".jpg") if folder.is_dir() else 0
            return found == self.files if strict else found > 0
        return all((folder / name).is_file() for name in self.files)


def coco_archives(year: int) -> tuple[Archive, Archive, Archive]:
    """Validation images, annotations and training images of 2014 or 2017, the small ones first."""
    val, notes, train = {
        2017: (
            (815_585_330, "442b8da7639aecaf257c1dceb8ba8c80", 5_000),
            (252_907_541, "f4bbac642086de4f52a3fdda2de5fa2c"),
            (19_336_861_798, "cced6f7f71b7629ddf16f17bbcfab6b2", 118_287),
        ),
        2014: (
            (6_645_013_297, "a3d79f5ed8d289b7a7554ce06a5782b3", 40_504),
            (252_872_794, "0a379cfc70b0e71301e0f377548639bd"),
            (13_510_573_713, "0da8c0bd3d6becc4dcb32757491aca88", 82_783),
        ),
    }[year]
    wanted = tuple(f"instances_{part}{year}.json" for part in ("train", "val"))
    return (
        Archive(f"annotations/annotations_trainval{year}.zip", *notes, "annotations", wanted),
        Archive(f"zips/val{year}.zip", val[0], val[1], f"val{year}", val[2]),
        Archive(f"zips/train{year}.zip", train[0], train[1], f"train{year}", train[2]),
    )


WEIGHTS = {
    "resnet18": "resnet18-f37072fd.pth",
    "resnet34": "resnet34-b627a593.pth",
    "resnet50": "resnet50-0676ba61.pth",
    "resnet101": "resnet101-63fe2227.pth",
    "resnet152": "resnet152-394f9c45.pth",
    "resnext50_32x4d": "resnext50_32x4d-7cdf4587.pth",
    "resnext101_32x8d": "resnext101_32x8d-8ba56ff5.pth",
}
# The benchmark's own weights have a published SHA-512 too.
_SHA512 = {
    "resnext50_32x4d-7cdf4587.pth": "15c9f0bc1c8d64750712f86ffaded3b0bc6a87e77a395dcda3013d8af65b7ebf"
    "3ca1c24dd3aae60c0d83e510b4d27731f0526b6f9392c0a85ffc18e5fecd8a13",
}


def weights_item(name: str, server: str, folder: Path) -> Item:
    """A backbone by name, any file of that server whose name ends in its hash, or weights of Detectron's catalog.

    name: of the catalog as in MODEL.WEIGHT, with or without catalog:// and ImageNetPretrained/; these come from their
    own server where `server` is that of the backbones. Raises UserError for other names.
    """
    known = name.removeprefix("catalog://")
    published = detectron.CATALOG.get(known) or detectron.CATALOG.get(f"ImageNetPretrained/{known}")
    if published:
        place = detectron.SERVER if server == BACKBONES else server
        hashes = (("md5", published.md5),) if published.md5 else ()
        return Item(f"{place}/{published.path}", folder / published.file, None, hashes)
    file = WEIGHTS.get(name, name)
    found = re.fullmatch(r"[A-Za-z0-9_.]+-([0-9a-f]{8,64})\.pth", file)
    if not found:
        raise UserError(f"unknown backbone {name!r}; choose from: {', '.join([*WEIGHTS, *detectron.CATALOG])}, all")
    hashes = (("sha256", found[1]), *((("sha512", _SHA512[file]),) if file in _SHA512 else ()))
    return Item(f"{server}/{file}", folder / file, None, hashes)


def class_mids(descriptions: Path, names: Collection[str]) -> set[str]:
    """The identifiers (MID, such as /m/011k07) of classes given by name or MID. Raises UserError for unknown ones."""
    with open(descriptions, newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if len(row) >= 2]
    mids = {name: mid for mid, name in (row[:2] for row in rows)}
    mids |= {mid: mid for mid in mids.values()}
    unknown = [name for name in names if name not in mids]
    if unknown:
        raise UserError(f"{descriptions} knows no class {', '.join(map(repr, unknown[:5]))}; correct the class list")
    return {mids[name] for name in names}


def image_ids(boxes: Path, mids: set[str] | None) -> list[str]:
    """The ids of images with at least one box of the classes `mids` (None: of any), sorted: 16 hex digits each.

    Streams the CSV of the boxes; memory grows with the images that are kept. Raises UserError with file and line.
    """
    wanted = None if mids is None else {mid.encode() for mid in mids}
    found: set[int] = set()
    last, number = b"", 1
    with open(boxes, "rb") as file:
        header = _fields(file.readline().removeprefix(b"\xef\xbb\xbf"), -1)
        if not {b"ImageID", b"LabelName"} <= set(header):
            raise UserError(f"{boxes} has no columns ImageID and LabelName in its first line; fetch it again")
        id_column, label_column = header.index(b"ImageID"), header.index(b"LabelName")
        splits = max(id_column, label_column) + 1
        try:
            for line in file:
                number += 1
                fields = _fields(line, splits)
                if fields == [b""]:
                    continue
                if (wanted is None or fields[label_column] in wanted) and fields[id_column] != last:
                    last = fields[id_column]
                    if re.fullmatch(rb"[0-9A-Fa-f]{16}", last):  # the conversion leaves other rows out as well
                        found.add(int(last, 16))
        except (ValueError, IndexError) as error:
            raise UserError(f"{boxes}, line {number}: too few fields ({error}); fetch it again") from error
    return [f"{number:016x}" for number in sorted(found)]


def _fields(line: bytes, splits: int) -> list[bytes]:
    """The first fields of a CSV line. Boxes have no quotes, so that plain splitting is safe, and faster than csv."""
    if b'"' in line:
        return [field.encode() for field in next(csv.reader([line.decode()]))]
    return line.rstrip(b"\r\n").split(b",", splits)
