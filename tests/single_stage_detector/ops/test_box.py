"""Box loss: the reference against derivatives, the native op against the reference."""

import pytest
import torch
from torch.nn import functional as F

from detcore.boxes import encode
from detcore.ops.match import IGNORED, UNMATCHED
from single_stage_detector.ops.box import KEPT_IN_FLOAT16, box_loss, box_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(seed: int, images: int, rows: int, boxes: int = 4, before=3, after=2):
    """float64 deltas [N, R, 4], and all other arguments for `before` and `after` more anchors than those rows."""
    generator = torch.Generator().manual_seed(seed)
    total = before + rows + after

    def corners(*shape):
        low = torch.rand(*shape, 2, generator=generator) * 90
        return torch.cat((low, low + 3 + torch.rand(*shape, 2, generator=generator) * 60), -1)

    choices = torch.tensor([IGNORED, UNMATCHED, *range(boxes)])
    matched = choices[torch.randint(len(choices), (images, total), generator=generator)]
    deltas = torch.randn(images, rows, 4, generator=generator, dtype=torch.float64)
    weight = torch.rand(images, generator=generator, dtype=torch.float64)
    labels = torch.zeros(images, boxes, dtype=torch.int64)
    return deltas, corners(total), corners(images, boxes), matched, labels, weight, before


def value_and_gradient(loss, deltas, *arguments, factor=1.0):
    deltas = deltas.clone().requires_grad_()
    value = loss(deltas, *arguments)
    (value * factor).backward()
    return value.detach(), deltas.grad


def check(implementation, dtype, deltas, a, boxes, matched, labels, weight, first, factor=1.0) -> None:
    """The implementation's value and gradient, which must be those of float64 from the same rounded deltas."""
    deltas, device = deltas.to(dtype), implementation.device
    arguments = (x.to(device) for x in (a, boxes, matched, labels, weight.float()))
    found, gradient = value_and_gradient(box_loss, deltas.to(device), *arguments, first, factor=factor)
    exact = (a.double(), boxes.double(), matched, labels, weight.float().double(), first)
    expected, wanted = value_and_gradient(box_reference, deltas.double(), *exact, factor=factor)
    assert found.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(found.cpu().double(), expected, rtol=3e-6, atol=1e-9)
    torch.testing.assert_close(gradient.cpu().double(), wanted, rtol=2**-7 if dtype != torch.float32 else 1e-6, atol=0)


def test_reference_is_the_l1_loss_of_the_encoded_boxes():
    deltas, a, boxes, matched, labels, weight, first = case(1, 2, 12)
    value, gradient = value_and_gradient(box_reference, deltas, a.double(), boxes, matched, labels, weight, first)
    expected = 0
    for image, row in ((matched[:, first : first + 12]) >= 0).nonzero().tolist():
        box = boxes[image, matched[image, first + row]].double()
        wanted = encode(box, a[first + row].double())
        expected += weight[image] * F.l1_loss(deltas[image, row], wanted, reduction="sum")
    torch.testing.assert_close(value, expected)
    assert (gradient[matched[:, first : first + 12] < 0] == 0).all()


def test_gradcheck_of_the_reference():
    deltas, a, boxes, *rest = case(2, 2, 6)
    arguments = (a.double(), boxes, *rest)
    assert torch.autograd.gradcheck(lambda x: box_reference(x, *arguments), (deltas.requires_grad_(),))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("images", "rows"), [(1, 1), (2, 9), (3, 300), (1, 2049)])
def test_equals_the_reference(implementation, images, rows, dtype):
    check(implementation, dtype, *case(rows, images, rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.25, 1.0, KEPT_IN_FLOAT16])
def test_what_comes_from_above(implementation, factor, dtype):
    check(implementation, dtype, *case(7, 2, 21), factor=factor)


def test_a_weight_of_1_does_not_overflow_in_float16(implementation):
    deltas, a, boxes, matched, labels, weight, first = case(7, 2, 21)
    check(implementation, torch.float16, deltas, a, boxes, matched, labels, torch.ones_like(weight), first)


def test_deltas_that_are_met_have_no_gradient(implementation):
    a = torch.tensor([[10.0, 10, 20, 20]], device=implementation.device)
    zeros = torch.zeros(1, 1, dtype=torch.int64, device=implementation.device)
    arguments = (torch.zeros_like(a)[None], a, a[None], zeros, zeros, torch.ones(1, device=implementation.device))
    value, gradient = value_and_gradient(box_loss, *arguments)
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize(("images", "rows", "boxes"), [(0, 4, 3), (2, 0, 3), (2, 5, 0)])
def test_nothing_to_learn(implementation, images, rows, boxes):
    deltas, *rest, first = case(1, images, rows, boxes)
    rest[-1] = rest[-1].float()
    inputs = [x.to(implementation.device) for x in (deltas.float(), *rest)]
    for loss in (box_loss, box_reference):
        value, gradient = value_and_gradient(loss, *inputs, first)
        assert value == 0 and gradient.shape == deltas.shape and not gradient.any()


def test_boxes_of_no_size_that_nothing_matches_leave_numbers(implementation):
    deltas, a, boxes, matched, *rest, first = case(3, 1, 6)
    boxes[:, 0], matched = 0, matched.where(matched != 0, UNMATCHED)
    check(implementation, torch.float32, deltas, a, boxes, matched, *rest, first)


def test_a_second_backward_pass_is_refused(implementation):
    deltas, *rest, first = case(2, 1, 3)
    rest[-1] = rest[-1].float()
    deltas, *rest = (x.to(implementation.device) for x in (deltas.float(), *rest))
    value = box_loss(deltas.requires_grad_(), *rest, first)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        value.backward()


def test_opcheck(implementation):
    deltas, *rest, first = case(2, 2, 5)
    rest[-1] = rest[-1].float()
    deltas, *rest = (x.to(implementation.device) for x in (deltas.float(), *rest))
    op = torch.ops.single_stage_detector.box.default
    torch.library.opcheck(op, (deltas, *rest, first))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (deltas.requires_grad_(), *rest, first), test_utils=checks)
