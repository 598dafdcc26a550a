"""Views against closed forms and painted pictures, the four recipes, and plans of one canvas and of several."""

import dataclasses
import itertools
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from detcore import UserError
from detcore.data import dali, nvjpeg, torch_loader
from detcore.data.augment import Augment
from detcore.data.coco import CocoIndex
from detcore.data.plan import EvalPlan, TrainPlan
from detcore.data.recipes import (
    Draws,
    Recipe,
    central_square,
    letterbox,
    shortest_edge,
    shortest_edge_sizes,
    ssd_crop,
    stretch,
)
from detcore.data.view import View

FILL = (124, 116, 104)
RECIPES = {
    "stretch": stretch((48, 64)),
    "ssd_crop": ssd_crop((60, 60), Augment()),
    "letterbox": letterbox((64, 64), FILL),
    "letterbox, random": letterbox((64, 64), FILL, interpolation="random", evaluation="bicubic"),
    "shortest_edge": shortest_edge(48, 80, multiple=16),
}


@pytest.fixture
def index(thirteen) -> CocoIndex:
    return CocoIndex.open(thirteen.file, thirteen.images)


def random_view(rng: np.random.Generator, n: int) -> View:
    corner = rng.integers(0, 50, (n, 2))
    windows = np.concatenate([corner, corner + rng.integers(1, 300, (n, 2))], 1)
    sizes, offsets = rng.integers(1, 400, (n, 2)), rng.integers(-300, 300, (n, 2))
    return View(windows, rng.random(n) < 0.5, sizes, offsets, (200, 260), FILL)


def mapped(view: View, k: int, x: float, y: float) -> tuple[float, float]:
    """Where a point of image k lies on the canvas."""
    x1, y1, x2, y2 = map(float, view.windows[k])
    (height, width), (top, left) = map(float, view.sizes[k]), map(float, view.offsets[k])
    along = x2 - x if view.mirrored[k] else x - x1
    return along * width / (x2 - x1) + left, (y - y1) * height / (y2 - y1) + top


def test_boxes_and_edges_are_the_mapped_corners_and_invert_undoes_them():
    rng = np.random.default_rng(1)
    view = random_view(rng, 300)
    for k in range(300):
        boxes = np.sort(rng.uniform(-20, 350, (5, 2, 2)), 1).reshape(5, 4).astype(np.float32)
        corners = [[mapped(view, k, x, y) for x in box[::2] for y in box[1::2]] for box in boxes.tolist()]
        expected = np.concatenate([np.min(corners, 1), np.max(corners, 1)], 1)
        got = view.boxes(k, boxes)
        tolerance = {"rtol": 1e-5, "atol": 1e-4 * (1 + np.abs(expected).max())}
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, **tolerance)
        edges = rng.uniform(-20, 350, (7, 4)).astype(np.float32)
        ends = [[*mapped(view, k, *edge[:2]), *mapped(view, k, *edge[2:])] for edge in edges.tolist()]
        np.testing.assert_allclose(view.edges(k, edges), ends, rtol=1e-5, atol=1e-4 * (1 + np.abs(ends).max()))
        back = view.invert(k, expected)
        np.testing.assert_allclose(back, boxes, rtol=1e-6, atol=1e-4)
    assert view.boxes(0, np.empty((0, 4), np.float32)).shape == (0, 4)
    of = rng.integers(0, 300, 500)
    boxes = rng.uniform(-20, 350, (500, 4)).astype(np.float32)
    one_by_one = [view.boxes(k, box[None])[0] for k, box in zip(of.tolist(), boxes, strict=True)]
    assert np.array_equal(view.boxes(of, boxes), one_by_one)
    assert view.boxes(of[:0], boxes[:0]).shape == (0, 4)


