"""The multibox loss by the native op: values, gradients and choice of negatives against the reference in float64."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from ssd300.anchors import priors
from ssd300.loss import losses
from ssd300.ops.multibox import BACKGROUND, _kept_in_float16, hardest, multibox_loss, multibox_loss_reference

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "ssd300.json").read_text())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WITH_GRADIENTS = ("test_schema", "test_autograd_registration", "test_faketensor")
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def case(seed: int, images: int, count: int, classes: int, boxes: int = 4, positives: float = 0.1, spread: float = 2.0):
    """float64 (deltas, logits, priors, boxes, labels) of `count` priors and K + 1 = classes, and matches."""
    g = torch.Generator().manual_seed(seed)
    table = torch.cat((torch.rand(count, 2, generator=g), 0.1 + torch.rand(count, 2, generator=g)), 1)
    low, size = torch.rand(images, boxes, 2, generator=g), 0.1 + torch.rand(images, boxes, 2, generator=g)
    matched = torch.randint(boxes, (images, count), generator=g) if boxes else torch.zeros(images, count).long()
    matched = matched.where(torch.rand(images, count, generator=g) < (positives if boxes else 0), BACKGROUND)
    deltas = torch.randn(images, count, 4, generator=g, dtype=torch.float64) * 2
    logits = torch.randn(images, count, classes, generator=g, dtype=torch.float64) * spread
    labels = torch.randint(classes - 1, (images, boxes), generator=g)
    return deltas, logits, table.double(), (torch.cat((low, low + size), 2) * 300).double(), labels, matched


def values_and_gradients(loss, deltas, logits, *truth, factors=(1.0, 1.0), **settings):
    deltas, logits = deltas.clone().requires_grad_(), logits.clone().requires_grad_()
    box, cls = loss(deltas, logits, *truth, **settings)
    (box * factors[0] + cls * factors[1]).backward()
    return [x.detach().cpu() for x in (box, cls)], [deltas.grad.cpu(), logits.grad.cpu()]


def check(implementation, dtype, made, factors=(1.0, 1.0), **settings):
    """The implementation's results, which must be those of float64 from the same rounded numbers."""
    deltas, logits, *truth = made
    deltas, logits = deltas.to(dtype), logits.to(dtype)
    truth = [x.float() if x.is_floating_point() else x for x in truth]
    device = implementation.device
    low = [x.to(device) for x in (deltas, logits, *truth)]
    found, gradients = values_and_gradients(multibox_loss, *low, factors=factors, **settings)
    exact = [x.double() if x.is_floating_point() else x for x in (deltas, logits, *truth)]
    expected, wanted = values_and_gradients(multibox_loss_reference, *exact, factors=factors, **settings)
    for own, other in zip(found, expected):
        assert own.dtype == torch.float32 and own.shape == ()
        torch.testing.assert_close(own.double(), other, rtol=1e-5, atol=1e-6)
    for own, other, factor in zip(gradients, wanted, factors):
        assert own.dtype == dtype
        rounding = ROUNDING[dtype] * (2 if math.log2(factor) % 1 else 1)  # else multiplied exactly
        torch.testing.assert_close(own.double(), other, rtol=rounding, atol=factor * 2e-5 / max(1, len(logits)))
    return found, gradients


@pytest.mark.parametrize("name", ["matching_check", "matching_check_tie_free"])
def test_golden_vectors(implementation, name):
    golden = GOLDEN[name]
    boxes = (torch.tensor([golden["gt_ltrb"]], dtype=torch.float64) * 300).float()
    outputs = torch.zeros(1, 8732, 4), torch.zeros(1, 8732, 81)
    arguments = (priors(), boxes, torch.tensor([golden["classes"]]) - 1)
    device = implementation.device
    found = losses(tuple(x.to(device) for x in outputs), *(x.to(device) for x in arguments))
    assert found["box"].item() == pytest.approx(golden["location_part"], abs=1e-5)
    assert found["cls"].item() == pytest.approx(golden["confidence_part"], abs=1e-4)
    assert sum(found.values()).item() == pytest.approx(golden["loss_zero_logits_zero_offsets"], abs=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 2), (2, 130, 2), (3, 7, 81), (2, 45, 8), (1, 300, 21), (2, 5, 91), (1, 2, 515), (2, 400, 4)]
)
def test_equals_the_reference(implementation, shape, dtype):
    check(implementation, dtype, case(sum(shape), *shape))


