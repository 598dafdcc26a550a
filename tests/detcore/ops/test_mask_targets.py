"""Mask targets: bit for bit what pycocotools makes of the polygons of each region, in every implementation."""

from functools import lru_cache

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from detcore.data.synthetic import synthetic_batches
from detcore.ops.mask_targets import mask_targets, mask_targets_reference

KINDS = ("plain", "huge", "thin", "outside", "crossing", "tiny", "grid", "level")


def polygon(random: np.random.Generator, kind: str) -> np.ndarray:
    """float32 [p, 2]: points in pixels of a canvas of about 100 x 100."""
    n = int(random.integers(3, 12))
    angles = np.sort(random.uniform(0, 2 * np.pi, n))
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    centre, radius = random.uniform(0, 100, 2), random.uniform(2, 40)
    points = {
        "plain": lambda: centre + circle * radius,
        "huge": lambda: centre + circle * random.uniform(300, 3_000),
        "thin": lambda: centre + circle * radius * random.permutation([1, random.choice([0, 0.01, 0.3])]),
        "outside": lambda: centre + random.choice([-250, 250], 2) + circle * radius,
        "crossing": lambda: random.uniform(-20, 120, (n, 2)),
        "tiny": lambda: centre + circle * random.uniform(0, 0.6),
        "grid": lambda: random.integers(-10, 110, (n, 2)) / random.choice([1, 2, 5, 10]),
        "level": lambda: np.repeat(random.integers(0, 100, (n, 2)), 2, 0)[:, [0, 1]].reshape(-1, 2)[:, ::1],
    }[kind]()
    if kind == "level":  # every edge level or straight down
        points[1::2, 0] = np.roll(points[::2, 0], -1)
    return points.astype(np.float32)


def coco(parts: list[np.ndarray], region: np.ndarray, resolution: int) -> np.ndarray:
    """bool [R, R]: the original's crop, resize and convert of polygons, with its float32 arithmetic."""
    x1, y1, x2, y2 = region
    ratio = [np.float32(resolution / float(max(side, 1))) for side in (x2 - x1, y2 - y1)]
    moved = [((part - region[:2]) * np.array(ratio, np.float32)).astype(np.float64).ravel().tolist() for part in parts]
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(moved, resolution, resolution))) == 1


def regions(random: np.random.Generator, count: int) -> np.ndarray:
    """float32 [count, 4]: some smaller than a pixel, some beside the canvas, some on whole pixels."""
    corner = random.uniform(-20, 90, (count, 2))
    found = np.concatenate(
        [corner, corner + random.uniform(0.2, 90, (count, 2)) ** random.choice([0.2, 1], (count, 1))], 1
    )
    found[::5] = found[::5].round()
    return found.astype(np.float32)