def test_extents_end_where_the_scaled_part_or_the_canvas_does():
    view = View(
        np.array([[0, 0, 10, 10]] * 4), np.zeros(4, bool), np.array([[200, 260], [100, 50], [100, 500], [80, 90]]),
        np.array([[0, 0], [0, 0], [0, -10], [150, 200]]), (200, 260),
    )  # fmt: skip
    assert view.extents.tolist() == [[200, 260], [100, 50], [100, 260], [200, 260]]
    assert [bool(view.covers(k)) for k in range(4)] == view.covers(np.arange(4)).tolist() == [True, *[False] * 3]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_can_be_pickled_and_draw_by_image_alone(name):
    recipe, sizes = pickle.loads(pickle.dumps(RECIPES[name])), np.array([[90, 120], [120, 90], [77, 200]])
    boxes = [np.array([[5, 5, 60, 60]], np.float32)] * 3
    canvas = recipe.canvases[0]
    together = recipe.view(Draws(3, 1, np.array([7, 2, 5])), sizes, boxes, canvas)
    alone = recipe.view(Draws(3, 1, np.array([2])), sizes[1:2], boxes[1:2], canvas)
    for field in ("windows", "mirrored", "sizes", "offsets", "colours", "cubic"):
        ours, theirs = getattr(together, field), getattr(alone, field)
        assert (ours is None and theirs is None) or np.array_equal(ours[1], theirs[0]), field
    other = recipe.view(Draws(3, 2, np.arange(40)), sizes[[0] * 40], boxes[:1] * 40, canvas)
    assert 8 < other.mirrored.sum() < 32
    still = recipe.eval_view(sizes, canvas)
    assert not still.mirrored.any() and not still.offsets.any() and still.colours is None


def painted(view: View, height: int, width: int, box: list[int]) -> torch.Tensor:
    """uint8 [H, W, 3]: a white image with a black box, as a view shows it."""
    image = torch.full((3, height, width), 255, dtype=torch.uint8)
    image[:, box[1] : box[3], box[0] : box[2]] = 0
    return torch_loader.render(image, view, 0, antialias=True)


@pytest.mark.parametrize("name", RECIPES)
def test_pixels_lie_where_the_boxes_do_and_the_rest_is_fill(name):
    recipe = RECIPES[name]
    recipe = dataclasses.replace(
        recipe, view=recipe.view if name != "ssd_crop" else ssd_crop((60, 60), Augment(0, 0, 0, 0)).view
    )
    height, width, box = 180, 240, [60, 40, 190, 150]
    sizes, boxes = np.array([[height, width]]), [np.array([box], np.float32)]
    seen = 0
    for number in range(60):
        view = recipe.view(Draws(1, 0, np.array([number])), sizes, boxes, recipe.canvases[-3 % len(recipe.canvases)])
        pixels = painted(view, height, width, box)
        assert pixels.shape == (*view.canvas, 3) and pixels.is_contiguous()
        bottom, right = view.extents[0].tolist()
        beside = torch.ones(view.canvas, dtype=torch.bool)
        beside[:bottom, :right] = False
        assert (pixels[beside] == torch.tensor(view.fill, dtype=torch.uint8)).all()
        dark = (pixels[:bottom, :right, 0] < 128).numpy()
        left, top, end, low = view.boxes(0, boxes[0])[0].clip(0, [right, bottom] * 2)
        if min(end - left, low - top) < 3:
            continue
        seen += 1
        rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
        assert (
            np.abs(np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) - [left, top, end, low]).max() <= 1.5
        )
    assert seen > 20


