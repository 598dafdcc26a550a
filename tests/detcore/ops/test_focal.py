"""Focal loss: the reference against published values, torchvision and derivatives; the native op against it."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from detcore import ops
from detcore.ops import focal as ops_focal
from detcore.ops.match import IGNORED, UNMATCHED
from single_stage_detector.loss import FOCAL

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "retinanet.json").read_text())
KEPT_IN_FLOAT16 = ops_focal.kept_in_float16(**FOCAL)
focal_loss, focal_reference = (partial(f, **FOCAL) for f in (ops_focal.focal_loss, ops_focal.focal_reference))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WITH_GRADIENTS = ("test_schema", "test_autograd_registration", "test_faketensor")
ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def case(seed: int, images: int, rows: int, classes: int, boxes: int = 4, spread: float = 4.0, before=3, after=2):
    """float64 logits [N, R, K]; matches, of `before` and `after` more anchors than those rows; labels and weights."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, rows, classes, generator=generator, dtype=torch.float64) * spread - 1
    labels = torch.randint(classes, (images, boxes), generator=generator)
    choices = torch.tensor([IGNORED, UNMATCHED, UNMATCHED, *range(boxes)])
    places = torch.randint(len(choices), (images, before + rows + after), generator=generator)
    return logits, choices[places], labels, torch.rand(images, generator=generator, dtype=torch.float64), before


def by_torchvision(logits, matched, labels, weight, first) -> torch.Tensor:
    """The same from one-hot targets."""
    total = 0
    for x, match, label, factor in zip(logits, matched[:, first : first + logits.shape[1]], labels, weight):
        one_hot = torch.zeros_like(x)
        rows = (match >= 0).nonzero()[:, 0]
        one_hot[rows, label[match[rows]]] = 1
        total = total + factor * sigmoid_focal_loss(x, one_hot)[match != IGNORED].sum()
    return total


def value_and_gradient(loss, logits, *arguments, factor=1.0):
    logits = logits.clone().requires_grad_()
    value = loss(logits, *arguments)
    (value * factor).backward()
    return value.detach(), logits.grad


def check(implementation, dtype, logits, matched, labels, weight, first, factor=1.0, smallest=1e-9) -> None:
    """The implementation's value and gradient, which must be those of float64 from the same rounded logits."""
    logits, device = logits.to(dtype), implementation.device
    arguments = (matched.to(device), labels.to(device), weight.float().to(device), first)
    found, gradient = value_and_gradient(focal_loss, logits.to(device), *arguments, factor=factor)
    exact = (matched, labels, weight.float().double(), first)
    expected, wanted = value_and_gradient(focal_reference, logits.double(), *exact, factor=factor)
    assert found.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(found.cpu().double(), expected, rtol=3e-6, atol=1e-12)
    rounding = ROUNDING[dtype] * (2 if factor == 3 else 1)  # multiplied by other than a power of 2: rounded again
    smallest = max(smallest, 2**-24 if dtype == torch.float16 else 0)
    torch.testing.assert_close(gradient.cpu().double(), wanted, rtol=rounding, atol=smallest)


def test_golden_points():
    for point in GOLDEN["focal"]["points"]:
        logits = torch.tensor([[[point["logit"]]]], dtype=torch.float64)
        matched = torch.tensor([[0 if point["target"] else UNMATCHED]])
        value = focal_reference(logits, matched, torch.tensor([[0]]), torch.ones(1, dtype=torch.float64))
        assert float(value) == pytest.approx(point["loss"], rel=1e-6)


def test_golden_points_of_the_op(implementation):
    for point in GOLDEN["focal"]["points"]:
        logits = torch.tensor([[[point["logit"]]]], device=implementation.device)
        matched = torch.tensor([[0 if point["target"] else UNMATCHED]], device=implementation.device)
        value = focal_loss(logits, matched, torch.zeros_like(matched), logits.new_ones(1))
        assert float(value) == pytest.approx(point["loss"], rel=2e-6)


