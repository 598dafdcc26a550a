"""SSD's crop and colours: one by one the same as together, the distribution of the original's plain description, and
the same boxes and pixels from every loader.

Bounds of the statistics: `distance` is Kolmogorov and Smirnov's between two samples of n; by chance it exceeds
1.95 * sqrt(2 / n) once in 1,000 cases. All seeds are fixed, so each test always has the same outcome.
"""

import itertools
import json
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image

from detcore import UserError
from detcore.data import augment, dali, nvjpeg
from detcore.data.augment import Augment, uniform
from detcore.data.coco import CocoIndex
from detcore.data.plan import TrainPlan
from detcore.data.recipes import ssd_crop
from tests.detcore.data.streams import train_batches
from tools.bench import ssd_augment as original

original.SIZE = 96  # of the pictures here: 300 takes nine times as long and has the same moments

WIDTH, HEIGHT = 640, 480
YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
SLACK = 0.01  # parts of the image: our windows have whole pixels, the original's do not
SCENES = {
    "one": [[100, 100, 400, 420]],
    "small": [[300, 200, 330, 240]],
    "apart": [[10, 20, 200, 300], [350, 30, 630, 460]],
    "many": [[20, 20, 120, 100], [140, 60, 300, 300], [310, 200, 620, 440], [0, 0, 640, 480], [500, 10, 560, 90]],
}
FIELDS = ("images", "boxes", "labels", "image_id", "size")


def distance(a: np.ndarray, b: np.ndarray, slack: float = 0.0) -> float:
    """The largest difference between two samples' distribution functions, values not told apart within slack."""
    a, b = np.sort(a.astype(np.float64)), np.sort(b.astype(np.float64))

    def above(a: np.ndarray, b: np.ndarray) -> float:
        return (np.arange(1, len(a) + 1) / len(a) - np.searchsorted(b, a + slack, "right") / len(b)).max()

    return max(above(a, b), above(b, a))


