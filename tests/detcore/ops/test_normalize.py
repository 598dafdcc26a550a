"""Images to the network's input: the native op against its reference."""

import pytest
import torch

from detcore.ops.normalize import normalize, normalize_reference

SCALE = torch.tensor([0.017, 0.0175, 0.0174])
SHIFT = torch.tensor([-2.1, -2.0, -1.8])
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 8, 16), (3, 1, 1), (0, 4, 4), (2, 33, 8)])
def test_equals_the_reference(implementation, shape, dtype, layout):
    images = torch.randint(0, 256, (shape[0], 3, *shape[1:]), dtype=torch.uint8).contiguous(
        memory_format=LAYOUTS[layout]
    )
    device = implementation.device
    found = normalize(images.to(device), SCALE.to(device), SHIFT.to(device), dtype)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.cpu(), normalize_reference(images, SCALE, SHIFT, dtype))
