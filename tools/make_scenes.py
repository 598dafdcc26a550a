"""Render the demo's data set: generated scenes of simple shapes, as JPEG images and COCO-format JSON.

    python -m tools.make_scenes --out build/demo-data

Layout: OUT/train/*.jpg, OUT/val/*.jpg, OUT/annotations/instances_train.json and instances_val.json.

Coordinates are COCO's: pixels, x to the right, y down, (0, 0) the outer corner of the top left pixel. A polygon is
the outline of the whole shape (also where another covers it) clipped to the image, `bbox` its bounds, `area` its area.

The same seed gives the same JSON, byte for byte, and the same pixels before JPEG coding on every machine: random
numbers come from numpy's frozen RandomState, outlines are rounded to 1/100 pixel before anything is derived from them,
and pixels use only integers and the exactly rounded operations + - * /, never a library's sin or exp.
"""

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

CLASSES = ("circle", "cross", "ring", "square", "star", "triangle")
SPLITS = ("train", "val")
MIN_VISIBLE = 0.35  # part of a shape that must be seen, by the image's border and by other shapes, for it to stay
SUPERSAMPLE = 4  # samples a pixel and axis when a polygon is drawn
FAVOURITES = ((220, 60, 50), (60, 170, 70), (70, 90, 220), (230, 180, 40), (180, 70, 190), (60, 190, 200))
NEAR = 60  # smallest distance, in 0..255 of one channel, between a shape's colour and what it lies on


class Item(NamedTuple):
    """One thing to draw: its outline [V, 2], its coverage [H, W] in 0..1 and, for a labelled shape, its class."""

    outline: np.ndarray
    coverage: np.ndarray
    label: int | None


def unit_outline(name: str) -> np.ndarray:
    """Vertices [V, 2] of a class' shape around (0, 0), inside the circle of radius 1. A ring is cut open by a slit."""

    def circle(radius: float, n: int = 40) -> list[tuple[float, float]]:
        return [(radius * math.cos(2 * math.pi * i / n), radius * math.sin(2 * math.pi * i / n)) for i in range(n)]

    if name == "circle":
        points = circle(1)
    elif name == "ring":
        outer, inner = circle(1), circle(0.55)
        points = [*outer, outer[0], inner[0], *reversed(inner)]
    elif name in ("square", "triangle"):
        points = circle(1, 4 if name == "square" else 3)
    elif name == "star":
        points = [point for pair in zip(circle(1, 5), circle(0.42, 5), strict=True) for point in pair]
        turn = complex(math.cos(math.pi / 5), math.sin(math.pi / 5))
        for i in range(1, 10, 2):
            z = complex(*points[i]) * turn
            points[i] = (z.real, z.imag)
    else:  # cross
        a, b = 0.95, 0.3
        points = [
            (a, -b),
            (a, b),
            (b, b),
            (b, a),
            (-b, a),
            (-b, b),
            (-a, b),
            (-a, -b),
            (-b, -b),
            (-b, -a),
            (b, -a),
            (b, -b),
        ]
    return np.array(points)


def place(points: np.ndarray, centre: tuple[float, float], scale: tuple[float, float], angle: float) -> np.ndarray:
    """Scale, turn (radians) and move an outline; rounded to 1/100 pixel so that no libm's last bit survives."""
    c, s = math.cos(angle), math.sin(angle)
    moved = [
        (centre[0] + scale[0] * x * c - scale[1] * y * s, centre[1] + scale[0] * x * s + scale[1] * y * c)
        for x, y in points
    ]
    return np.array([(round(x, 2), round(y, 2)) for x, y in moved])


def fill(outline: np.ndarray, height: int, width: int) -> np.ndarray:
    """Coverage [height, width] in 0..1 of a polygon (even-odd rule), by counting edge crossings of each sample row."""
    n = SUPERSAMPLE
    low = np.floor(outline.min(0)).astype(int).clip(0, (width, height))
    high = np.ceil(outline.max(0)).astype(int).clip(0, (width, height))
    coverage = np.zeros((height, width))
    w, h = high - low
    if w <= 0 or h <= 0:
        return coverage
    start, end = outline, np.roll(outline, -1, 0)
    y = low[1] + (np.arange(h * n) + 0.5) / n
    edge, row = np.nonzero((start[:, 1:] <= y) != (end[:, 1:] <= y))
    (x0, y0), (x1, y1) = start[edge].T, end[edge].T
    crossing = x0 + (y[row] - y0) / (y1 - y0) * (x1 - x0)
    column = np.ceil((crossing - low[0]) * n - 0.5).clip(0, w * n).astype(int)
    count = np.bincount(row * (w * n + 1) + column, minlength=h * n * (w * n + 1)).reshape(h * n, w * n + 1)
    inside = count.cumsum(1)[:, :-1] % 2
    coverage[low[1] : high[1], low[0] : high[0]] = inside.reshape(h, n, w, n).sum((1, 3)) / (n * n)
    return coverage