def chi_square(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Of two samples of whole numbers, equally many: the statistic, and what it exceeds once in 1,000 cases."""
    length = max(a.max(), b.max()) + 1
    one, two = np.bincount(a, minlength=length), np.bincount(b, minlength=length)
    seen = one + two > 0
    freedom = max(seen.sum() - 1, 1)
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3  # Wilson and Hilferty
    return ((one - two)[seen] ** 2 / (one + two)[seen]).sum(), bound


def draw_windows(boxes: list, count: int, seed: int = 1) -> np.ndarray:
    box = np.array(boxes, np.float32).reshape(-1, 4)
    size = np.tile([HEIGHT, WIDTH], (count, 1))
    return Augment().windows(seed, 0, np.arange(count), size, [box] * count)


def one_by_one(seed: int, epoch: int, i: int, size: tuple[int, int], boxes: np.ndarray) -> list[int]:
    """The window of one image with plain Python, try after try, from the same draws."""
    height, width = size
    for number in itertools.count(4, 5):
        draw = [float(uniform(seed, epoch, np.array([i]), np.array([number + k]))[0]) for k in range(5)]
        option = int(draw[0] * 7)
        if option == 0:
            return [0, 0, width, height]
        w, h = 0.3 + (1 - 0.3) * draw[1], 0.3 + (1 - 0.3) * draw[2]
        if not 0.5 <= w / h <= 2:
            continue
        left, top = draw[3] * (1 - w), draw[4] * (1 - h)
        x1, y1 = int(left * width), int(top * height)
        x2, y2 = max(int((left + w) * width), x1 + 1), max(int((top + h) * height), y1 + 1)
        good, centres = True, 0
        for a, b, c, d in boxes.tolist():
            shared = max(min(c, x2) - max(a, x1), 0) * max(min(d, y2) - max(b, y1), 0)
            iou = shared / ((c - a) * (d - b) + (x2 - x1) * (y2 - y1) - shared)
            good &= iou > (None, 0.1, 0.3, 0.5, 0.7, 0.9, -1)[option]
            centres += x1 < (a + c) / 2 < x2 and y1 < (b + d) / 2 < y2
        if good and (centres or not len(boxes)):
            return [x1, y1, x2, y2]


def test_tries_tested_together_choose_what_one_by_one_would(monkeypatch):
    rng = np.random.default_rng(0)
    images, size, boxes = np.arange(300) * 3, rng.integers(1, 700, (300, 2)), []
    for height, width in size.tolist():
        corners = np.sort(rng.uniform(0, 1, (rng.integers(0, 7), 2, 2)), 1).reshape(-1, 4)
        boxes.append((corners * [width, height, width, height]).astype(np.float32))
    expected = [one_by_one(5, 2, *each) for each in zip(images.tolist(), size.tolist(), boxes, strict=True)]
    assert Augment().windows(5, 2, images, size, boxes).tolist() == expected
    monkeypatch.setattr(augment, "TRIES", 1)
    assert Augment().windows(5, 2, images, size, boxes).tolist() == expected
    assert [w for i in range(300) for w in Augment().windows(5, 2, images[[i]], size[[i]], [boxes[i]]).tolist()] == (
        expected
    )


def cut_boxes(boxes: np.ndarray, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The boxes clipped to a window, from its corner on, and whether their centre is in it."""
    low, high = np.tile(window.reshape(2, 2), 2)
    return np.clip(boxes, low, high) - low, augment.has_centre(boxes, window)


@pytest.mark.parametrize("scene", SCENES)
def test_windows_and_kept_boxes_are_distributed_as_in_the_original(scene):
    count, draw = 6000, random.Random(7)
    boxes = np.array(SCENES[scene], np.float64)
    sides = np.array([WIDTH, HEIGHT] * 2)
    windows = draw_windows(SCENES[scene], count) / sides
    theirs = [original.original_crop(boxes / sides, draw) for _ in range(count)]
    their_windows = np.array([window for window, _, _ in theirs])
    bound = 1.95 * (2 / count) ** 0.5

    def facts(w: np.ndarray) -> dict[str, np.ndarray]:
        extent = w[:, 2:] - w[:, :2]
        centre = (w[:, :2] + w[:, 2:]) / 2
        named = {"area": extent.prod(1), "aspect": np.log(extent[:, 0] / extent[:, 1])}
        return named | {"x": centre[:, 0], "y": centre[:, 1], "width": extent[:, 0]}

    for name, ours, plain in zip(facts(windows), facts(windows).values(), facts(their_windows).values(), strict=True):
        assert distance(ours, plain, SLACK) < bound, name
    whole = [(w == [0, 0, 1, 1]).all(1).mean() for w in (windows, their_windows)]
    assert abs(whole[0] - whole[1]) < 3.3 * (0.5 / count) ** 0.5

    cut = [cut_boxes(boxes, w) for w in draw_windows(SCENES[scene], count)]
    statistic, limit = chi_square(
        np.array([keep.sum() for _, keep in cut]), np.array([len(kept) for _, kept, _ in theirs])
    )
    assert statistic < limit
    parts = [box[keep] / np.tile((w[2:] - w[:2]) * sides[:2], 2) for (box, keep), w in zip(cut, windows)]
    ours, plain = np.concatenate(parts), np.concatenate([kept for _, kept, _ in theirs])
    for column in range(4):
        close = 1.95 * (1 / len(ours) + 1 / len(plain)) ** 0.5
        assert distance(ours[:, column], plain[:, column], SLACK) < close
    assert ours.min() >= 0 and ours.max() <= 1 + 1e-9


def test_images_without_boxes_are_cut_too():
    windows = draw_windows([], 4000)
    whole = (windows == [0, 0, WIDTH, HEIGHT]).all(1).mean()
    extent = (windows[:, 2:] - windows[:, :2]) / [WIDTH, HEIGHT]
    assert extent.min() > 0.29 and 0.15 < whole < 0.18  # 1/7 over all tries of allowed shape: 0.159


def test_draws_differ_by_seed_epoch_and_image_and_are_independent_of_the_mirror():
    images = np.arange(4000)
    draws = uniform(3, 1, images[:, None], np.arange(9))
    assert not np.array_equal(draws, uniform(3, 2, images[:, None], np.arange(9)))
    assert not np.array_equal(draws, uniform(4, 1, images[:, None], np.arange(9)))
    columns = np.concatenate([draws, uniform(3, 1, images)[:, None]], 1)
    correlation = np.corrcoef(columns.T) - np.eye(10)
    assert np.abs(correlation).max() < 0.06 and np.abs(columns.mean(0) - 0.5).max() < 0.02
    assert draw_windows(SCENES["one"], 50, seed=1).tolist() != draw_windows(SCENES["one"], 50, seed=2).tolist()


def test_colour_factors_have_their_ranges():
    images = np.arange(5000)
    maps = Augment(hue=0, saturation=0).colours(0, 0, images).astype(np.float64)
    gain, offset = maps[:, 0, :3].sum(1), maps[:, 0, 3]
    brightness = gain + offset / 128  # b * c + b * (1 - c)
    maps = Augment(brightness=0, contrast=0).colours(0, 0, images).astype(np.float64)
    chroma = (YIQ @ maps[..., :3] @ np.linalg.inv(YIQ))[:, 1]
    factors = {
        0.125: brightness - 1,
        0.5: gain / brightness - 1,  # contrast
        0.50001: np.hypot(chroma[:, 1], chroma[:, 2]) - 1,  # saturation
        18.0: np.rad2deg(np.arctan2(chroma[:, 2], chroma[:, 1])),
    }
    for spread, values in factors.items():
        even = np.linspace(-spread, spread, 5000)
        assert distance(values, even) < 0.03 and np.abs(values).max() <= spread * 1.00001
    assert np.abs(np.corrcoef(list(factors.values())) - np.eye(4)).max() < 0.05
    assert Augment() == pickle.loads(pickle.dumps(Augment()))


def plain_colours(pixels: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float) -> np.ndarray:
    """The steps one by one, in float64."""
    y, i, q = np.moveaxis(pixels @ YIQ.T, -1, 0)
    turned = saturation * (i + 1j * q) * np.exp(-1j * np.deg2rad(hue))
    rgb = np.stack([y, turned.real, turned.imag], -1) @ np.linalg.inv(YIQ).T
    return np.clip(brightness * (128 + contrast * (rgb - 128)), 0, 255)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (12, 10), (300, 300)])