@pytest.mark.parametrize("work", [1, 64, 2**18])
def test_gradcheck_of_the_reference(monkeypatch, work):
    monkeypatch.setattr(ops, "work_elements", lambda device: work)
    logits, *rest = case(9, 2, 6, 5)
    assert torch.autograd.gradcheck(lambda x: focal_reference(x, *rest), (logits.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_reference_equals_torchvision(dtype):
    logits, matched, labels, weight, first = case(10, 3, 40, 5)
    low, factor = logits.to(dtype), weight.to(torch.promote_types(dtype, torch.float32))
    value, gradient = value_and_gradient(focal_reference, low, matched, labels, factor, first, factor=3)
    exact = (low.double(), matched, labels, factor.double(), first)
    expected, wanted = value_and_gradient(by_torchvision, *exact, factor=3)
    assert value.dtype == factor.dtype
    torch.testing.assert_close(value.double(), expected, rtol=1e-10 if dtype == torch.float64 else 2e-6, atol=0)
    torch.testing.assert_close(gradient.double(), wanted, rtol=ROUNDING[dtype], atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 130, 1), (3, 7, 3), (2, 45, 8), (1, 3, 264), (2, 5, 91), (1, 2, 515), (2, 400, 4)]
)
def test_equals_the_reference(implementation, shape, dtype):
    check(implementation, dtype, *case(sum(shape), *shape))


@pytest.mark.parametrize("spread", [0.01, 1, 30])
def test_small_and_large_logits(implementation, spread):
    check(implementation, torch.float32, *case(3, 2, 20, 16, spread=spread))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 2, 8])
def test_unaligned_logits(implementation, offset, dtype):
    logits, matched, labels, weight, first = case(5, 2, 9, 16)
    device, flat = implementation.device, logits.to(dtype).flatten()
    place = torch.zeros(offset + len(flat), dtype=dtype, device=device)
    place[offset:] = flat.to(device)
    arguments = [x.to(device) for x in (matched, labels, weight.float())]
    found, gradient = value_and_gradient(lambda x: focal_loss(x, *arguments, first), place[offset:].view(logits.shape))
    leaf = place.requires_grad_()
    focal_loss(leaf[offset:].view(logits.shape), *arguments, first).backward()
    expected = focal_reference(logits.to(dtype).double(), matched, labels, weight.float().double(), first)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=3e-6, atol=0)
    assert torch.equal(leaf.grad[offset:].view(logits.shape), gradient) and not leaf.grad[:offset].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.25, 65536.0, 3.0])
def test_what_comes_from_above(implementation, factor, dtype):
    logits, matched, labels, weight, first = case(6, 2, 11, 8)
    weight = weight / (1 if factor < 4 else 8)  # a float16 gradient may overflow there, as with any implementation
    check(implementation, dtype, logits, matched, labels, weight, first, factor=factor)


def test_float16_keeps_small_gradients(implementation):
    """What would be 0 in float16 is there when the loss is scaled as GradScaler does."""
    logits = torch.full((1, 4, 8), -6.0, dtype=torch.float16)
    arguments = (torch.full((1, 4), UNMATCHED), torch.zeros(1, 0, dtype=torch.int64), torch.full((1,), 1e-3))
    low = [x.to(implementation.device) for x in (logits, *arguments)]
    _, gradient = value_and_gradient(focal_loss, *low, factor=KEPT_IN_FLOAT16)
    exact = (logits.double(), *arguments[:2], arguments[2].double())
    _, wanted = value_and_gradient(focal_reference, *exact, factor=KEPT_IN_FLOAT16)
    torch.testing.assert_close(gradient.cpu().double(), wanted, rtol=2**-10, atol=2**-24)
    assert wanted.max() / KEPT_IN_FLOAT16 < 2**-25 < gradient.min()


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits_stay_finite(implementation, dtype):
    x = torch.tensor([1e4, -1e4, 90.0, -90.0, 0.0, -0.0, 20.0, -20.0], dtype=dtype).repeat(3, 1)[None]
    matched, labels = torch.tensor([[0, 1, UNMATCHED]]), torch.tensor([[0, 1]])
    arguments = [t.to(implementation.device) for t in (matched, labels, torch.ones(1))]
    value, gradient = value_and_gradient(focal_loss, x.to(implementation.device), *arguments, factor=0.5)
    assert value.isfinite() and gradient.isfinite().all()
    expected, wanted = value_and_gradient(
        focal_reference, x.double(), matched, labels, torch.ones(1).double(), factor=0.5
    )
    torch.testing.assert_close(value.cpu().double(), expected, rtol=3e-6, atol=0)
    torch.testing.assert_close(gradient.cpu().double(), wanted, rtol=ROUNDING[dtype], atol=1e-7)


