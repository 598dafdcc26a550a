"""NVIDIA's EfficientNet-B0 written down again, with its names, and what the tests of weights share."""

from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn

SIZE = (64, 64)


def unsettled(module: nn.Module) -> nn.Module:
    """With statistics and scales as after some training, small variances among them, so that eps counts."""
    generator = torch.Generator().manual_seed(0)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_var.uniform_(0.002, 1.5, generator=generator)
            m.running_mean.normal_(0, 0.1, generator=generator)
            nn.init.uniform_(m.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(m.bias, 0, 0.1, generator=generator)
    return module.eval()


def pixels() -> Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def same(found: tuple[Tensor, ...], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


class Block(nn.Module):
    """MBConv as NVIDIA's program has it, with its names and linear layers."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        norm, middle = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01), inputs * expansion

        def conv(i, o, k=1, s=1, g=1):
            return nn.Sequential(nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), norm(o))

        self.expand_conv = conv(inputs, middle) if expansion > 1 else None
        names = OrderedDict(squeeze=nn.Linear(middle, inputs // 4), expand=nn.Linear(inputs // 4, middle))
        self.squeeze_and_excitation = nn.Sequential(names)
        self.depthwise_conv = conv(middle, middle, kernel, stride, middle)
        self.project_conv = conv(middle, outputs)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        silu = nn.functional.silu
        y = x if self.expand_conv is None else silu(self.expand_conv(x))
        y = silu(self.depthwise_conv(y))
        squeeze = self.squeeze_and_excitation
        y = y * squeeze.expand(silu(squeeze.squeeze(y.mean((2, 3))))).sigmoid()[:, :, None, None]
        y = self.project_conv(y)
        return y + x if self.shortcut else y


class NvidiaB0(nn.Module):
    def __init__(self):
        super().__init__()
        norm = nn.BatchNorm2d(32, eps=1e-3, momentum=0.01)
        self.input_conv = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), norm)
        table = [
            (32, 16, 3, 1, 1), (16, 24, 3, 2, 6), (24, 24, 3, 1, 6), (24, 40, 5, 2, 6), (40, 40, 5, 1, 6),
            (40, 80, 3, 2, 6), (80, 80, 3, 1, 6), (80, 80, 3, 1, 6), (80, 112, 5, 1, 6), (112, 112, 5, 1, 6),
            (112, 112, 5, 1, 6), (112, 192, 5, 2, 6), (192, 192, 5, 1, 6), (192, 192, 5, 1, 6), (192, 192, 5, 1, 6),
            (192, 320, 3, 1, 6),
        ]  # fmt: skip
        self.mbconv_blocks = nn.Sequential(*(Block(*row) for row in table))
        self.features_conv = nn.Sequential(nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280))
        self.fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = nn.functional.silu(self.input_conv(x)), []
        for i, block in enumerate(self.mbconv_blocks):
            x = block(x)
            maps += [x] if i in (4, 10, 15) else []
        return maps