def test_jitter_is_the_steps_one_by_one(shape):
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (*shape, 3), np.uint8)
    for factors in ((1, 1, 1, 0), (0.9, 1.4, 0.6, -18), (1.1, 0.5, 1.5, 10)):
        colour = augment.colour_map(*(np.array([value], np.float64) for value in factors))[0]
        got = augment.jitter(torch.from_numpy(image), torch.from_numpy(colour)).numpy()
        assert got.dtype == np.uint8 and np.abs(got - plain_colours(image, *factors)).max() <= 0.501
        if factors[0] == 1:
            assert np.array_equal(got, image)
    grey = torch.arange(256, dtype=torch.uint8)[:, None, None].expand(256, 1, 3).contiguous()
    turn = augment.colour_map(np.ones(1), np.ones(1), np.array([1.5]), np.array([18.0]))[0]
    assert torch.equal(augment.jitter(grey, torch.from_numpy(turn)), grey)


SIZE = (48, 64)
ARGUMENTS = {"image_size": SIZE, "max_boxes": 6, "seed": 11, "epoch": 0, "step": 0, "batch_size": 3, "rank": 0}
ARGUMENTS |= {"world_size": 1, "antialias": True, "augment": Augment()}


@pytest.fixture
def index(thirteen) -> CocoIndex:
    return CocoIndex.open(thirteen.file, thirteen.images)


def take(stream, count: int = 9) -> list:
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