def test_what_is_not_a_number_shows(implementation):
    """But not in ignored rows."""
    for match, shows in ((UNMATCHED, True), (0, True), (IGNORED, False)):
        logits = torch.zeros(1, 1, 8, device=implementation.device)
        logits[0, 0, 3] = float("nan")
        matched = torch.tensor([[match]], device=implementation.device)
        value, gradient = value_and_gradient(focal_loss, logits, matched, torch.zeros_like(matched), logits.new_ones(1))
        assert bool(value.isnan()) is shows and bool(gradient.isnan().any()) is shows


def test_sums_of_many_terms_are_accurate_and_repeat(implementation):
    few = implementation.name == "emulated gpu"
    logits = torch.full((1, 400 if few else 40_000, 264), -4.59512)
    matched = torch.full(logits.shape[:2], UNMATCHED)
    arguments = [x.to(implementation.device) for x in (logits, matched, torch.zeros(1, 1).long(), torch.ones(1))]
    value = focal_loss(*arguments)
    one = focal_reference(logits[:, :1, :1].double(), matched[:, :1], torch.zeros(1, 1).long(), torch.ones(1).double())
    assert float(value) == pytest.approx(float(one) * logits.numel(), rel=3e-6)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(value, focal_loss(*arguments))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("images", "rows"), [(0, 5), (2, 0)])
def test_nothing_to_learn(implementation, images, rows):
    logits, matched, labels, weight, first = case(1, images, rows, 8)
    inputs = [x.to(implementation.device) for x in (logits.float(), matched, labels, weight.float())]
    value, gradient = value_and_gradient(focal_loss, *inputs, first)
    assert value == 0 and gradient.shape == logits.shape


def test_a_second_backward_pass_is_refused(implementation):
    logits, *rest, first = case(2, 1, 3, 8)
    logits = logits.float().to(implementation.device).requires_grad_()
    value = focal_loss(logits, *(x.to(implementation.device) for x in (rest[0], rest[1], rest[2].float())), first)
    value.backward(retain_graph=True)
    before = logits.grad.clone()
    with pytest.raises(RuntimeError, match="second backward pass"):
        value.backward()
    assert torch.equal(logits.grad, before)


def test_opcheck(implementation):
    logits, matched, labels, weight, first = case(2, 2, 5, 8)
    inputs = [x.to(implementation.device) for x in (logits.bfloat16(), matched, labels, weight.float())]
    torch.library.opcheck(torch.ops.detcore.focal.default, (*inputs, first, 0.25, 2.0, 0.0))
    inputs[0] = inputs[0].float().requires_grad_()
    # Its last check wants both outputs from a compiled graph; that of the loss alone, as here, is the next test's.
    torch.library.opcheck(torch.ops.detcore.focal.default, (*inputs, first, 0.25, 2.0, 0.0), test_utils=WITH_GRADIENTS)
    upstream = torch.tensor(0.3, device=implementation.device)
    torch.library.opcheck(torch.ops.detcore.scale_.default, (inputs[0].detach(), upstream, 2.0))


def test_compiled_in_one_graph(implementation):
    logits, matched, labels, weight, first = case(2, 2, 5, 8)
    inputs = [x.to(implementation.device) for x in (logits.float(), matched, labels, weight.float())]

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss(*arguments):
        return torch.ops.detcore.focal(*arguments, 0.25, 2.0, 0.0)[0]

    value, gradient = value_and_gradient(loss, *inputs, first, factor=3)
    expected, wanted = value_and_gradient(focal_loss, *inputs, first, factor=3)
    assert torch.equal(value, expected) and torch.equal(gradient, wanted)


