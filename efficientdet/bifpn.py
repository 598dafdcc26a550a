"""The bidirectional feature pyramid of EfficientDet (Tan, Pang, Le 2020). Parameters carry the original's names."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detcore import UserError
from detcore.device import native
from detcore.nn.norm_folding import normed
from efficientdet.ops.fuse import fuse, fuse_reference, halve

FUSIONS = ("fastattn", "attn", "sum")
norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


class Chain(nn.Sequential):
    """Modules one after the other; a convolution and a norm after it are one in evaluation."""

    def norm_pairs(self) -> list[tuple[nn.Conv2d, nn.Module]]:
        parts = list(self)
        return [(a, b) for a, b in pairwise(parts) if isinstance(a, nn.Conv2d) and not isinstance(b, nn.Conv2d)]

    def forward(self, x: Tensor) -> Tensor:
        norms = dict(self.norm_pairs())
        for part in self:
            if part in norms:
                x = normed(part, norms[part], x)
            elif part not in norms.values():
                x = part(x)
        return x


def named(**modules: nn.Module) -> Chain:
    """The modules one after the other, under these names."""
    return Chain(OrderedDict(modules))


def separable(inputs: int, outputs: int, bias: bool, **after: nn.Module) -> Chain:
    """A depthwise 3x3 convolution, a 1x1 convolution, and what comes after them."""
    depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
    return named(conv_dw=depthwise, conv_pw=nn.Conv2d(inputs, outputs, 1, bias=bias), **after)


def _projection(inputs: int, outputs: int, bias: bool) -> Chain:
    """To the pyramid's width: 1x1 convolution and normalisation; nothing where the width is right."""
    if inputs == outputs:
        return named()
    return named(conv=named(conv=nn.Conv2d(inputs, outputs, 1, bias=bias), bn=norm(outputs)))


def nodes(levels: int) -> list[tuple[int, list[int]]]:
    """The nodes of a cell: their level, counted from 0, and what they fuse.

    Sources 0..levels - 1 are the cell's inputs, the following ones its nodes. First from coarse to fine, then back.
    """
    latest = [[i] for i in range(levels)]
    found = []
    for level in range(levels - 2, -1, -1):
        found.append((level, [latest[level][-1], latest[level + 1][-1]]))
        latest[level].append(levels + len(found) - 1)
    for level in range(1, levels):
        found.append((level, [*latest[level], latest[level - 1][-1]]))
        latest[level].append(levels + len(found) - 1)
    return found


class Fusion(nn.Module):
    """A node's weighted sum of maps, brought to its own width and size, and the activation of the sum.

    sources: for each map its place among the features, its channels, and its level less the node's; the first is of the
    node's own level. act: one of `detcore.ops.activation.ACTIVATIONS`.
    """

    def __init__(
        self, sources: Sequence[tuple[int, int, int]], channels: int, method: str, same: bool, bias: bool,
        act: str = "none",
    ):  # fmt: skip
        super().__init__()
        self.places, self.steps = [s[0] for s in sources], [s[2] for s in sources]
        self.method, self.same, self.act = method, same, act
        self.resample = nn.ModuleDict({str(place): _projection(c, channels, bias) for place, c, _ in sources})
        self.edge_weights = None if method == "sum" else nn.Parameter(torch.ones(len(sources)))

    def weights(self) -> Tensor | None:
        """The factor of each map, float32 [maps]; None if all are 1."""
        if self.edge_weights is None:
            return None
        if self.method == "attn":
            return self.edge_weights.softmax(0)
        positive = F.relu(self.edge_weights)
        return positive / (positive.sum() + 1e-4)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        maps = [project(features[place]) for place, project in zip(self.places, self.resample.values(), strict=True)]
        function = fuse if native.variant("pyramid_nodes") else fuse_reference
        return function(maps, self.steps, self.weights(), self.same, self.act)


class Node(nn.Module):
    """A fusion with its activation, and a separable convolution with normalisation."""

    def __init__(self, fusion: Fusion, channels: int, bias: bool):
        super().__init__()
        self.combine = fusion
        self.after_combine = named(conv=separable(channels, channels, bias, bn=norm(channels)))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.after_combine(self.combine(features))


class Cell(nn.Module):
    """Maps of P3, P4, ... -> as many, each of `channels`."""

    def __init__(
        self, in_channels: Sequence[int], channels: int, method: str, act: str, same: bool, bias: bool
    ):  # fmt: skip
        super().__init__()
        self.levels = len(in_channels)
        width = [*in_channels, *[channels] * (2 * self.levels)]
        level_of = list(range(self.levels))
        self.fnode = nn.ModuleList()
        for level, places in nodes(self.levels):
            sources = [(place, width[place], level_of[place] - level) for place in places]
            self.fnode.append(Node(Fusion(sources, channels, method, same, bias, act), channels, bias))
            level_of.append(level)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        features = list(features)
        for node in self.fnode:
            features.append(node(features))
        return features[-self.levels :]


class BiFPN(nn.Module):
    """The backbone's maps C3, C4, C5 -> [P3, P4, ...], each [N, channels, rows, columns].

    in_channels: of the three maps. levels: how many come out; the further ones are made from C5 by pooling. fusion: one
    of `FUSIONS`. act: see `Fusion`. same: see `halve`. bias: convolutions before a normalisation have a bias.
    """

    def __init__(
        self, in_channels: Sequence[int], channels: int, cells: int, levels: int, fusion: str, act: str,
        same: bool, bias: bool,
    ):  # fmt: skip
        super().__init__()
        if fusion not in FUSIONS:
            raise UserError(f"fusion {fusion!r} is unknown; choose one of {', '.join(FUSIONS)}")
        self.same = same
        made = range(len(in_channels), levels)
        self.resample = nn.ModuleDict(
            {str(i): _projection(in_channels[-1] if i == made[0] else channels, channels, bias) for i in made}
        )
        widths = [*in_channels, *[channels for _ in made]]
        self.cell = nn.ModuleList(
            Cell(widths if i == 0 else [channels] * levels, channels, fusion, act, same, bias) for i in range(cells)
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        features = list(features)
        for project in self.resample.values():
            features.append(halve(project(features[-1]), self.same))
        for cell in self.cell:
            features = cell(features)
        return features