def edges_of(boxes: list[list[np.ndarray]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """edges [E, 4] and what they belong to [E, 2] of boxes, each a list of polygons."""
    edges, of = [np.zeros((0, 4), np.float32)], [np.zeros((0, 2), np.int64)]
    for box, parts in enumerate(boxes):
        for part, points in enumerate(parts):
            edges.append(np.concatenate([points, np.roll(points, -1, 0)], 1))
            of.append(np.tile([box, part], (len(points), 1)))
    edges.append(np.full((padding, 4), 7, np.float32))
    of.append(np.full((padding, 2), -1))
    return torch.from_numpy(np.concatenate(edges)), torch.from_numpy(np.concatenate(of))


@lru_cache
def case(seed: int, boxes: int, resolution: int) -> tuple[tuple[torch.Tensor, ...], np.ndarray]:
    """The arguments for one image of boxes of every kind, a region for each, and what pycocotools says."""
    random = np.random.default_rng(seed)
    parts = []
    for _ in range(boxes):
        kinds = random.choice(KINDS, random.choice([1, 1, 1, 2, 3]))
        parts.append([polygon(random, kind) for kind in kinds])
    where, order = regions(random, boxes), random.permutation(boxes)
    given = *edges_of(parts, padding=int(random.integers(4))), torch.from_numpy(where[order]), torch.from_numpy(order)
    wanted = np.stack([coco(parts[box], where[box], resolution) for box in order])
    return tuple(part[None] for part in given), wanted


def check(call, given: tuple[torch.Tensor, ...], wanted: np.ndarray, device="cpu") -> None:
    found = call(*(part.to(device) for part in given), wanted.shape[-1]).cpu()
    assert found.dtype == torch.bool and found.shape == (1, *wanted.shape)
    wrong = np.flatnonzero((found[0].numpy() != wanted).any((1, 2)))
    assert not len(wrong), f"regions {wrong}: box {given[3][0, wrong[0]]} in {given[2][0, wrong[0]]}"


@pytest.mark.parametrize("seed", range(7))
def test_ten_thousand_polygons_are_those_of_coco(implementation, seed):
    """1,000 boxes of one to three polygons for each seed."""
    given, wanted = case(seed, 1000, 28)
    assert wanted.sum() > 100_000
    check(mask_targets, given, wanted, implementation.device)
    if implementation.name == "cpu":
        check(mask_targets_reference, given, wanted)


@pytest.mark.parametrize("resolution", [1, 2, 7, 14, 28, 31, 32, 33, 56, 63, 64, 65, 130])
def test_any_resolution(implementation, resolution):
    given, wanted = case(100 + resolution, 40, resolution)
    check(mask_targets, given, wanted, implementation.device)
    check(mask_targets_reference, given, wanted)


def test_a_resolution_beyond_any_buffer(implementation):
    check(mask_targets, *case(5, 3, 520), implementation.device)


def test_a_polygon_of_many_edges(implementation):
    """Longer than the original's buffer of 6,144 entries."""
    angles = np.linspace(0, 2 * np.pi, 7001)[:-1]
    radius = 40 + 3 * np.sin(angles * 300)
    points = (50 + np.stack([np.cos(angles), np.sin(angles)], 1) * radius[:, None]).astype(np.float32)
    edges, of = edges_of([[points]], 0)
    where = np.array([5, 4, 97, 95], np.float32)
    given = edges[None], of[None], torch.from_numpy(where)[None, None], torch.zeros(1, 1, dtype=torch.int64)
    found = mask_targets(*(part.to(implementation.device) for part in given), 28).cpu()
    assert np.array_equal(found[0, 0].numpy(), coco([points], where, 28)) and found.sum() > 300


def scenes(images: int, boxes: int, seed: int = 1) -> tuple[torch.Tensor, ...]:
    """Several images with padding of their own, boxes without edges, regions without boxes, boxes of many regions."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(images):
        parts = [[polygon(random, "plain") for _ in range(random.integers(0, 3))] for _ in range(boxes)]
        made.append(edges_of(parts, 0))
    most = max(len(edges) for edges, _ in made) + 3
    edges, of = torch.zeros(images, most, 4), torch.full((images, most, 2), -1)
    for n, (own, belongs) in enumerate(made):
        edges[n, : len(own)], of[n, : len(own)] = own, belongs
    where = torch.from_numpy(np.stack([regions(random, 2 * boxes) for _ in range(images)]))
    return edges, of, where, torch.from_numpy(random.integers(-2, boxes + 2, (images, 2 * boxes)))


def test_batches_equal_the_reference(implementation):
    for images, boxes in ((1, 1), (3, 5), (2, 9)):
        given = scenes(images, boxes, images)
        found = mask_targets(*(part.to(implementation.device) for part in given), 14).cpu()
        assert torch.equal(found, mask_targets_reference(*given, 14))
        assert not found[given[3] < 0].any()


def test_no_boxes_no_edges_no_regions(implementation):
    edges, of, where, boxes = (part.to(implementation.device) for part in scenes(2, 3))
    assert not mask_targets(edges[:, :0], of[:, :0], where, boxes, 14).any()
    assert mask_targets(edges, of, where[:, :0], boxes[:, :0], 14).shape == (2, 0, 14, 14)
    assert mask_targets(edges[:0], of[:0], where[:0], boxes[:0], 14).shape == (0, 6, 14, 14)
    assert not mask_targets(edges, torch.full_like(of, -1), where, boxes, 14).any()


def test_coordinates_that_are_no_numbers_or_too_large_end(implementation):
    nan, inf = float("nan"), float("inf")
    edges = torch.tensor([[[0, 0, inf, 9], [nan, 0, 5, 5], [-3e38, 3e38, 3e38, -3e38], [-inf, nan, 1e20, 4]]])
    of, boxes = torch.zeros(1, 4, 2, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)
    where = torch.tensor([[[0, 0, 10, 10], [nan, 0, 1, 1], [0, -inf, inf, 9.0]]])
    given = edges, of, where, boxes
    found = mask_targets(*(part.to(implementation.device) for part in given), 14).cpu()
    assert torch.equal(found, mask_targets(*given, 14).cpu()) and found.shape == (1, 3, 14, 14)


def test_pixels_come_back_at_their_own_resolution(implementation):
    """A synthetic batch: regions of whole pixels at a scale of one hold the pixels whose middle is inside."""
    batch = next(synthetic_batches(3, (64, 64), 2, 4, seed=4, max_edges=200))
    where = torch.tensor([0.0, 0, 64, 64]).expand(2, 4, 4).contiguous()
    boxes = torch.where(batch.labels >= 0, torch.arange(4), -1)
    given = batch.edges, batch.edge_of, where, boxes
    found = mask_targets(*(part.to(implementation.device) for part in given), 64).cpu()
    centre = (batch.boxes[..., :2] + batch.boxes[..., 2:]) / 2
    half = (batch.boxes[..., 2:] - batch.boxes[..., :2]).clamp(min=1e-6) / 2
    at = torch.stack(torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="xy"), 2)
    inside = (((at - centre[:, :, None, None]) / half[:, :, None, None]) ** 2).sum(-1) < 1
    real = batch.labels >= 0
    assert (found[real] != inside[real]).float().mean() < 0.01 and found[real].any((1, 2)).all()


def test_opcheck(implementation):
    inputs = tuple(part.to(implementation.device) for part in scenes(2, 3))
    torch.library.opcheck(torch.ops.detcore.mask_targets.default, (*inputs, 14))


def test_views_and_other_layouts(implementation):
    edges, of, where, boxes = scenes(2, 4)
    moved = edges.transpose(1, 2).contiguous().transpose(1, 2), of, where[:, ::2], boxes[:, ::2]
    found = mask_targets(*(part.to(implementation.device) for part in moved), 14).cpu()
    assert torch.equal(found, mask_targets_reference(*moved, 14))


def test_wrong_arguments_are_refused(implementation):
    edges, of, where, boxes = (part.to(implementation.device) for part in scenes(2, 3))
    op = torch.ops.detcore.mask_targets
    for wrong, words in (
        ((edges[..., :3].contiguous(), of, where, boxes, 14), "edges"),
        ((edges.double(), of, where, boxes, 14), "edges"),
        ((edges, of[:, 1:].contiguous(), where, boxes, 14), "edge_of"),
        ((edges, of.int(), where, boxes, 14), "edge_of"),
        ((edges, of, where[:1], boxes, 14), "regions"),
        ((edges, of, where, boxes.int(), 14), "box_of"),
        ((edges, of, where, boxes, 0), "resolution"),
        ((edges, of, where, boxes, 2**24 + 1), "resolution"),
    ):
        with pytest.raises(RuntimeError, match=words):
            op(*wrong)