def check_bias(implementation, dtype, images, cells, anchors, classes, factor=1.0, spread=4.0):
    """Value and both gradients, which must be float64's of the same rounded logits and the exact sum with the bias."""
    logits, matched, labels, weight, first = case(images + cells, images, cells * anchors, classes, spread=spread)
    bias = torch.randn(anchors * classes, generator=torch.Generator().manual_seed(4))
    device, logits = implementation.device, logits.to(dtype)
    results = []
    for loss, kind, place in ((focal_loss, dtype, device), (focal_reference, torch.float64, "cpu")):
        wide = torch.promote_types(kind, torch.float32)
        leaves = [logits.to(place, kind).requires_grad_(), bias.to(place, wide).requires_grad_()]
        given = (matched.to(place), labels.to(place), weight.float().to(place, wide), first)
        value = loss(leaves[0], *given, leaves[1])
        results.append([value.detach(), *torch.autograd.grad(value * factor, leaves)])
    (value, gradient, sums), (expected, wanted, exact) = results
    torch.testing.assert_close(value.cpu().double(), expected, rtol=3e-6, atol=1e-12)
    rounding = ROUNDING[dtype] * (2 if factor == 3 else 1)
    smallest = 2**-24 if dtype == torch.float16 else 1e-7
    torch.testing.assert_close(gradient.cpu().double(), wanted, rtol=rounding, atol=smallest)
    assert sums.dtype == torch.float32 and sums.shape == bias.shape
    scale = wanted.unflatten(1, (cells, -1)).abs().sum((0, 1)).flatten()  # of the terms: sums of both signs cancel
    assert ((sums.cpu().double() - exact).abs() <= 1e-5 * scale + 1e-9).all()
    return [t.cpu() for t in results[0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1),
        (2, 5, 9, 1),
        (3, 7, 2, 3),
        (2, 45, 9, 8),
        (1, 3, 9, 264),
        (2, 5, 3, 91),
        (3, 70, 1, 4),
        (2, 40, 9, 40),
    ],
)
def test_the_bias_of_the_convolution_and_its_gradient(implementation, shape, dtype):
    check_bias(implementation, dtype, *shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.25, 65536.0, 3.0])
def test_the_bias_gradient_times_what_comes_from_above(implementation, factor, dtype):
    if factor == 65536 and dtype == torch.float16:
        factor = 16384.0  # a gradient that float16 holds
    check_bias(implementation, dtype, 2, 11, 3, 8, factor, spread=1.0)


def test_the_reference_is_a_convolution_with_its_bias():
    """float64: the gradient of the bias as autograd has it through the convolution."""
    generator = torch.Generator().manual_seed(8)
    anchors, classes = 3, 4
    conv = torch.nn.Conv2d(5, anchors * classes, 3, padding=1, dtype=torch.float64)
    x = torch.randn(2, 5, 4, 6, generator=generator, dtype=torch.float64)
    _, matched, labels, weight, first = case(1, 2, 24 * anchors, classes)

    def rows(bias):
        out = torch.nn.functional.conv2d(x, conv.weight, bias, padding=1)
        return out.permute(0, 2, 3, 1).reshape(2, -1, classes)

    given = (matched, labels, weight, first)
    inside = focal_reference(rows(None), *given, conv.bias)
    outside = focal_reference(rows(conv.bias), *given)
    found, expected = (torch.autograd.grad(v, list(conv.parameters())) for v in (inside, outside))
    torch.testing.assert_close(inside, outside, rtol=1e-12, atol=0)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_bias_gradient_repeats_with_any_number_of_threads(implementation):
    threads = torch.get_num_threads()
    few = implementation.name == "emulated gpu"
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(check_bias(implementation, torch.float32, 2, 60 if few else 3000, 2, 24))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(("images", "cells"), [(0, 5), (2, 0)])
def test_no_cells_have_no_bias_gradient(implementation, images, cells):
    logits, matched, labels, weight, first = case(1, images, cells * 3, 8)
    inputs = [x.to(implementation.device) for x in (logits.float(), matched, labels, weight.float())]
    bias = torch.ones(24, device=implementation.device, requires_grad=True)
    value = focal_loss(*inputs, first, bias)
    assert value == 0 and torch.equal(torch.autograd.grad(value, bias)[0], torch.zeros_like(bias))


def test_opcheck_and_compilation_with_a_bias(implementation):
    logits, matched, labels, weight, first = case(2, 2, 6, 8)
    inputs = [x.to(implementation.device) for x in (logits.float(), matched, labels, weight.float())]
    bias = torch.linspace(-1, 1, 24, device=implementation.device)
    op = torch.ops.detcore.focal
    recipe = (0.25, 2.0, 0.0)
    torch.library.opcheck(op.default, (*inputs, first, *recipe, bias))
    torch.library.opcheck(
        op.default,
        (inputs[0].requires_grad_(), *inputs[1:], first, *recipe, bias.requires_grad_()),
        test_utils=WITH_GRADIENTS,
    )
    compiled = torch.compile(lambda *given: op(*given[:-1], *recipe, given[-1])[0], backend="aot_eager", fullgraph=True)
    found, expected = (torch.autograd.grad(f(*inputs, first, bias), (inputs[0], bias)) for f in (compiled, focal_loss))
    assert all(map(torch.equal, found, expected))


