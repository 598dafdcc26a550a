"""How large the tensors of a forward pass are, found without computing anything but their shapes."""

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from detcore.device.base import Backend


class _Widest(TorchDispatchMode):
    """Notes the elements of the largest tensor that its body makes of one image; weights are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(made) if isinstance(t, Tensor) and t.shape[:1] == (1,)]
        self.elements = max(self.elements, *sizes, 1)
        return made


@torch.no_grad()
def widest(model: nn.Module, image_size: tuple[int, int], backend: Backend) -> int:
    """Elements of the largest tensor that a model on the backend's device makes of an image (height, width)."""
    with torch.inference_mode(False), FakeTensorMode(allow_non_fake_inputs=True), _Widest() as found:
        image = torch.empty(1, 3, *image_size, dtype=torch.uint8, device=backend.device)
        with backend.autocast():
            model(image)
    return found.elements
