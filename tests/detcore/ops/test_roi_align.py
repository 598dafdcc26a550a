"""Features of regions: every implementation against the reference, the reference against torchvision."""

import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from detcore import UserError
from detcore.device import native
from detcore.ops.roi_align import roi_align, roi_align_reference
from tests import emulation

SCALES = (1 / 4, 1 / 8)
SHAPES = ((11, 14), (6, 7))
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def maps(
    channels: int, dtype: torch.dtype, layout: str = "contiguous", images: int = 2, shapes=SHAPES, device="cpu"
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(channels)
    drawn = (torch.randn(images, channels, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [x.to(device, dtype).contiguous(memory_format=LAYOUTS[layout]).requires_grad_() for x in drawn]


def regions(count: int, images: int = 2, side: float = 60.0) -> tuple[Tensor, Tensor]:
    """Boxes of all kinds, also beyond the image, without area, inverted and tiny; each at a level or at none."""
    generator = torch.Generator().manual_seed(count)
    low = torch.rand(images, count, 2, generator=generator) * side - 8
    boxes = torch.cat((low, low + torch.rand(images, count, 2, generator=generator) ** 2 * side), 2)
    strange = [
        [-60, -50, -20, -9],
        [70, 80, 130, 170],
        [5, 5, 5, 5],
        [9, 9, 3, 4],
        [-90, -90, 190, 190],
        [8, 4, 8.5, 60],
    ]
    strange = torch.tensor(strange, dtype=torch.float32)[:count]
    boxes[:, : len(strange)] = strange
    level = torch.randint(-1, len(SCALES), (images, count), generator=generator)
    level[:, : len(strange)] = torch.arange(len(strange)) % 2
    return boxes, level


def of_torchvision(features, boxes, level, resolution, ratio, aligned) -> Tensor:
    """One region at a time, from its level's map."""
    result = features[0].new_zeros(*level.shape, features[0].shape[1], resolution, resolution)
    for i, j in ((level >= 0).nonzero()).tolist():
        which = int(level[i, j])
        given = [boxes[i, j : j + 1].to(features[0].dtype)]
        result[i, j] = torchvision_roi_align(
            features[which][i : i + 1], given, resolution, SCALES[which], ratio or -1, aligned
        )[0]
    return result


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(("resolution", "ratio"), [(7, 2), (7, 0), (14, 2), (3, 3), (1, 1)])
def test_the_reference_and_its_gradients_are_torchvisions(resolution, ratio, aligned):
    features = maps(3, torch.float64)
    given = *regions(9), SCALES, resolution, ratio, aligned
    found = roi_align_reference(features, *given)
    expected = of_torchvision(features, *given[:2], resolution, ratio, aligned)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((found * weight).sum(), features)
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * weight).sum(), features), rtol=0, atol=1e-11)


