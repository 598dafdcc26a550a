"""Images to the network's input: the native op against its reference, and the reference against arithmetic by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detcore import UserError
from detcore.device import native
from detcore.ops.normalize import normalize, normalize_reference

SCALE = torch.tensor([0.017, 0.0175, 0.0174])
SHIFT = torch.tensor([-2.1, -2.0, -1.8])
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 5, 7), (1, 8, 16), (3, 1, 1), (0, 4, 4), (2, 33, 8), (1, 1, 9), (2, 64, 48), (2, 0, 4)]


def pictures(shape: tuple[int, int, int], layout: str = "contiguous") -> torch.Tensor:
    """Random uint8 [N, 3, H, W]; shape: (N, H, W)."""
    count, height, width = shape
    images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)
    return images.contiguous(memory_format=LAYOUTS[layout])


def check(
    images: torch.Tensor, dtype: torch.dtype, flip: torch.Tensor | None, device: torch.device, channels: int = 3
) -> None:
    """The op gives what the reference gives in float64, rounded once; native sums round once, as fmaf does."""
    mirrored = None if flip is None else flip.to(device)
    found = normalize(images.to(device), SCALE.to(device), SHIFT.to(device), dtype, mirrored, channels)
    assert found.dtype == dtype and found.shape == (len(images), channels, *images.shape[2:])
    assert found.is_contiguous(memory_format=torch.channels_last)
    exact = normalize_reference(images, SCALE.double(), SHIFT.double(), torch.float64, flip)
    assert torch.equal(found[:, :3].cpu(), exact.float().to(dtype))
    assert not found[:, 3:].any()


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_edge_shapes(implementation, shape, dtype, layout, flipped):
    flip = torch.arange(shape[0]) % 2 == 0 if flipped else None
    check(pictures(shape, layout), dtype, flip, implementation.device)


@settings(max_examples=40)
@given(data=st.data())
def test_random_shapes(implementation, data):
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40)))
    images = pictures(shape, data.draw(st.sampled_from(sorted(LAYOUTS))))
    flip = data.draw(st.none() | st.lists(st.booleans(), min_size=shape[0], max_size=shape[0]))
    flip = None if flip is None else torch.tensor(flip)
    channels = data.draw(st.sampled_from([3, 4, 8]))
    check(images, data.draw(st.sampled_from(DTYPES)), flip, implementation.device, channels)


@pytest.mark.parametrize("channels", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_padded_channels(implementation, dtype, channels):
    for shape in SHAPES:
        check(pictures(shape), dtype, None, implementation.device, channels)
    images = pictures((2, 3, 5))
    found = normalize_reference(images, SCALE, SHIFT, dtype, None, channels)
    assert found.is_contiguous(memory_format=torch.channels_last) and not found[:, 3:].any()
    assert torch.equal(found[:, :3], normalize_reference(images, SCALE, SHIFT, dtype))


def test_every_value_of_every_colour(implementation):
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16).contiguous()
    check(values, torch.float32, None, implementation.device)


def test_part_of_a_larger_tensor_is_refused(implementation):
    images = pictures((2, 8, 8)).to(implementation.device)[:, :, :, 1:]
    scale, shift = SCALE.to(implementation.device), SHIFT.to(implementation.device)
    with pytest.raises(RuntimeError, match="images must be contiguous or channels_last"):
        normalize(images, scale, shift, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 4, 5, 5, dtype=torch.uint8)}, "images must be uint8"),
        ({"images": torch.zeros(2, 3, 5, 5)}, "images must be uint8"),
        ({"images": torch.zeros(3, 5, 5, dtype=torch.uint8)}, "images must be uint8"),
        ({"scale": torch.ones(4)}, "scale and shift must be float32 of 3 values"),
        ({"shift": torch.ones(3, dtype=torch.int64)}, "scale and shift must be float32 of 3 values"),
        ({"flip": torch.ones(3, dtype=torch.bool)}, "flip must be bool"),
        ({"flip": torch.ones(2, dtype=torch.uint8)}, "flip must be bool"),
        ({"channels": 5}, "channels must be 3, 4 or 8"),
    ],
)
def test_wrong_arguments_are_named(implementation, change, message):
    arguments = {"images": pictures((2, 5, 5)), "scale": SCALE, "shift": SHIFT, "flip": None} | change
    arguments = {k: v.to(implementation.device) if torch.is_tensor(v) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=message):
        normalize(dtype=torch.float32, **arguments)


@pytest.mark.parametrize("flip", [None, torch.tensor([True, False])])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_registration(implementation, layout, flip):
    device = implementation.device
    flip = None if flip is None else flip.to(device)
    images, scale, shift = pictures((2, 5, 8), layout).to(device), SCALE.to(device), SHIFT.to(device)
    torch.library.opcheck(torch.ops.detcore.normalize.default, (images, scale, shift, torch.bfloat16, flip))
    torch.library.opcheck(torch.ops.detcore.normalize.default, (images, scale, shift, torch.float32, flip, 4))


def test_the_reference_is_the_formula():
    images = pictures((2, 4, 6))
    found = normalize_reference(images, SCALE.double(), SHIFT.double(), torch.float64, torch.tensor([False, True]))
    for image, colour, row, column in ((0, 0, 1, 2), (0, 2, 3, 5), (1, 1, 2, 0), (1, 0, 0, 5)):
        value = images[image, colour, row, 5 - column if image == 1 else column].item()
        assert found[image, colour, row, column].item() == value * SCALE[colour].item() + SHIFT[colour].item()


def test_float64_is_the_references(implementation):
    images = pictures((1, 4, 4)).to(implementation.device)
    scale, shift = SCALE.double().to(implementation.device), SHIFT.double().to(implementation.device)
    with native.using("auto"):
        assert normalize(images, scale, shift, torch.float64).dtype == torch.float64
        assert normalize(images, scale, shift, torch.float32).dtype == torch.float32
    with pytest.raises(UserError, match="normalize can't run: no code for"):
        normalize(images, scale, shift, torch.float32)