@pytest.mark.parametrize("positives", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("empty_negatives", [0, 3, 1000])
def test_few_and_many_positives(implementation, positives, empty_negatives):
    made = case(3, 3, 160, 6, positives=positives)
    made[5][1] = BACKGROUND  # the image between has none
    found, (deltas, logits) = check(implementation, torch.float32, made, empty_negatives=empty_negatives)
    assert (logits[1] != 0).any(1).sum() == min(160, empty_negatives) and not deltas[1].any()
    assert found[1] > 0 or (positives == 0 and empty_negatives == 0)


@pytest.mark.parametrize("spread", [0.01, 1, 30])
def test_small_and_large_logits(implementation, spread):
    check(implementation, torch.float32, case(3, 2, 40, 16, spread=spread))


@pytest.mark.parametrize("boxes", [0, 2])
def test_no_objects(implementation, boxes):
    check(implementation, torch.float32, case(4, 2, 40, 5, boxes=boxes, positives=0))


@pytest.mark.parametrize("templates", [1, 2, 7])
def test_of_equal_rows_the_first_are_chosen(implementation, templates):
    """Rows of few kinds, so that the limit falls among equal ones; in one image also among positives worth nothing."""
    deltas, logits, *truth = case(5, 3, 330, 5, positives=0.05)
    kinds = torch.randn(templates, 5, generator=torch.Generator().manual_seed(1)) * 3
    logits = kinds[torch.arange(330) * 31 % templates].expand(3, 330, 5).contiguous()
    logits[2, 5:, 0] = 500  # a cross-entropy of exactly 0
    matched = truth[3]
    entropy = F.cross_entropy(logits.double().flatten(0, 1), torch.zeros(990, dtype=torch.int64), reduction="none")
    worth = torch.where(matched >= 0, 0, entropy.view(3, 330))
    kept = (matched >= 0) | hardest(worth, 3 * (matched >= 0).sum(1))
    arguments = [deltas.float(), logits, *(x.float() if x.is_floating_point() else x for x in truth)]
    _, gradients = values_and_gradients(multibox_loss, *(x.to(implementation.device) for x in arguments))
    found = (gradients[1] != 0).any(2)
    visible = (matched >= 0) | (entropy.view(3, 330) > 0)  # the gradients of the others are 0 either way
    assert torch.equal(found & visible, kept & visible)


def test_all_the_priors(implementation):
    if implementation.name == "emulated gpu":
        made = case(8, 1, 8732, 3, positives=0.004)
    else:
        made = case(8, 4, 8732, 81, positives=0.004)
    check(implementation, torch.float32, made)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 2, 8])
def test_unaligned_logits(implementation, offset, dtype):
    deltas, logits, *truth = case(5, 2, 30, 21)
    arguments = [x.float() if x.is_floating_point() else x for x in truth]
    arguments = [x.to(implementation.device) for x in (deltas.to(dtype), logits.to(dtype), *arguments)]
    expected, wanted = values_and_gradients(multibox_loss, *arguments)
    place = torch.zeros(offset + logits.numel(), dtype=dtype, device=implementation.device)
    place[offset:] = arguments[1].flatten()
    leaf = place.requires_grad_()
    box, cls = multibox_loss(arguments[0], leaf[offset:].view(logits.shape), *arguments[2:])
    cls.backward()
    assert torch.equal(box.cpu(), expected[0]) and torch.equal(cls.detach().cpu(), expected[1])
    assert torch.equal(leaf.grad[offset:].view(logits.shape).cpu(), wanted[1]) and not leaf.grad[:offset].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", [(0.25, 2.0), (65536.0, 65536.0), (3.0, 0.7)])