def check(implementation, features: list[Tensor], given: tuple, tolerance: float, factor: float = 1.0) -> None:
    """The op gives what the reference gives in float64 from the same numbers, forward and backward."""
    device = implementation.device
    own = [x.detach().to(device).requires_grad_() for x in features]
    exact = [x.detach().double().requires_grad_() for x in features]
    found = roi_align(own, *(x.to(device) if torch.is_tensor(x) else x for x in given))
    expected = roi_align_reference(exact, given[0].double(), *given[1:])
    assert found.dtype == features[0].dtype
    torch.testing.assert_close(found.detach().cpu().double(), expected.detach(), rtol=tolerance, atol=tolerance)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = weight.to(found.dtype).double()
    gradients = torch.autograd.grad(found, own, weight.to(device, found.dtype))
    for mine, theirs, x in zip(gradients, torch.autograd.grad(expected, exact, weight), features, strict=True):
        assert mine.dtype == x.dtype and mine.stride() == x.stride()
        torch.testing.assert_close(mine.cpu().double(), theirs, rtol=tolerance, atol=tolerance * factor)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(("resolution", "ratio"), [(7, 2), (4, 0), (14, 2), (3, 3), (1, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_reference(implementation, layout, resolution, ratio, aligned):
    check(implementation, maps(3, torch.float32, layout), (*regions(9), SCALES, resolution, ratio, aligned), 2e-5, 10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 8, 40])
def test_narrow_types_are_rounded_once(implementation, channels, layout, dtype):
    tolerance = torch.finfo(dtype).eps / 2 + 1e-5
    check(implementation, maps(channels, dtype, layout), (*regions(7), SCALES, 7, 2), tolerance)


def test_more_channels_and_regions_than_a_block_has_threads(implementation):
    boxes, level = regions(270, images=1)
    level[:, 20:250] = -1  # the work of a few
    check(implementation, maps(264, torch.float32, "channels_last", images=1), (boxes, level, SCALES, 2, 2), 2e-5, 10)


@pytest.mark.parametrize(("images", "count"), [(0, 3), (2, 0)])
def test_nothing_to_sample(implementation, images, count):
    features = maps(4, torch.float32, images=images, device=implementation.device)
    given = (x.to(implementation.device) for x in regions(count, images))
    found = roi_align(features, *given, SCALES, 7, 2)
    assert found.shape == (images, count, 4, 7, 7)
    gradients = torch.autograd.grad(found.sum(), features)
    assert all(g.shape == x.shape and not g.any() for g, x in zip(gradients, features, strict=True))


def test_one_level_and_eight(implementation):
    for levels in (1, 8):
        features = [x for _ in range(4) for x in maps(2, torch.float32)][:levels]
        boxes, level = regions(12)
        given = boxes, level.clamp(max=levels - 1) + (levels - 2) * (level > 0), (1 / 4,) * levels, 2, 2
        check(implementation, features, given, 2e-5, 10)


def test_the_number_of_threads_does_not_matter():
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        features = maps(70, torch.float32, "channels_last")
        found = roi_align(features, *regions(30), SCALES, 7, 2)
        results.append((found, *torch.autograd.grad(found.square().sum(), features)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_implementations_agree_in_every_bit():
    results = []
    for name in ("cpu", "emulated gpu"):
        with emulation.running(name):
            features = maps(16, torch.float32, "channels_last")
            found = roi_align(features, *regions(20), SCALES, 7, 2)
            weight = torch.sin(torch.arange(found.numel())).view(found.shape)
            results.append((found, *torch.autograd.grad(found, features, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_registration(implementation):
    for layout in LAYOUTS:
        features = [x.detach() for x in maps(8, torch.float32, layout, device=implementation.device)]
        boxes, level = (x.to(implementation.device) for x in regions(4))
        options = list(SCALES), 7, 2, False
        torch.library.opcheck(torch.ops.detcore.roi_align.default, (features, boxes, level, *options))
        grad = torch.ops.detcore.roi_align(features, boxes, level, *options)
        inputs = (features, grad, boxes, level, *options)
        torch.library.opcheck(torch.ops.detcore.roi_align_backward_.default, inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": (0.25,)}, "a scale for each"),
        ({"resolution": 0}, "resolution must be 1 to 32"),
        ({"sampling_ratio": -1}, "sampling_ratio must be 0 to 64"),
        ({"level": torch.zeros(2, 5, dtype=torch.int64)}, "as many as level"),
        ({"level": torch.zeros(2, 4, dtype=torch.int32)}, "level must be int64"),
        ({"features": [torch.zeros(2, 3, 5, 5), torch.zeros(2, 4, 5, 5)]}, "one number of channels"),
        ({"features": [torch.zeros(2, 3, 5, 5), torch.zeros(2, 3, 5, 5).half()]}, "of one dtype"),
        ({"features": [torch.zeros(2, 3, 5, 5), torch.zeros(2, 3, 0, 5)]}, "with cells"),
    ],
)
def test_wrong_arguments_are_named(implementation, change, message):
    boxes, level = regions(4)
    arguments = {"features": maps(3, torch.float32), "boxes": boxes, "level": level, "scales": SCALES, "resolution": 7}
    arguments = arguments | {"sampling_ratio": 2} | change

    def there(value):
        if isinstance(value, list):
            return [there(x) for x in value]
        return value.to(implementation.device) if torch.is_tensor(value) else value

    with pytest.raises(RuntimeError, match=message):
        roi_align(**{name: there(value) for name, value in arguments.items()})


def test_float64_is_the_references(implementation):
    boxes, level = (x.to(implementation.device) for x in regions(4))
    features = maps(3, torch.float64, device=implementation.device)
    with native.using("auto"):
        assert roi_align(features, boxes, level, SCALES, 7, 2).dtype == torch.float64
    with pytest.raises(UserError, match="roi_align can't run: no code for"):
        roi_align(features, boxes, level, SCALES, 7, 2)