def test_batches_follow_from_the_position_alone(index):
    whole = take(train_batches(index, workers=0, **ARGUMENTS))
    later = take(train_batches(index, workers=2, **ARGUMENTS | {"step": 5}), 4)
    for a, b in zip(whole[5:], later, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    plain = take(train_batches(index, workers=0, **ARGUMENTS | {"augment": None}))
    assert all(torch.equal(a.image_id, b.image_id) for a, b in zip(whole, plain, strict=True))
    assert not any(torch.equal(a.images, b.images) for a, b in zip(whole, plain, strict=True))


def test_boxes_lie_where_the_picture_says(coco):
    """A black rectangle on white: its place in the augmented image is the box."""
    coco.categories(1)
    for number in range(8):
        path = coco.add_image(number + 1, 320, 240, [(1, 80 + 4 * number, 60, 120, 90)], name=f"{number}.png")
        pixels = np.full((240, 320, 3), 255, np.uint8)
        pixels[60:150, 80 + 4 * number : 200 + 4 * number] = 0
        Image.fromarray(pixels).save(path)
    coco.write()
    index = CocoIndex.open(coco.file, coco.images)
    arguments = ARGUMENTS | {"image_size": (300, 300), "batch_size": 8, "augment": Augment(0, 0, 0, 0)}
    places = set()
    for batch in take(train_batches(index, workers=0, **arguments), 6):
        for image, box, label in zip(batch.images, batch.boxes[:, 0].tolist(), batch.labels[:, 0].tolist()):
            down, across = (torch.nonzero((image[0] < 128).any(axis))[:, 0] for axis in (1, 0))
            painted = [across[0], down[0], across[-1] + 1, down[-1] + 1]
            assert label == 0 and np.abs(np.array(box) - painted).max() <= 1.5
            places.add(tuple(box))
    assert len(places) > 20


def test_crowd_boxes_that_are_dropped_do_not_limit_the_crop(coco):
    coco.categories(1)
    coco.add_image(1, 640, 480, [(1, 300, 200, 200, 200)])
    coco.add_box(1, 1, [0, 0, 10, 10], iscrowd=1)
    coco.write()
    index = CocoIndex.open(coco.file, coco.images)
    plans = {crowd: TrainPlan(index, ssd_crop(SIZE, Augment()), 1, 6, 0, crowd=crowd) for crowd in ("keep", "drop")}
    chosen = {
        crowd: [plan.choose(epoch, 0).view.windows[0].tolist() for epoch in range(300)] for crowd, plan in plans.items()
    }
    expected = [one_by_one(0, epoch, 0, (480, 640), np.array([[300, 200, 500, 400]])) for epoch in range(300)]
    assert chosen["drop"] == expected != chosen["keep"]
    labels = torch.cat([plans["drop"].targets(plans["drop"].choose(epoch, 0))["labels"] for epoch in range(50)])
    assert (labels[:, 0] == 0).all() and (labels[:, 1:] == -1).all()


def test_nvjpeg_batches_are_the_same(index):
    ours = take(train_batches(index, workers=0, **ARGUMENTS))
    for a, b in zip(ours, take(train_batches(index, by=nvjpeg, workers=1, device=torch.device("cpu"), **ARGUMENTS))):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> CocoIndex:
    """Eight soft pictures of 320x240, mean near 128, each with the boxes of a scene."""
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "images").mkdir()
    rng = np.random.default_rng(9)
    content: dict[str, list] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    for number in range(8):
        small = Image.fromarray(rng.integers(40, 216, (8, 10, 3), np.uint8))
        small.resize((320, 240), Image.Resampling.BICUBIC).save(folder / "images" / f"{number}.jpg", quality=95)
        content["images"].append({"id": number + 1, "file_name": f"{number}.jpg", "width": 320, "height": 240})
        for x1, y1, x2, y2 in list(SCENES.values())[number % 4]:
            box = [x1 / 2, y1 / 2, (x2 - x1) / 2, (y2 - y1) / 2]
            content["annotations"].append(
                {"id": len(content["annotations"]) + 1, "image_id": number + 1, "category_id": 1, "bbox": box}
            )
    (folder / "annotations.json").write_text(json.dumps(content))
    return CocoIndex.open(folder / "annotations.json", folder / "images")


