"""Damaged annotation files: the index is refused, or it is what a plain reading of the same bytes gives.

The reading here shares nothing with the program: json.loads and the rules of the README's table. It exists in two
strengths. What the program accepts must be acceptable to the lenient one and equal to it; the lenient one overlooks
characters that JSON forbids in texts that nobody uses, and takes the last of two equal keys. What the program refuses
must be refused by the strict one.
"""

import copy
import json
import math
import random
from urllib.parse import unquote

import numpy as np
import pytest

from detcore import UserError
from detcore.data.coco import CocoIndex

BASE = {
    "info": {"year": 2024, "nested": [None, {"a": 1}]},
    "images": [
        {"id": 20, "file_name": "a.jpg", "height": 48, "width": 64, "license": None},
        {"id": 10, "file_name": "b.jpg", "height": 40, "width": 32},
    ],
    "annotations": [
        {"id": 1, "image_id": 20, "category_id": 3, "bbox": [1.5, 2.25, 10, 20], "area": 200.0, "iscrowd": 0,
         "segmentation": [[1, 2, 3]]},
        {"id": 2, "image_id": 20, "category_id": 9, "bbox": [30, 20, 8, 8], "area": None, "iscrowd": 1},
        {"id": 3, "image_id": 10, "category_id": 5, "bbox": [-3, 0, 100, 5]},
    ],
    "categories": [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}, {"id": 5, "name": "café"}],
}  # fmt: skip
VALUES = [
    None, True, False, 0, -1, 1, 2, 3, 5, 9, 10, 20, 1.0, 1.5, -0.0, 1e-320, 1e308, -1e308, float("nan"), float("inf"),
    2**31 - 1, 2**31, 2**53, 2**53 + 1, 10**18, 10**30, -(10**30), "", "1", "a.jpg", "../a.jpg", "/etc/passwd", "\0",
    "\ud800", "\u2028\n", "a" * 5000, [], {}, [1], [[]], [None], {"a": 1}, [1, 2, 3, 4], [1, 2, 3, 4, 5],
    [1, 2, -3, 4], [0, 0, 0, 0], [None] * 4, ["1"] * 4, [True] * 4, [1e308] * 4, [-5.5, 3, 1e6, 2], [1, 2, 3, 1e-50],
]  # fmt: skip


class Refused(Exception):
    """What the plain reading does not take."""


def integer(value, low, high) -> int:
    if type(value) is not int or not low <= value <= high:
        raise Refused(value)
    return value


def number(value) -> float:
    if type(value) not in (int, float) or abs(value) > 1.8e308 or not math.isfinite(value):
        raise Refused(value)
    return float(value)


def text(value) -> str:
    if type(value) is not str:
        raise Refused(value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Refused(value) from error
    return value


def listed(content, name) -> list[dict]:
    if type(content) is not dict or type(content.get(name)) is not list:
        raise Refused(name)
    if not all(type(entry) is dict for entry in content[name]):
        raise Refused(name)
    return content[name]


def forbid(name):
    raise Refused(name)


def once(pairs) -> dict:
    if len({key for key, _ in pairs}) != len(pairs):
        raise Refused("a key twice")
    return dict(pairs)


def read(data: bytes, folder, strict: bool) -> dict:
    """The file by the documented rules; Refused, or ValueError, where they are broken."""
    try:
        content = json.loads(
            data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "strict" if strict else "surrogateescape"),
            strict=strict,
            parse_constant=forbid,
            object_pairs_hook=once if strict else dict,
        )
        ident = (0, 2**53)
        images = {}
        for entry in listed(content, "images"):
            image = (text(entry["file_name"]), *(integer(entry[k], 1, 2**31 - 1) for k in ("height", "width")))
            if not image[0] or images.setdefault(integer(entry["id"], *ident), image) != image:
                raise Refused(entry)
        categories = sorted({(integer(e["id"], *ident), text(e["name"])) for e in listed(content, "categories")})
        ids = [i for i, _ in categories]
        boxes = []
        for entry in listed(content, "annotations"):
            integer(entry["id"], *ident)
            image, category = (integer(entry[k], *ident) for k in ("image_id", "category_id"))
            if type(entry["bbox"]) is not list or len(entry["bbox"]) != 4 or image not in images or category not in ids:
                raise Refused(entry)
            box = [number(v) for v in entry["bbox"]]
            area = entry.get("area")
            area = number(box[2] * box[3] if area is None else area)
            crowd = entry.get("iscrowd", 0)
            boxes.append((image, category, box, area, int(crowd) if type(crowd) is bool else integer(crowd, 0, 1)))
    except (KeyError, RecursionError, OverflowError) as error:
        raise Refused(str(error)) from error
    if not images or not ids or len(set(ids)) != len(ids):
        raise Refused("nothing listed, or a category twice")
    if not any(is_there(folder, name) for name, _, _ in images.values()):
        raise Refused("no image is there")
    return {"images": images, "categories": categories, "boxes": boxes}


def is_there(folder, name: str) -> bool:
    """Whether a name means a file: the one of that name, or one that is spelled in other letter case or by slashes."""
    if "\0" in name or len(name) >= 255:
        return False
    return (folder / name).exists() or unquote(name).replace("\\", "/").strip("/").casefold() in ("a.jpg", "b.jpg")


