"""Targets and losses: golden values, the original's matching written plainly, several processes, float64 gradients."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from detcore.boxes import encode, iou
from detcore.ops.match import match
from efficientdet.anchors import PER_CELL, anchors
from efficientdet.loss import MATCH, losses, losses_of_targets
from efficientdet.ops.wanted_deltas import wanted_deltas

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "efficientdet.json").read_text())
SIZE, CLASSES = (128, 128), 3


def assign(grid: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Classes int64 [N, A], -1 where there is none, deltas [N, A, 4] and the number of positives."""
    matched = match(grid, boxes, labels, **MATCH)
    positive = matched >= 0
    own = labels if labels.shape[1] else labels.new_full((len(labels), 1), -1)
    classes = own.gather(1, matched.clamp(min=0)).masked_fill(~positive, -1)
    return classes, wanted_deltas(grid, boxes, matched), positive.sum().to(grid.dtype)


def some_boxes(images: int, boxes: int, seed: int = 0, size: int = 128) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(images, boxes, 2, generator=generator) * size * 0.7
    found = torch.cat((corners, corners + 4 + torch.rand(images, boxes, 2, generator=generator) * 60), 2)
    labels = torch.randint(-1, CLASSES, (images, boxes), generator=generator)
    return found.masked_fill((labels < 0)[..., None], 0), labels