def test_what_comes_from_above(implementation, factors, dtype):
    made = case(6, 4, 50, 8)
    check(implementation, dtype, made, factors=factors)


@pytest.mark.parametrize("images", [1, 2])
def test_the_largest_float16_gradients_are_finite(implementation, images):
    """One positive in each image, wrong in everything by as much as can be."""
    logits = torch.zeros(images, 2, 3, dtype=torch.float16)
    logits[..., 0] = 1000
    matched = torch.tensor([[0, BACKGROUND]]).expand(images, 2).contiguous()
    table = torch.tensor([[0.5, 0.5, 0.5, 0.5]]).expand(2, 4).contiguous()
    boxes = torch.tensor([[[75.0, 75, 225, 225]]]).expand(images, 1, 4).contiguous()
    arguments = (torch.full((images, 2, 4), 1000.0).half(), logits, table, boxes, torch.ones(images, 1).long(), matched)
    _, gradients = values_and_gradients(multibox_loss, *(x.to(implementation.device) for x in arguments))
    assert gradients[0][:, 0].tolist() == [[1 / images] * 4] * images
    assert gradients[1][:, 0].tolist() == [[1 / images, 0, -1 / images]] * images


def test_float16_keeps_small_gradients(implementation):
    """What would be 0 in float16 is there when the loss is scaled as GradScaler does."""
    made = case(7, 2, 60, 9, spread=0.1, positives=0.5)  # so every row counts
    made[1][..., 0] += 16
    low = [x.float() if x.is_floating_point() else x for x in made]
    low[0], low[1] = low[0].half(), low[1].half()
    exact = [x.double() if x.is_floating_point() else x for x in low]
    factors = (1.0, _kept_in_float16(2))
    _, (_, gradient) = values_and_gradients(multibox_loss, *(x.to(implementation.device) for x in low), factors=factors)
    _, (_, wanted) = values_and_gradients(multibox_loss_reference, *exact, factors=factors)
    background = made[5] < 0  # there p - 1 of the first class is less exact in float32
    gradient, wanted = gradient.double()[background][:, 1:], wanted[background][:, 1:]
    torch.testing.assert_close(gradient, wanted, rtol=2**-10, atol=2**-24)
    assert wanted.max() / factors[1] < 2**-25 < gradient.min()


def test_what_is_not_a_number_shows(implementation):
    for row in (0, 1):  # a positive one, and one that becomes the hardest
        made = [x.float() if x.is_floating_point() else x for x in case(1, 1, 30, 4)]
        made[5][0], made[5][0, 0] = BACKGROUND, 0
        made[1][0, row, 2] = float("nan")
        (box, cls), (_, gradient) = values_and_gradients(multibox_loss, *(x.to(implementation.device) for x in made))
        assert box.isfinite() and cls.isnan() and gradient[0, row].isnan().all()


def test_a_label_that_is_no_class_shows(implementation):
    made = [x.float() if x.is_floating_point() else x for x in case(1, 1, 30, 4)]
    made[4][:] = 3
    (_, cls), _ = values_and_gradients(multibox_loss, *(x.to(implementation.device) for x in made))
    assert cls.isnan()


def test_deltas_and_logits_of_different_types(implementation):
    made = [x.float() if x.is_floating_point() else x for x in case(2, 2, 30, 4)]
    mixed = [x.to(implementation.device) for x in (made[0], made[1].bfloat16(), *made[2:])]
    _, gradients = values_and_gradients(multibox_loss, *mixed)
    _, wanted = values_and_gradients(multibox_loss_reference, *(x.cpu() for x in mixed))
    for own, other, dtype in zip(gradients, wanted, (torch.float32, torch.bfloat16)):
        assert own.dtype == dtype
        torch.testing.assert_close(own, other, rtol=ROUNDING[dtype], atol=1e-6)