def agree(index: CocoIndex, truth: dict) -> None:
    """The index holds what the plain reading found, in evaluation's view and in training's."""
    images, boxes = truth["images"], truth["boxes"]
    assert index.image_ids.tolist() == list(images)
    sizes = [(int(height), int(width)) for height, width in zip(index.heights, index.widths, strict=True)]
    assert sizes == [entry[1:] for entry in images.values()]
    for i, (name, _, _) in enumerate(images.values()):
        assert index.file_name(i) == name or (
            not (index.image_dir / name).exists() and (index.image_dir / index.file_name(i)).is_file()
        )
    assert list(zip(index.category_ids.tolist(), index.category_names, strict=True)) == truth["categories"]
    found = index.ground_truth()
    columns = (found.ann_image_id, found.ann_category_id, found.bbox, found.area, found.iscrowd)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == boxes
    position = {category: k for k, (category, _) in enumerate(truth["categories"])}
    for i, (image, (_, height, width)) in enumerate(images.items()):
        kept = []
        for _, category, (x, y, w, h), _, crowd in (box for box in boxes if box[0] == image):
            x1, x2 = (np.float32(min(max(v, 0.0), width)) for v in (x, x + w))
            y1, y2 = (np.float32(min(max(v, 0.0), height)) for v in (y, y + h))
            if w > 0 and h > 0 and x2 > x1 and y2 > y1:
                kept.append(([x1, y1, x2, y2], position[category], bool(crowd)))
        corners, labels, crowds = index.boxes(i)
        assert list(zip(corners.tolist(), labels.tolist(), crowds.tolist(), strict=True)) == kept
    assert index.counts["images"] == len(images) and index.counts["annotations"] == len(boxes)


def places(value, at=()):
    """The way to every value inside a nested one."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*at, key)
        yield from places(inner, (*at, key))


def structural(rng: random.Random) -> bytes:
    content = copy.deepcopy(BASE)
    for _ in range(rng.choice([1, 1, 1, 2])):
        where = rng.choice(list(places(content)) or [None])
        if where is None:
            break
        parent = content
        for key in where[:-1]:
            parent = parent[key]
        key, kind = where[-1], rng.randrange(6)
        if kind == 0:
            del parent[key]
        elif kind <= 2:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 3 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        elif kind == 4 and isinstance(parent, dict):
            parent[f"{key}{rng.choice(['_', ' ', 's'])}"] = parent.pop(key)
        else:
            other = content
            for step in rng.choice(list(places(content))):
                other = other[step]
            parent[key] = copy.deepcopy(other)
    return json.dumps(content, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def bytewise(rng: random.Random) -> bytes:
    data = bytearray(json.dumps(BASE, ensure_ascii=False).encode())
    for _ in range(rng.randint(1, 3)):
        at, kind = rng.randrange(len(data)), rng.randrange(5)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice(b'0123456789.-+eE"\\{}[],:nulltrueNaI\xff\0\x80 ')
        elif kind == 2:
            del data[at : at + rng.randint(1, 30)]
        elif kind == 3:
            data[at:at] = data[at : at + rng.randint(1, 30)]
        else:
            del data[at:]
    return bytes(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("annotations")
    (folder / "images").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (folder / "images" / name).touch()
    return folder


def judge(data: bytes, folder) -> bool:
    """Whether the file is accepted; asserts that the program's answer is right either way."""
    file = folder / "annotations.json"
    file.write_bytes(data)
    try:
        index = CocoIndex.open(file, folder / "images")
    except UserError as error:
        assert str(folder) in str(error) and "Traceback" not in str(error) and len(str(error)) < 11_000
        with pytest.raises((Refused, ValueError)):
            read(data, folder / "images", strict=True)
        return False
    agree(index, read(data, folder / "images", strict=False))
    index.summary()
    return True


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mutate", [structural, bytewise])
@pytest.mark.parametrize("seed", range(5))
def test_the_answer_is_that_of_a_plain_reading(folder, monkeypatch, mutate, seed):
    monkeypatch.setattr("os.fsync", lambda handle: None)  # thousands of caches, none of which has to last
    rng = random.Random(seed)
    accepted = 0
    for case in range(300):
        data = mutate(rng)
        try:
            accepted += judge(data, folder)
        except (Exception, pytest.fail.Exception) as error:
            pytest.fail(f"case {case}: {type(error).__name__}: {error}\n{data!r}")
    assert 0 < accepted < 290, "the mutations are too weak or too strong to test anything"


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.decode().encode("utf-16"),
        lambda data: data.decode().encode("utf-32-le"),
        lambda data: data.decode().encode("latin-1"),
        lambda data: data + data,
        lambda data: b"[" + data + b"]",
        lambda data: b"\n\t " + data + b"\r\n",
        lambda data: data.replace(b"{", b"{ \n"),
        lambda data: data.replace(b'"images"', b'"images": [], "images"', 1),
        lambda data: b"",
        lambda data: b"\0" * 4096,
        lambda data: b"null",
        lambda data: b"[" * 200_000,
        lambda data: b'{"images":' * 50_000,
    ],
)
def test_other_encodings_and_files(folder, change):
    judge(change(json.dumps(BASE, ensure_ascii=False).encode()), folder)