def test_letterbox_keeps_the_aspect_and_crops_what_is_too_large():
    """As EfficientDet's own, which crops the scaled image, but for at most a pixel of the original."""
    sizes = np.random.default_rng(0).integers(20, 900, (4000, 2))
    recipe = letterbox((512, 512), FILL)
    still = recipe.eval_view(sizes, (512, 512))
    for (height, width), scaled in zip(sizes[:200].tolist(), still.sizes[:200].tolist(), strict=True):
        factor = min(512 / height, 512 / width)  # EfficientDet's resize and pad
        assert scaled == [int(height * factor), int(width * factor)] and max(scaled) in (511, 512)
    draws = Draws(0, 0, np.arange(4000))
    view = recipe.view(draws, sizes, [], (512, 512))
    scale = 0.1 + 1.9 * draws.uniform(0)
    assert scale.min() < 0.11 and scale.max() > 1.99 and 0.95 < scale.mean() < 1.15
    factor = scale * (512 / sizes).min(1, keepdims=True)
    scaled = (sizes * factor).astype(int)
    assert (view.sizes == np.minimum(scaled, 512)).all() and not view.offsets.any()
    start, seen = view.windows[:, 1::-1], view.windows[:, :1:-1] - view.windows[:, 1::-1]
    assert (start >= 0).all() and (start + seen <= sizes).all() and (seen > 0).all()
    corner = (np.maximum(scaled - 512, 0) * draws.uniform(1, 2)).astype(int)
    assert np.abs(start - corner * sizes / scaled).max() <= 1
    assert (np.abs(seen - np.minimum(scaled, 512) * sizes / scaled) <= np.where(scaled > 512, 0.5, 0)).all()
    free = sizes - seen > 50
    assert abs((start[free] / (sizes - seen)[free]).mean() - 0.5) < 0.03
    assert view.fill == FILL and recipe.clip and recipe.cuts and recipe.places


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_letterbox_on_pixels_is_what_pillow_makes_of_the_view(interpolation):
    rng = np.random.default_rng(5)
    picture = Image.fromarray(rng.integers(0, 256, (9, 11, 3), np.uint8)).resize((90, 70), Image.Resampling.BICUBIC)
    recipe = letterbox((64, 64), FILL, interpolation=interpolation)
    view = recipe.view(Draws(0, 2, np.arange(60)), np.array([[70, 90]] * 60), [], (64, 64))
    cubic = np.full(60, interpolation == "bicubic") if view.cubic is None else view.cubic
    for k in range(60):
        part = picture.crop(view.windows[k].tolist())
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.mirrored[k] else part
        method = Image.Resampling.BICUBIC if cubic[k] else Image.Resampling.BILINEAR
        expected = Image.new("RGB", (64, 64), FILL)
        expected.paste(part.resize(view.sizes[k, ::-1].tolist(), method))
        got = torch_loader.render(torch.from_numpy(np.array(picture)).permute(2, 0, 1), view, k, antialias=True)
        difference = np.abs(got.numpy().astype(int) - np.array(expected))
        assert difference.max() <= 1 + cubic[k] and difference.mean() < 0.3
    assert 20 < cubic.sum() < 40 if interpolation == "random" else cubic.all() == (interpolation == "bicubic")


def test_random_interpolation_is_the_same_after_a_resume(index):
    recipe = RECIPES["letterbox, random"]
    plan = TrainPlan(index, recipe, 2, 6, 5)
    whole = list(itertools.islice(torch_loader.batches(plan, plan.keys(0, 0), torch_loader.Options()), 9))
    later = torch_loader.batches(plan, plan.keys(0, 4), torch_loader.Options())
    for a, b in zip(whole[4:], itertools.islice(later, 5), strict=True):
        assert torch.equal(a.images, b.images)
    assert len({plan.choose(*key).view.cubic.sum() for key in itertools.islice(plan.keys(0, 0), 9)}) > 1
    assert recipe.eval_view(np.array([[70, 90]]), (64, 64)).cubic.tolist() == [True]


def test_dali_says_what_to_take_for_bicubic_images(index):
    plan = TrainPlan(index, RECIPES["letterbox, random"], 2, 6, 5)
    with pytest.raises(UserError, match="--loader torch or nvjpeg"):
        dali.batches(plan, plan.keys(0, 0), torch_loader.Options())


def plain_size(height: int, width: int, short: int, longest: int) -> list[int]:
    """maskrcnn-benchmark's rule for one image, with plain Python."""
    least, most = float(min(height, width)), float(max(height, width))
    size = round(longest * least / most) if most / least * short > longest else short
    if (height <= width and height == size) or (width <= height and width == size):
        return [height, width]
    return [size, int(size * width / height)] if height <= width else [int(size * height / width), size]


def test_shortest_edge_sizes_are_those_of_the_original():
    rng = np.random.default_rng(2)
    sizes = np.concatenate(
        [rng.integers(1, 2000, (3000, 2)), [[480, 640], [427, 640], [640, 640], [500, 333], [100, 900]]]
    )
    got = shortest_edge_sizes(sizes, 800, 1333)
    assert got.tolist() == [
        plain_size(h, w, 800, 1333) if min(h, w) > 3 else g for (h, w), g in zip(sizes.tolist(), got.tolist())
    ]
    assert got[-5:].tolist() == [[800, 1066], [800, 1199], [800, 800], [1201, 800], [148, 1332]]