def test_repeats_and_threads_do_not_matter(implementation):
    made = [x.float() if x.is_floating_point() else x for x in case(9, 3, 500, 6)]
    made = [x.to(implementation.device) for x in made]
    expected = values_and_gradients(multibox_loss, *made)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = values_and_gradients(multibox_loss, *made)
    finally:
        torch.set_num_threads(before)
    for own, other in zip((*found[0], *found[1]), (*expected[0], *expected[1])):
        assert torch.equal(own, other)


@pytest.mark.parametrize(("images", "count"), [(0, 5), (2, 0)])
def test_nothing_to_learn(implementation, images, count):
    made = [x.float() if x.is_floating_point() else x for x in case(1, images, count, 8)]
    values, gradients = values_and_gradients(multibox_loss, *(x.to(implementation.device) for x in made))
    assert values == [0, 0] and gradients[1].shape == (images, count, 8)


def test_a_second_backward_pass_is_refused(implementation):
    """But the two losses may go back one after the other."""
    made = [x.float() if x.is_floating_point() else x for x in case(2, 1, 9, 4)]
    deltas, logits, *truth = (x.to(implementation.device) for x in made)
    box, cls = multibox_loss(deltas.requires_grad_(), logits.requires_grad_(), *truth)
    box.backward(retain_graph=True)
    assert logits.grad is None
    cls.backward(retain_graph=True)
    before = deltas.grad.clone(), logits.grad.clone()
    for value in (box, cls):
        with pytest.raises(RuntimeError, match="second backward pass"):
            value.backward(retain_graph=True)
    assert torch.equal(deltas.grad, before[0]) and torch.equal(logits.grad, before[1])


def test_opcheck(implementation):
    made = [x.float() if x.is_floating_point() else x for x in case(2, 2, 20, 4)]
    made = [x.to(implementation.device) for x in made]
    op = torch.ops.ssd300.multibox_loss.default
    torch.library.opcheck(op, (made[0].bfloat16(), made[1].bfloat16(), *made[2:], 3))
    # The last check wants all outputs from a compiled graph; that of the losses alone is the next test's.
    inputs = (made[0].requires_grad_(), made[1].requires_grad_(), *made[2:], 3)
    torch.library.opcheck(op, inputs, test_utils=WITH_GRADIENTS)


def test_compiled_in_one_graph(implementation):
    made = [x.float() if x.is_floating_point() else x for x in case(2, 2, 20, 4)]
    made = [x.to(implementation.device) for x in made]

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss(*arguments):
        return torch.ops.ssd300.multibox_loss(*arguments, 3)[:2]

    found = values_and_gradients(loss, *made, factors=(3, 5))
    expected = values_and_gradients(multibox_loss, *made, factors=(3, 5))
    for own, other in zip((*found[0], *found[1]), (*expected[0], *expected[1])):
        assert torch.equal(own, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 20, 3)}, r"deltas must be \[N, P, 4\]"),
        ({1: torch.zeros(2, 19, 4)}, r"logits must be \[N, P, K \+ 1\]"),
        ({1: torch.zeros(2, 20, 4, dtype=torch.float64)}, "logits must be float32"),
        ({2: torch.zeros(20, 3)}, r"priors must be float32 \[P, 4\]"),
        ({3: torch.zeros(2, 3, 4)}, r"boxes must be float32 \[N, M, 4\]"),
        ({4: torch.zeros(2, 4)}, r"labels must be int64 \[N, M\]"),
        ({5: torch.zeros(2, 19, dtype=torch.int64)}, r"matched must be int64 \[N, P\]"),
        ({6: -1}, "empty_negatives must not be negative"),
    ],
)
def test_wrong_arguments_are_named(implementation, change, message):
    made = [x.float() if x.is_floating_point() else x for x in case(2, 2, 20, 4)] + [3]
    for place, value in change.items():
        made[place] = value
    arguments = [x.to(implementation.device) if isinstance(x, torch.Tensor) else x for x in made]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ssd300.multibox_loss(*arguments)