def moments(pixels: np.ndarray) -> np.ndarray:
    """Of uint8 [3, H, W]: mean and deviation of the grey values, mean and deviation of red minus blue, mean green."""
    red, green, blue = pixels.astype(np.float64)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    return np.array([grey.mean(), grey.std(), (red - blue).mean(), (red - blue).std(), green.mean()])


def check_pictures(index: CocoIndex, batches: list) -> None:
    """Colours, areas of boxes and numbers of boxes of whole batches against the original's plain description.

    Pillow's jitter clips after each step, scales contrast about the picture's own mean instead of 128 and takes the
    steps in random order; on these pictures that moves a distribution function by less than 0.05.
    """
    torch.manual_seed(0)
    draw, facts, boxes, numbers = random.Random(3), [], [], []
    count = len(batches) * len(batches[0].images)
    for number in range(count):
        i = number % len(index)
        with Image.open(index.path(i)) as image:
            picture, kept = original.original_image(image, index.boxes(i)[0] / np.array([320, 240] * 2), draw)
        facts.append(moments(np.moveaxis(np.asarray(picture), -1, 0)))
        boxes.append(kept)
        numbers.append(len(kept))
    ours = np.array([moments(image.numpy()) for batch in batches for image in batch.images])
    bound = 1.95 * (2 / count) ** 0.5
    for column, theirs in enumerate(np.array(facts).T):
        assert distance(ours[:, column], theirs) < bound + 0.05, column
    real = torch.cat([batch.boxes[batch.labels >= 0] for batch in batches]).numpy() / original.SIZE
    theirs = np.concatenate(boxes)
    for column in range(4):
        close = 1.95 * (1 / len(real) + 1 / len(theirs)) ** 0.5
        assert distance(real[:, column], theirs[:, column], SLACK) < close
    found = np.concatenate([(batch.labels >= 0).sum(1).numpy() for batch in batches])
    statistic, limit = chi_square(found, np.array(numbers))
    assert statistic < limit


PICTURES = ARGUMENTS | {"image_size": (original.SIZE, original.SIZE), "batch_size": 8}


def test_pictures_of_the_torch_loader_are_distributed_as_in_the_original(scenes):
    check_pictures(scenes, take(train_batches(scenes, workers=0, **PICTURES), 100))


@pytest.mark.dali
class TestWithDali:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("nvidia.dali")

    @pytest.mark.parametrize("changes", [{}, {"step": 3, "antialias": False, "crowd": "drop"}])
    def test_batches_are_the_torch_loaders(self, index, changes):
        ours = take(train_batches(index, workers=0, **ARGUMENTS | changes))
        theirs = take(train_batches(index, by=dali, workers=2, **ARGUMENTS | changes))
        for a, b in zip(ours, theirs, strict=True):
            assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in FIELDS[1:])
            difference = (a.images.int() - b.images.int()).abs()
            assert a.images.stride() == b.images.stride() and difference.max() <= 5
            assert difference.float().mean() < 0.5

    def test_pictures_are_distributed_as_in_the_original(self, scenes):
        check_pictures(scenes, take(train_batches(scenes, by=dali, workers=1, **PICTURES), 100))

    def test_an_image_of_another_size_is_named(self, thirteen, tmp_path):
        content = json.loads(thirteen.file.read_text())
        content["images"][7]["width"] += 400
        (tmp_path / "wrong.json").write_text(json.dumps(content))
        index = CocoIndex.open(tmp_path / "wrong.json", thirteen.images)
        with pytest.raises(UserError, match=str(content["images"][7]["file_name"])):
            take(train_batches(index, by=dali, workers=1, **ARGUMENTS), 30)