def test_shortest_edge_takes_the_smallest_of_four_canvases():
    recipe = shortest_edge()
    assert recipe.canvases == ((800, 1088), (800, 1344), (1088, 800), (1344, 800))
    sizes = np.array([[480, 640], [640, 480], [427, 640], [640, 360], [500, 500], [100, 900], [900, 100]])
    assert recipe.canvas_of(sizes).tolist() == [0, 2, 1, 3, 0, 1, 3]
    many = np.random.default_rng(3).integers(30, 3000, (2000, 2))
    canvas = np.array(recipe.canvases)[recipe.canvas_of(many)]
    scaled = shortest_edge_sizes(many, 800, 1333)
    assert ((scaled <= canvas).all(1) | (scaled.min(1) < 60)).all(), "rounding a short side of under 60 shows"
    assert plain_size(11, 1000, 800, 1333) == [15, 1363], "the original's is longer than any canvas"
    assert recipe.eval_view(np.array([[11, 1000]]), (800, 1344)).sizes.tolist() == [[15, 1344]]


def test_central_square():
    view = central_square(np.array([[100, 301], [301, 100]]), (30, 30))
    assert view.windows.tolist() == [[100, 0, 200, 100], [0, 100, 100, 200]]


def test_boxes_end_where_the_canvas_does_and_small_ones_go(index):
    plan = TrainPlan(index, letterbox((64, 64), FILL, scales=(1.9, 2.0)), 2, 6, 0)
    count = 0
    for epoch, step in itertools.islice(plan.keys(0, 0), 40):
        choice = plan.choose(epoch, step)
        targets = plan.targets(choice)
        assert targets["extent"].tolist() == choice.view.extents.tolist()
        for row, i in enumerate(choice.images.tolist()):
            moved = choice.view.boxes(row, index.boxes(i)[0])
            high = np.tile(choice.view.extents[row, ::-1], 2)
            inside = np.clip(moved, 0, high)
            inside = inside[(inside[:, 2:] > inside[:, :2] + 1e-4).all(1)]
            real = targets["labels"][row] >= 0
            np.testing.assert_allclose(targets["boxes"][row][real].numpy(), inside, atol=1e-4)
            count += len(moved) - len(inside)
    assert count > 10, "some boxes lay outside"


def batches_of(index: CocoIndex, recipe: Recipe, count: int, by=torch_loader, workers: int = 0, **more) -> list:
    plan = TrainPlan(index, recipe, **{"batch_size": 2, "max_boxes": 6, "seed": 4} | more)
    stream = by.batches(plan, plan.keys(0, 0), torch_loader.Options(workers, antialias=True))
    return list(itertools.islice(stream, count))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(("by", "workers"), [(torch_loader, 1), (nvjpeg, 1)])
def test_loaders_agree(index, name, by, workers):
    ours, theirs = (batches_of(index, RECIPES[name], 9, one, n) for one, n in ((torch_loader, 0), (by, workers)))
    for a, b in zip(ours, theirs, strict=True):
        for field, x, y in zip(a._fields, a, b, strict=True):
            assert torch.equal(x, y), field
        assert a.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.dali
@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.methods == {"bilinear"}])
def test_dali_agrees_but_for_a_few_grey_levels(index, name):
    pytest.importorskip("nvidia.dali")
    plans = (TrainPlan(index, RECIPES[name], 2, 6, 4), EvalPlan(index, RECIPES[name], 4))
    for plan, keys in ((plans[0], plans[0].keys(0, 0)), (plans[1], plans[1].keys())):
        chosen = list(itertools.islice(keys, 9))
        ours, theirs = (
            list(by.batches(plan, iter(chosen), torch_loader.Options(workers)))
            for by, workers in ((torch_loader, 0), (dali, 2))
        )
        for a, b in zip(ours, theirs, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a[1:], b[1:], strict=True))
            assert a.images.stride() == b.images.stride() and (a.images.int() - b.images.int()).abs().max() <= 5