def some_outputs(images: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    cells = [16 * 16, 8 * 8, 4 * 4, 2 * 2, 1]
    made = [
        [scale * torch.randn(images, n * PER_CELL, values, generator=generator, dtype=dtype) for n in cells]
        for scale, values in ((1.0, CLASSES), (0.3, 4))
    ]
    return made[0], made[1]


@pytest.mark.parametrize("padded", [3, 50])
def test_golden_assignment(padded):
    golden = GOLDEN["label_check"]
    boxes, labels = torch.zeros(1, padded, 4), torch.full((1, padded), -1)
    boxes[0, -3:] = torch.tensor(golden["gt_yxyx"]).float()[:, [1, 0, 3, 2]]
    labels[0, -3:] = torch.tensor(golden["classes_1based"]) - 1
    classes, deltas, positives = assign(anchors((512, 512)), boxes, labels)
    assert int(positives) == golden["positives"] == int((classes >= 0).sum())
    first, sums = 0, []
    for count, (_, expected) in zip(
        GOLDEN["anchors_d0"]["per_level"], golden["per_level_positives_by_class_index"].items()
    ):  # fmt: skip
        part = classes[0, first : first + count]
        assert {str(int(k)): int((part == k).sum()) for k in part.unique() if k >= 0} == expected
        sums.append(float(deltas[0, first : first + count].abs().sum()))
        first += count
    assert sums == pytest.approx([18.8584, 8.9331, 8.7988, 10.7672, 0], abs=1e-4)  # effdet 0.4.1


@pytest.mark.parametrize("seed", range(4))
def test_assignment_is_the_originals(seed):
    """The rule of the original written with the whole matrix of overlaps, image by image."""
    grid = anchors(SIZE)
    boxes, labels = some_boxes(3, 7, seed)
    classes, deltas, positives = assign(grid, boxes, labels)
    count = 0
    for row, (box, label) in enumerate(zip(boxes, labels)):
        box, label = box[label >= 0], label[label >= 0]
        expected = torch.full((len(grid),), -1)
        if len(box):
            overlaps = iou(box, grid)
            best, owner = overlaps.max(0)
            expected = torch.where(best >= 0.5, owner, -1)
            for number in reversed(range(len(box))):  # of several claims the first box's counts
                expected[overlaps[number].argmax()] = number
        positive = expected >= 0
        count += int(positive.sum())
        assert torch.equal(classes[row], torch.where(positive, label[expected.clamp(min=0)] if len(box) else -1, -1))
        torch.testing.assert_close(deltas[row][positive], encode(box[expected[positive]], grid[positive]))
        assert not deltas[row][~positive].any()
    assert int(positives) == count


def test_boxes_that_overlap_nothing_are_left_out():
    """Outside the canvas, and without area: no positive, and a finite loss."""
    boxes = torch.tensor([[[5000.0, 5000, 5100, 5100], [20, 20, 20, 40], [0, 0, 0, 0]]])
    classes, _, positives = assign(anchors(SIZE), boxes, torch.tensor([[0, 1, 2]]))
    assert int(positives) == 0 and (classes == -1).all()


def drawn_targets() -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """The outputs and targets of the golden losses: levels of 8, 4, 2, 1 and 1 cells a side, 3 classes, 2 images."""
    random, sides = np.random.RandomState(1234), (8, 4, 2, 1, 1)
    logits, deltas, classes, wanted = [], [], [], []
    for side in sides:
        logits.append(torch.from_numpy(random.randn(2, 27, side, side).astype(np.float32)))
        deltas.append(torch.from_numpy((0.5 * random.randn(2, 36, side, side)).astype(np.float32)))
    assert logits[0].flatten()[:3].tolist() == pytest.approx(GOLDEN["loss"]["first_logits"])
    for side in sides:
        of_level = random.randint(-2, 3, (2, side, side, 9))
        box = (0.3 * random.randn(2, side, side, 9, 4)).astype(np.float32)
        box[of_level < 0] = 0
        classes.append(torch.from_numpy(of_level).reshape(2, -1))
        wanted.append(torch.from_numpy(box).reshape(2, -1, 4))
    rows = [[x.permute(0, 2, 3, 1).reshape(2, -1, n).contiguous() for x in xs] for xs, n in ((logits, 3), (deltas, 4))]
    return *rows, torch.cat(classes, 1), torch.cat(wanted, 1)


@pytest.mark.parametrize("skip_zero_targets", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_golden_losses(smoothing, skip_zero_targets):
    golden = GOLDEN["loss"][str(smoothing)]
    logits, deltas, classes, wanted = drawn_targets()
    positives = (classes >= 0).sum(1)
    assert positives.tolist() == GOLDEN["loss"]["positives"] and (classes == -2).sum() == GOLDEN["loss"]["ignored"]
    for x in (*logits, *deltas):
        x.requires_grad_()
    normaliser = (positives.sum() + 1).float()
    labels = torch.arange(3).expand(2, 3)  # so that a match is a class
    terms = losses_of_targets((logits, deltas), classes, labels, wanted, normaliser, smoothing, skip_zero_targets)
    sum(terms.values()).backward()
    assert float(terms["cls"].detach()) == pytest.approx(golden["class"], rel=1e-6)
    assert float(terms["box"].detach()) == pytest.approx(50 * golden["box"], rel=1e-6)
    assert float(sum(x.grad.abs().sum() for x in logits)) == pytest.approx(golden["abs_dlogits"], rel=1e-6)
    assert float(sum(x.grad.abs().sum() for x in deltas)) == pytest.approx(golden["abs_ddeltas"], rel=1e-6)
    assert float(logits[0].grad[0, 0, 0]) == pytest.approx(golden["first_dlogit"], rel=1e-5)
    assert float(deltas[0].grad[0, 0, 0]) == pytest.approx(golden["first_ddelta"], rel=1e-5)


def test_coordinates_whose_target_is_zero():
    """A box equal to its anchor: four errors count; as in the original, none."""
    grid = anchors(SIZE)
    number = int(((grid[:, :2] >= 0) & (grid[:, 2:] <= 128)).all(1).nonzero()[0])
    boxes, labels = grid[number].view(1, 1, 4), torch.zeros(1, 1, dtype=torch.int64)
    logits, deltas = some_outputs(1)
    deltas = [torch.full_like(x, 0.5) for x in deltas]
    classes, wanted, positives = assign(grid, boxes, labels)
    zeros = int((wanted[classes >= 0] == 0).sum())
    assert zeros >= 4
    terms = [losses((logits, deltas), grid, boxes, labels, skip_zero_targets=skip)["box"] for skip in (False, True)]
    one = 50 / 4 * (0.1 * (0.5 - 0.05)) / (float(positives) + 1)
    assert float(terms[0] - terms[1]) == pytest.approx(zeros * one, rel=1e-4)


def test_two_processes_are_one():
    """The mean over processes of each one's loss is the loss of all images."""
    grid = anchors(SIZE)
    outputs, (boxes, labels) = some_outputs(4), some_boxes(4, 5)
    together = losses(outputs, grid, boxes, labels)
    total = assign(grid, boxes, labels)[2]
    parts = []
    for part in (slice(0, 1), slice(1, 4)):
        own = tuple([x[part] for x in levels] for levels in outputs)
        parts.append(losses(own, grid, boxes[part], labels[part], mean_over_ranks=lambda _: total / 2, ranks=2))
    for name, value in together.items():
        torch.testing.assert_close((parts[0][name] + parts[1][name]) / 2, value)
    alone = losses(outputs, grid, boxes, labels, mean_over_ranks=lambda positives: positives, ranks=1)
    assert alone == together


def plain_losses(outputs: tuple, grid: Tensor, boxes: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """The formulas of the specification, with one-hot targets and autograd."""
    logits, deltas = (torch.cat(levels, 1) for levels in outputs)
    classes, wanted, positives = assign(grid, boxes, labels)
    t = F.one_hot(classes.clamp(min=0), CLASSES).to(logits.dtype) * (classes >= 0)[..., None]
    p = logits.sigmoid()
    right = t * p + (1 - t) * (1 - p)
    entropy = F.binary_cross_entropy_with_logits(logits, t * (1 - smoothing) + smoothing / 2, reduction="none")
    cls = ((t * 0.25 + (1 - t) * 0.75) * (1 - right) ** 1.5 * entropy).sum()
    error = (deltas - wanted).abs()
    small = error.clamp(max=0.1)
    box = ((0.5 * small**2 + 0.1 * (error - small)) * (classes >= 0)[..., None]).sum()
    return (cls + 50 * box / 4) / (positives + 1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradients_in_float64(smoothing):
    grid, (boxes, labels) = anchors(SIZE).double(), some_boxes(2, 6)
    logits, deltas = some_outputs(2, 3, torch.float64)
    wide = [x.requires_grad_() for x in (*logits, *deltas)]
    ours = sum(losses((logits, deltas), grid, boxes.double(), labels, smoothing).values())
    plain = plain_losses((logits, deltas), grid, boxes.double(), labels, smoothing)
    torch.testing.assert_close(ours, plain, rtol=1e-8, atol=0)
    for a, b in zip(torch.autograd.grad(ours, wide), torch.autograd.grad(plain, wide)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("boxes", [0, 4])
def test_images_without_boxes(boxes):
    """The normaliser is 1, and there is no box loss."""
    outputs, grid = some_outputs(2), anchors(SIZE)
    terms = losses(outputs, grid, torch.zeros(2, boxes, 4), torch.full((2, boxes), -1))
    x = torch.cat([level.flatten() for level in outputs[0]]).double()
    expected = (0.75 * x.sigmoid() ** 1.5 * F.softplus(x)).sum()
    assert float(terms["cls"]) == pytest.approx(float(expected), rel=1e-5) and float(terms["box"]) == 0


def test_bfloat16_outputs():
    outputs, (boxes, labels), grid = some_outputs(2), some_boxes(2, 5), anchors(SIZE)
    narrow = tuple([x.bfloat16().requires_grad_() for x in levels] for levels in outputs)
    wide = tuple([x.detach().float() for x in levels] for levels in narrow)
    found, expected = (losses(given, grid, boxes, labels) for given in (narrow, wide))
    assert all(value.dtype == torch.float32 for value in found.values())
    torch.testing.assert_close(found, expected)
    sum(found.values()).backward()
    assert all(x.grad.dtype == torch.bfloat16 and x.grad.isfinite().all() for x in (*narrow[0], *narrow[1]))