def test_wrong_arguments_are_refused(implementation):
    logits, matched, labels, weight, _ = case(2, 2, 5, 8)
    x, m, k, w = (t.to(implementation.device) for t in (logits.float(), matched, labels, weight.float()))
    op = torch.ops.detcore.focal
    for wrong in ((x[0], m, k, w, 0), (x, m[:1], k, w, 0), (x, m, k, w.double(), 0), (x, m, k, w, 7), (x, m, k, w, -1)):
        with pytest.raises(RuntimeError):
            op(*wrong, 0.25, 2.0, 0.0)
    for bias in (x.new_ones(16), x.new_ones(7), x.new_ones(0), x.new_ones(40).double(), x.new_ones(5, 8)):
        with pytest.raises(RuntimeError, match="bias must be"):
            op(x, m, k, w, 0, 0.25, 2.0, 0.0, bias)


def smoothed(logits, matched, labels, weight, first, *, alpha, gamma, smoothing) -> torch.Tensor:
    """EfficientDet's focal loss from one-hot targets, by autograd."""
    total = 0
    for x, match, label, factor in zip(logits, matched[:, first : first + logits.shape[1]], labels, weight):
        target = torch.zeros_like(x)
        rows = (match >= 0).nonzero()[:, 0]
        target[rows, label[match[rows]]] = 1
        p = x.sigmoid()
        wrong = target * (1 - p) + (1 - target) * p
        soft = target * (1 - smoothing) + smoothing / 2
        entropy = F.binary_cross_entropy_with_logits(x, soft, reduction="none")
        terms = (target * alpha + (1 - target) * (1 - alpha)) * wrong**gamma * entropy
        total = total + factor * terms[match != IGNORED].sum()
    return total


RECIPES = [
    {"alpha": 0.25, "gamma": 1.5, "smoothing": 0.0},
    {"alpha": 0.25, "gamma": 2.0, "smoothing": 0.1},
    {"alpha": 0.6, "gamma": 0.0, "smoothing": 0.3},
    {"alpha": 0.05, "gamma": 5.0, "smoothing": 0.01},
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_reference_of_other_recipes(recipe):
    logits, *rest = case(12, 2, 30, 5, spread=6.0)
    value, gradient = value_and_gradient(partial(ops_focal.focal_reference, **recipe), logits, *rest, factor=3)
    expected, wanted = value_and_gradient(partial(smoothed, **recipe), logits, *rest, factor=3)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-14)
    few = logits[:1, :6].clone().requires_grad_()
    rest = [rest[0][:1], rest[1][:1], rest[2][:1], rest[3]]
    assert torch.autograd.gradcheck(lambda x: ops_focal.focal_reference(x, *rest, **recipe), (few,))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 130, 1), (3, 7, 3), (2, 9, 90)])
def test_other_recipes(implementation, shape, dtype, recipe, monkeypatch):
    for name in ("focal_loss", "focal_reference"):
        monkeypatch.setitem(globals(), name, partial(getattr(ops_focal, name), **recipe))
    # Near where a smoothed target is met, float32 subtracts what is nearly equal.
    check(implementation, dtype, *case(sum(shape), *shape), smallest=2e-8)
    check(implementation, dtype, *case(sum(shape), *shape, spread=30), smallest=2e-8)


@pytest.mark.parametrize("recipe", RECIPES)
def test_other_recipes_with_a_bias(implementation, recipe, monkeypatch):
    for name in ("focal_loss", "focal_reference"):
        monkeypatch.setitem(globals(), name, partial(getattr(ops_focal, name), **recipe))
    check_bias(implementation, torch.float16, 2, 11, 3, 8)


@pytest.mark.parametrize(
    "wrong", [(0.0, 2.0, 0.0), (1.0, 2.0, 0.0), (0.25, -1.0, 0.0), (0.25, 17.0, 0.0), (0.25, 2.0, 1.1)]
)
def test_wrong_recipes_are_refused(implementation, wrong):
    logits, matched, labels, weight, first = case(2, 1, 6, 8)
    inputs = [x.to(implementation.device) for x in (logits.float(), matched, labels, weight.float())]
    with pytest.raises(RuntimeError, match=r"alpha|gamma|smoothing"):
        torch.ops.detcore.focal(*inputs, first, *wrong)