def clip_polygon(outline: np.ndarray, width: int, height: int) -> list[tuple[float, float]]:
    """The polygon inside [0, width] x [0, height] (Sutherland-Hodgman), rounded to 1/100 pixel; empty when outside."""
    points = [tuple(p) for p in outline.tolist()]
    for axis, limit, sign in ((0, 0, 1), (0, width, -1), (1, 0, 1), (1, height, -1)):
        kept = []
        for a, b in zip(points, points[1:] + points[:1], strict=True):
            inside_a, inside_b = sign * (a[axis] - limit) >= 0, sign * (b[axis] - limit) >= 0
            if inside_a:
                kept.append(a)
            if inside_a != inside_b:
                t = (limit - a[axis]) / (b[axis] - a[axis])
                cut = [a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])]
                cut[axis] = float(limit)
                kept.append(tuple(cut))
        points = kept
    return [(round(x, 2), round(y, 2)) for x, y in points]


def polygon_area(points: list[tuple[float, float]]) -> float:
    """Area in square pixels (shoelace formula)."""
    return abs(sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(points, points[1:] + points[:1], strict=True))) / 2


def texture(random: np.random.RandomState, kind: str, height: int, width: int) -> np.ndarray:
    """A pattern [height, width] in 0..1: flat, gradient, stripes, checker, blobs or noise."""
    y, x = np.mgrid[0:height, 0:width] + 0.5
    direction = random.randint(0, 64)
    c, s = round(math.cos(direction * math.pi / 32), 3), round(math.sin(direction * math.pi / 32), 3)
    along, across = (x - width / 2) * c + (y - height / 2) * s, (y - height / 2) * c - (x - width / 2) * s
    if kind == "flat":
        return np.full((height, width), 0.5)
    if kind == "gradient":
        return (along / (height + width) + 0.5).clip(0, 1)
    period = random.randint(5, 25)
    if kind == "stripes":
        return np.abs(np.mod(along, period) * 2 / period - 1)
    if kind == "checker":
        return (np.floor(along / period) + np.floor(across / period)) % 2
    if kind == "blobs":
        total = np.zeros((height, width))
        for _ in range(6):
            bx, by, r = random.randint(0, width), random.randint(0, height), random.randint(6, 30)
            total += 1 / (1 + ((x - bx) * (x - bx) + (y - by) * (y - by)) / (r * r))
        return total.clip(0, 1)
    cell = int(random.choice((2, 6, 16)))  # noise: random values on a grid, interpolated
    grid = random.randint(0, 256, (height // cell + 2, width // cell + 2)) / 255
    rows, columns = np.arange(height) / cell, np.arange(width) / cell
    i, j = rows.astype(int), columns.astype(int)
    fy, fx = (rows - i)[:, None], (columns - j)[None]
    top = grid[i][:, j] * (1 - fx) + grid[i][:, j + 1] * fx
    bottom = grid[i + 1][:, j] * (1 - fx) + grid[i + 1][:, j + 1] * fx
    return top * (1 - fy) + bottom * fy


def paint(random: np.random.RandomState, picture: np.ndarray, item: Item) -> None:
    """Draw an item on the picture [H, W, 3] (float, 0..255) in place.

    Nine shapes in ten are painted near their class's favourite colour where that stands out; the others, and clutter,
    in any colour.
    """
    y, x = np.nonzero(item.coverage)
    if not len(y):
        return
    box = slice(y.min(), y.max() + 1), slice(x.min(), x.max() + 1)
    under, alpha = picture[box], item.coverage[box][..., None]
    mean = under.astype(np.int64).sum((0, 1)) / (under.shape[0] * under.shape[1])
    colour = random.randint(0, 256, 3)
    if item.label is not None and random.randint(10):
        colour = (np.array(FAVOURITES[item.label]) + random.randint(-40, 41, 3)).clip(0, 255)
    while np.abs(colour - mean).max() < NEAR:
        colour = random.randint(0, 256, 3)
    other = (colour + random.randint(-70, 71, 3)).clip(0, 255)
    kind = str(random.choice(("flat", "gradient", "stripes", "checker", "noise")))
    mix = texture(random, kind, *under.shape[:2])[..., None]
    shade = 0.75 + 0.5 * texture(random, "gradient", *under.shape[:2])[..., None]
    picture[box] = under * (1 - alpha) + ((colour * (1 - mix) + other * mix) * shade).clip(0, 255) * alpha


def background(random: np.random.RandomState, height: int, width: int) -> np.ndarray:
    """A picture [height, width, 3] (float, 0..255) of two mixed colours and fine noise."""
    kind = str(random.choice(("gradient", "stripes", "checker", "blobs", "noise")))
    first = random.randint(20, 236, 3)
    second = (first + random.randint(-60, 61, 3)).clip(0, 255)
    mix = texture(random, kind, height, width)[..., None]
    grain = random.randint(-9, 10, (height, width, 1))
    return (first * (1 - mix) + second * mix + grain).clip(0, 255)


def clutter(random: np.random.RandomState, height: int, width: int, unit: float) -> Item:
    """Something to be mistaken for a shape but not labelled: a line, a blob, a splinter. `unit` is 1 at size 128."""
    kind = random.randint(3)
    centre = random.uniform(0, width), random.uniform(0, height)
    angle = random.uniform(0, 2 * math.pi)
    if kind == 0:
        points = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
        scale = (random.uniform(15, 60) * unit, random.uniform(0.8, 2) * unit)
    elif kind == 1:
        long = random.uniform(8, 20) * unit
        points, scale = unit_outline("circle"), (long, long * random.uniform(0.15, 0.4))
    else:
        points, scale = random.uniform(-1, 1, (4, 2)), (random.uniform(3, 7) * unit,) * 2
    outline = place(points, centre, scale, angle)
    return Item(outline, fill(outline, height, width), None)


def visible_shapes(items: list[Item]) -> list[Item]:
    """The items, bottom to top, without the shapes of which less than MIN_VISIBLE is left to see."""
    kept: list[Item] = []
    covered = np.zeros(items[0].coverage.shape, bool) if items else None
    for item in reversed(items):
        mask = item.coverage >= 0.5
        area = polygon_area([tuple(p) for p in item.outline.tolist()])
        if item.label is not None and int((mask & ~covered).sum()) < MIN_VISIBLE * area:
            continue
        covered |= mask
        kept.append(item)
    return kept[::-1]


class Shapes(NamedTuple):
    """How many shapes a scene is given, 1 to `most`, and their radius in pixels, as a scene of size 128 has it."""

    most: int = 6
    smallest: float = 9
    largest: float = 34


SHAPES = Shapes()


def scene(
    seed: int, split: str, index: int, size: int, shapes: Shapes = SHAPES
) -> tuple[np.ndarray, list[tuple[int, list[tuple[float, float]]]]]:
    """One picture uint8 [H, W, 3], H and W within 7/8 to 5/4 of `size`, and its shapes: (class, clipped polygon)."""
    random = np.random.RandomState([seed, SPLITS.index(split), index])
    height, width = (int(v) for v in random.randint(size * 7 // 8, size * 5 // 4 + 1, 2))
    unit = size / 128
    picture = background(random, height, width)
    items = [clutter(random, height, width, unit) for _ in range(random.randint(0, 5))]
    for _ in range(random.randint(1, shapes.most + 1)):
        label = int(random.randint(len(CLASSES)))
        radius = (shapes.smallest + (shapes.largest - shapes.smallest) * random.random_sample()) * unit
        squeeze = random.uniform(0.85, 1.0)
        centre = random.uniform(0.03, 0.97) * width, random.uniform(0.03, 0.97) * height
        outline = place(unit_outline(CLASSES[label]), centre, (radius, radius * squeeze), random.uniform(-0.5, 0.5))
        items.append(Item(outline, fill(outline, height, width), label))
    items += [clutter(random, height, width, unit) for _ in range(random.randint(0, 2))]
    objects = []
    for item in visible_shapes(items):
        paint(random, picture, item)
        if item.label is not None:
            objects.append((item.label, clip_polygon(item.outline, width, height)))
    return np.floor(picture + 0.5).clip(0, 255).astype(np.uint8), objects


def write_split(out: Path, split: str, count: int, size: int, seed: int, shapes: Shapes = SHAPES) -> dict:
    """Render `count` scenes to OUT/<split> and write their annotation file last. Returns the COCO dictionary."""
    (out / split).mkdir(parents=True, exist_ok=True)
    (out / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for index in range(count):
        picture, objects = scene(seed, split, index, size, shapes)
        name = f"{index:06d}.jpg"
        Image.fromarray(picture).save(out / split / name, quality=90)
        images.append({"id": index + 1, "file_name": name, "height": picture.shape[0], "width": picture.shape[1]})
        for label, polygon in objects:
            (x0, y0), (x1, y1) = (tuple(pick(p[axis] for p in polygon) for axis in (0, 1)) for pick in (min, max))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": label + 1,
                    "bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)],
                    "area": round(polygon_area(polygon), 2),
                    "iscrowd": 0,
                    "segmentation": [[value for point in polygon for value in point]],
                }
            )
    coco = {
        "info": {"description": "Generated scenes of shapes", "seed": seed, "size": size},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
    }
    (out / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco, separators=(",", ":")) + "\n")
    return coco


def contact_sheet(
    seed: int, split: str, size: int, columns: int = 8, rows: int = 5, shapes: Shapes = SHAPES
) -> Image.Image:
    """The first scenes of a split side by side; below each row the same scenes with their boxes in white."""
    cell = size * 5 // 4 + 4
    sheet = np.full((2 * rows * cell, columns * cell, 3), 40, np.uint8)
    for i in range(rows * columns):
        picture, objects = scene(seed, split, i, size, shapes)
        h, w, _ = picture.shape
        boxed = picture.copy()
        for _, polygon in objects:
            (x0, x1), (y0, y1) = ((int(min(v)), math.ceil(max(v)) - 1) for v in zip(*polygon, strict=True))
            boxed[y0 : y1 + 1, [x0, x1]] = boxed[[y0, y1], x0 : x1 + 1] = 255
        top, left = 2 * (i // columns) * cell, i % columns * cell
        sheet[top : top + h, left : left + w] = picture
        sheet[top + cell : top + cell + h, left : left + w] = boxed
    return Image.fromarray(sheet)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--train", type=int, default=1000, help="training scenes (%(default)s)")
    parser.add_argument("--val", type=int, default=200, help="validation scenes (%(default)s)")
    parser.add_argument(
        "--size", type=int, default=128, help="nominal side in pixels; sides vary around it (%(default)s)"
    )
    parser.add_argument("--most", type=int, default=SHAPES.most, help="shapes of a scene at most (%(default)s)")
    parser.add_argument(
        "--radius", type=float, nargs=2, default=SHAPES[1:], metavar=("MIN", "MAX"),
        help="of a shape, in pixels of a scene of size 128 (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=1, help="not negative (%(default)s)")
    parser.add_argument("--preview", type=Path, metavar="PNG", help="also write a contact sheet of validation scenes")
    args = parser.parse_args(argv)
    if args.train < 1 or args.val < 1 or args.size < 64 or not 0 <= args.seed < 2**32:
        parser.error("--train and --val must be at least 1, --size at least 64, --seed within 0..2^32-1")
    if args.most < 1 or not 2 <= args.radius[0] <= args.radius[1] <= 64:
        parser.error("--most must be at least 1, --radius rising within 2..64")
    shapes = Shapes(args.most, *args.radius)
    for split, count in zip(SPLITS, (args.train, args.val), strict=True):
        coco = write_split(args.out, split, count, args.size, args.seed, shapes)
        print(
            f"{split}: {count} scenes, {len(coco['annotations'])} shapes, {len(CLASSES)} classes in {args.out / split}"
        )
    if args.preview:
        args.preview.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(args.seed, "val", args.size, shapes=shapes).save(args.preview)
        print(f"preview: {args.preview}")


if __name__ == "__main__":
    main()