class TestSeveralCanvases:
    RECIPE = RECIPES["shortest_edge"]

    @pytest.mark.parametrize(("world", "drop_last"), [(1, True), (2, True), (2, False), (3, False)])
    def test_all_ranks_have_the_same_canvas_and_share_the_images(self, index, world, drop_last):
        plans = [TrainPlan(index, self.RECIPE, 1, 6, 5, rank, world, drop_last) for rank in range(world)]
        of = self.RECIPE.canvas_of(np.stack([index.heights, index.widths], 1))
        steps = sum((n // world if drop_last else -(-n // world)) for n in np.bincount(of))
        assert {plan.steps for plan in plans} == {steps}
        orders = []
        for epoch in range(3):
            seen, shapes = [], []
            for step in range(steps):
                chosen = [plan.choose(epoch, step) for plan in plans]
                assert len({choice.view.canvas for choice in chosen}) == 1
                shapes.append(chosen[0].view.canvas)
                seen += [i for choice in chosen for i in choice.images.tolist()]
                assert all(self.RECIPE.canvases[of[i]] == shapes[-1] for i in seen[-world:])
            assert len(set(seen)) == (len(seen) if drop_last else len(index))
            orders.append((tuple(shapes), tuple(seen)))
        assert len(set(orders)) == 3 and len(set(orders[0][0])) > 1

    def test_batches_resume_at_any_step(self, index):
        plan = TrainPlan(index, self.RECIPE, 2, 6, 5)
        whole = list(itertools.islice(torch_loader.batches(plan, plan.keys(0, 0), torch_loader.Options()), 9))
        later = torch_loader.batches(plan, plan.keys(0, 4), torch_loader.Options(workers=1))
        for a, b in zip(whole[4:], itertools.islice(later, 5), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert len({batch.images.shape for batch in whole}) > 1

    @pytest.mark.parametrize(("world", "batch_size"), [(1, 4), (2, 3), (3, 1)])
    def test_evaluation_sees_each_image_once(self, index, world, batch_size):
        seen, lengths = [], set()
        for rank in range(world):
            plan = EvalPlan(index, self.RECIPE, batch_size, rank, world)
            batches = list(torch_loader.batches(plan, plan.keys(), torch_loader.Options()))
            lengths.add((plan.steps, len(batches)))
            for batch in batches:
                real = batch.image_id >= 0
                assert batch.images.shape[0] == batch_size and batch.extent[~real].eq(1).all()
                assert not batch.images[~real].any()
                seen += batch.image_id[real].tolist()
        assert sorted(seen) == sorted(index.image_ids.tolist()) and len(lengths) == 1


def test_only_the_images_that_a_recipe_trains_with(index):
    recipe = dataclasses.replace(stretch((48, 64)), trains=lambda index: index.box_count() > 2)
    allowed = set(np.flatnonzero(index.box_count() > 2).tolist())
    plan = TrainPlan(index, recipe, 1, 6, 0)
    assert 0 < plan.steps == len(allowed) < len(index)
    assert {plan.choose(3, step).images[0] for step in range(plan.steps)} == allowed


SIZES = np.array([[30, 40], [50, 20]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"offsets": np.array([[0, 0], [0, 19]])}, r"offsets \[0, 19\] .*must be 0"),
        ({"mirrored": np.array([False, True])}, "neither mirrors"),
        ({"sizes": np.array([[48, 64], [49, 30]])}, "past its canvas"),
        ({"windows": np.array([[0, 0, 40, 30], [0, 1, 20, 50]])}, "whole images"),
    ],
)
def test_views_that_cannot_be_scaled_back_are_refused(change, words):
    view = stretch((48, 64)).eval_view(SIZES, (48, 64))
    assert view.scorable(SIZES) is view
    with pytest.raises(ValueError, match=words):
        view._replace(**change).scorable(SIZES)


def test_an_evaluation_refuses_a_centred_letterbox(index):
    fitted = letterbox((64, 64), FILL)

    def centred(sizes: np.ndarray, canvas: tuple[int, int]) -> View:
        view = fitted.eval_view(sizes, canvas)
        return view._replace(offsets=(np.array(canvas) - view.sizes) // 2)

    assert EvalPlan(index, fitted, 4).choose(0, 0).view.offsets.max() == 0
    plan = EvalPlan(index, dataclasses.replace(fitted, eval_view=centred), 4)
    with pytest.raises(ValueError, match="offsets must be 0"):
        plan.choose(0, 0)
    with pytest.raises(ValueError, match="whole images"):
        EvalPlan(index, dataclasses.replace(fitted, eval_view=central_square), 4).choose(0, 0)
