"""Matching by the native op: bit for bit that of the reference, in every implementation."""

import json
from pathlib import Path

import pytest
import torch

from detcore.device import native
from ssd300.anchors import priors
from ssd300.ops.multibox import BACKGROUND, MATCH, match, match_reference

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "ssd300.json").read_text())
PRIORS = priors()
SOME = torch.cat((PRIORS[300:5776:41], PRIORS[5776::7]))
"""Of all sizes, and some of the same middle."""


def truth(seed: int, images: int, padded: int, used: float = 0.5, step: float = 0.5):
    """Boxes on multiples of `step` pixels, so that ties are common; padding anywhere, with any content."""
    generator = torch.Generator().manual_seed(seed)
    low = (torch.rand(images, padded, 2, generator=generator) * 280 / step).round() * step
    extent = (torch.rand(images, padded, 2, generator=generator) ** 2 * 250 / step).round() * step
    labels = torch.randint(9, (images, padded), generator=generator)
    labels = labels.where(torch.rand(images, padded, generator=generator) < used, -1)
    return torch.cat((low, low + extent), 2), labels


def check(implementation, table, boxes, labels) -> torch.Tensor:
    """The implementation's answer, which must be the reference's."""
    found = match(*(x.to(implementation.device) for x in (table, boxes, labels))).cpu()
    assert found.dtype == torch.int64
    assert torch.equal(found, match_reference(table, boxes, labels))
    return found


@pytest.mark.parametrize("name", ["matching_check", "matching_check_tie_free"])
def test_golden_vectors(implementation, name):
    case = GOLDEN[name]
    boxes = (torch.tensor([case["gt_ltrb"]], dtype=torch.float64) * 300).float()
    found = check(implementation, PRIORS, boxes, torch.tensor([case["classes"]]) - 1)
    assert int((found >= 0).sum()) == case["positives"]
    for box, forced in enumerate(case["forced_prior_per_gt"]):
        assert found[0, forced] == box


@pytest.mark.parametrize("used", [0.2, 1.0])
@pytest.mark.parametrize(("images", "padded"), [(1, 1), (3, 7), (2, 40), (5, 33)])
def test_equals_the_reference(implementation, images, padded, used):
    found = check(implementation, SOME, *truth(images + padded, images, padded, used))
    assert (found == BACKGROUND).any()


@pytest.mark.parametrize("step", [0.5, 8.0, 1 / 3])
def test_all_priors(implementation, step):
    found = check(implementation, PRIORS, *truth(7, 2, 12, 0.8, step))
    assert (found >= 0).any()


def test_more_boxes_than_any_buffer_holds(implementation):
    """Most of them meet on some prior."""
    found = check(implementation, SOME, *truth(1, 2, 700, used=0.6))
    assert (found >= 300).any()


@pytest.mark.parametrize("padded", [0, 1, 5])
@pytest.mark.parametrize("images", [0, 1, 3])
def test_nothing_to_match(implementation, images, padded):
    found = check(implementation, SOME, torch.rand(images, padded, 4) * 300, torch.full((images, padded), -1))
    assert (found == BACKGROUND).all()
    no_priors = (x.to(implementation.device) for x in (SOME[:0], *truth(2, images, padded)))
    assert match(*no_priors).shape == (images, 0)


def test_strange_boxes(implementation):
    """Outside of the image, without area, inverted, equal, infinite, not a number: the reference's answer for all."""
    nan, inf = float("nan"), float("inf")
    boxes = [
        [5000, 5000, 5010, 5010], [-90, -90, -80, -80], [20, 20, 20, 40], [30, 30, 10, 10], [8, 8, 90, 90],
        [8, 8, 90, 90], [0, 0, 300, 300], [0, 0, inf, inf], [nan, 0, 30, 30], [0, 0, 30, nan], [1e30, 0, 2e30, 1e30],
        [-inf, -inf, inf, inf], [1, 1, 1.0000001, 1.0000001],
    ]  # fmt: skip
    labels = torch.zeros(1, len(boxes), dtype=torch.int64)
    every = torch.tensor([boxes], dtype=torch.float32)
    check(implementation, SOME, every, labels)
    for box in range(len(boxes)):
        found = check(implementation, SOME, every[:, box : box + 1], labels[:, :1])
        assert bool((found == 0).any()) is (box not in (2, 3, 8, 9))


def test_the_threshold_is_strict_and_the_last_claim_counts(implementation):
    table = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.25]])
    box = torch.tensor([[[75.0, 75, 225, 225]]])  # the first prior; half of it is the second
    assert check(implementation, table, box, torch.tensor([[0]])).tolist() == [[0, BACKGROUND]]
    twice = check(implementation, table, box.expand(1, 3, 4).contiguous(), torch.tensor([[0, 5, -1]]))
    assert twice.tolist() == [[1, BACKGROUND]]


def test_views_and_other_layouts(implementation):
    boxes, labels = (x.to(implementation.device) for x in truth(4, 3, 20))
    table = SOME.to(implementation.device)
    part = match(table[1::3], boxes[:, 3:17], labels[:, 3:17])
    assert torch.equal(part.cpu(), match_reference(*(x.cpu() for x in (table[1::3], boxes[:, 3:17], labels[:, 3:17]))))


def test_the_number_of_threads_does_not_matter():
    arguments, before = (PRIORS, *truth(3, 5, 9)), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(match(*arguments))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_opcheck(implementation):
    inputs = tuple(x.to(implementation.device) for x in (SOME, *truth(6, 2, 5)))
    torch.library.opcheck(torch.ops.ssd300.multibox_match.default, inputs)


def test_wrong_arguments_are_refused(implementation):
    table, boxes, labels = (x.to(implementation.device) for x in (SOME, *truth(6, 2, 5)))
    for wrong in (
        (table[:, :3].contiguous(), boxes, labels),
        (table, boxes[:1], labels),
        (table, boxes, labels.int()),
        (table.half(), boxes, labels),
        (table, boxes, labels[0]),
    ):
        with pytest.raises(RuntimeError):
            torch.ops.ssd300.multibox_match(*wrong)


def test_float64_is_the_references():
    arguments = (SOME.double(), *truth(4, 3, 20))
    assert torch.equal(match(*arguments), match_reference(*arguments))
    assert not native.runs(MATCH, SOME.double(), dtypes=(torch.float32,))
