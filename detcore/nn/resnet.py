"""torchvision's residual networks, cut for feature pyramids: some feature maps, freezable, weights from a file."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torchvision.models as zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

from detcore import UserError
from detcore.device import native
from detcore.nn.weights import load_exactly, read_weights
from detcore.ops.bias_relu import bias_relu, conv_bias_relu, conv_bias_relu_apart, leaves_bias
from detcore.ops.conv import conv2d
from detcore.ops.fold import autocast_dtype, fold
from detcore.ops.pool_bias_relu import pool_bias_relu


class FrozenNorm(FrozenBatchNorm2d):
    """torchvision's frozen normalisation, which also keeps what it amounts to: scale * x + shift, both [C].

    The two follow load_state_dict and changes of device or type; they are not part of the state dictionary. After any
    other write into the statistics call `fold`.
    """

    scale: Tensor
    shift: Tensor
    folded: Tensor | None = None
    """The weight of this norm's convolution, during a forward pass that makes all of them at once."""

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__(num_features, eps)
        for name in ("scale", "shift"):
            self.register_buffer(name, torch.empty(num_features), persistent=False)
        self.fold()

    @torch.no_grad()
    def fold(self) -> None:
        """Computes scale and shift anew, in place, so that a captured graph sees them."""
        spread = self.running_var + self.eps
        # A channel that never varied is at its mean: the bias is all that is left of it, also without an eps.
        self.scale.copy_(self.weight * torch.where(spread > 0, spread.rsqrt(), 0))
        self.shift.copy_(self.bias - self.running_mean * self.scale)

    def _load_from_state_dict(self, *arguments) -> None:
        super()._load_from_state_dict(*arguments)
        self.fold()

    def _apply(self, *arguments, **options) -> nn.Module:
        super()._apply(*arguments, **options)
        self.fold()
        return self


def _folded(conv: nn.Conv2d, norm: FrozenNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that equals conv and then norm."""
    if norm.folded is not None:
        return norm.folded, norm.shift
    return conv.weight * norm.scale.view(-1, 1, 1, 1), norm.shift


def _convolutions(block: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.Module]]:
    """The convolutions of a block, or of a network's stem, with the norms that follow them."""
    for i in (1, 2, 3):
        if hasattr(block, f"conv{i}"):
            yield block.get_submodule(f"conv{i}"), block.get_submodule(f"bn{i}")
    if getattr(block, "downsample", None) is not None:
        yield block.downsample[0], block.downsample[1]


@contextmanager
def _folded_at_once(stages: Sequence[Sequence[nn.Module]]) -> Iterator[None]:
    """While it is open, the weights of frozen norms' convolutions are there, made in one pass for each stage."""
    norms = []
    try:
        for blocks in stages:
            convs, own = zip(*(pair for block in blocks for pair in _convolutions(block)), strict=True)
            weights, scales = [conv.weight for conv in convs], [norm.scale for norm in own]
            norms += own
            for norm, weight in zip(own, fold(weights, scales, autocast_dtype(weights[0])), strict=True):
                norm.folded = weight
        yield
    finally:
        for norm in norms:
            norm.folded = None


def _conv_norm_relu(
    x: Tensor,
    conv: nn.Conv2d,
    norm: nn.Module,
    shortcut: Tensor | None = None,
    downsample: Sequence[nn.Module] | None = None,
    finish: Callable = conv_bias_relu,
) -> Tensor:
    """relu(norm(conv(x)) (+ shortcut)), the shortcut through its own convolution and norm where they are given.

    A frozen norm is folded into its convolution, which saves two passes over the feature map; bias, shortcut and ReLU
    are one more (`finish`), for which both convolutions' biases become one.
    """
    if not isinstance(norm, FrozenNorm):
        out = norm(conv2d(x, conv, conv.weight, conv.bias))
        if shortcut is not None:
            out += shortcut if downsample is None else downsample[1](downsample[0](shortcut))
        return F.relu(out, inplace=True)
    weight, bias = _folded(conv, norm)
    if downsample is not None:
        beside, shift = _folded(*downsample)
        if leaves_bias(shortcut, downsample[0]):
            bias, shift = bias + shift, None
        shortcut = conv2d(shortcut, downsample[0], beside, shift)
    return finish(x, conv, weight, bias, shortcut)


# A block's output is a tensor, or one for each use: the next block's convolution, its shortcut, the feature map.
_Output = Tensor | tuple[Tensor, Tensor, Tensor]


def _uses(out: _Output) -> tuple[Tensor, Tensor, Tensor]:
    return (out, out, out) if isinstance(out, Tensor) else out


class _BasicBlock(resnet.BasicBlock):
    def forward(self, x: _Output) -> _Output:
        x, shortcut, _ = _uses(x)
        out = _conv_norm_relu(x, self.conv1, self.bn1)
        return _conv_norm_relu(out, self.conv2, self.bn2, shortcut, self.downsample, conv_bias_relu_apart)


class _Bottleneck(resnet.Bottleneck):
    def forward(self, x: _Output) -> _Output:
        x, shortcut, _ = _uses(x)
        out = _conv_norm_relu(x, self.conv1, self.bn1)
        out = _conv_norm_relu(out, self.conv2, self.bn2)
        return _conv_norm_relu(out, self.conv3, self.bn3, shortcut, self.downsample, conv_bias_relu_apart)


_NETWORKS = {
    "resnet18": (_BasicBlock, (2, 2, 2, 2), 1, 64, zoo.ResNet18_Weights),
    "resnet34": (_BasicBlock, (3, 4, 6, 3), 1, 64, zoo.ResNet34_Weights),
    "resnet50": (_Bottleneck, (3, 4, 6, 3), 1, 64, zoo.ResNet50_Weights),
    "resnet101": (_Bottleneck, (3, 4, 23, 3), 1, 64, zoo.ResNet101_Weights),
    "resnet152": (_Bottleneck, (3, 8, 36, 3), 1, 64, zoo.ResNet152_Weights),
    "resnext50_32x4d": (_Bottleneck, (3, 4, 6, 3), 32, 4, zoo.ResNeXt50_32X4D_Weights),
    "resnext101_32x8d": (_Bottleneck, (3, 4, 23, 3), 32, 8, zoo.ResNeXt101_32X8D_Weights),
}
BACKBONES = tuple(_NETWORKS)
NARROW = {"resnet18_x0_25": ("resnet18", 4)}
"""Quick networks for processors, without weights: a backbone whose stages have their channels divided by a number. The
name is made as torchvision makes those of its narrow networks."""
NORMS = {"frozen": FrozenNorm, "batch": nn.BatchNorm2d}


class ResNet(resnet.ResNet):
    """A residual network without its classifier.

    forward: float [N, image_channels, H, W] -> (C3, C4, C5), each [N, channels[i], ceil(H / s), ceil(W / s)] with
    s = 8, 16, 32; or other `levels` of 2..5, rising. What comes after the last one is not built.

    name: one of `BACKBONES` or `NARROW`. norm: "frozen" (FrozenNorm: fixed statistics and affine values, no
    parameters) or "batch" (BatchNorm2d), or what makes a module of a number of channels. trainable_layers: how many of
    layer4, layer3, layer2, layer1 and conv1 learn, counted from the output; at 5 the first normalisation learns too,
    where it can. With "batch", a frozen layer keeps its weights but its running statistics still follow the data, as in
    torchvision. stride_in_1x1: bottlenecks take the step of 2 in their first convolution, as MSRA's weights want it,
    instead of in their second.

    Raises UserError for an unknown name or norm and a number outside 0..5. Weights are torchvision's random
    initialisation until `load_backbone` is called.
    """

    def __init__(
        self,
        name: str,
        norm: str | Callable[[int], nn.Module] = "frozen",
        trainable_layers: int = 3,
        levels: Sequence[int] = (3, 4, 5),
        stride_in_1x1: bool = False,
    ):
        if name not in (*BACKBONES, *NARROW):
            raise UserError(f"backbone {name!r} is unknown; choose one of {', '.join((*BACKBONES, *NARROW))}")
        if isinstance(norm, str) and norm not in NORMS:
            raise UserError(f"norm {norm!r} is unknown; choose one of {', '.join(NORMS)}")
        if not 0 <= trainable_layers <= 5:
            raise UserError(f"trainable_layers is {trainable_layers}; it must lie in 0..5")
        wide, self.divisor = NARROW.get(name, (name, 1))
        block, depths, groups, width, _ = _NETWORKS[wide]
        norm_layer = NORMS[norm] if isinstance(norm, str) else norm
        super().__init__(block, list(depths), groups=groups, width_per_group=width, norm_layer=norm_layer)
        del self.avgpool, self.fc
        self.levels = tuple(levels)
        self.channels = tuple(2 ** (4 + level) * block.expansion // self.divisor for level in levels)
        learns = ("layer4", "layer3", "layer2", "layer1", "conv1")[:trainable_layers]
        for parameter_name, parameter in self.named_parameters():
            parameter.requires_grad_(trainable_layers == 5 or parameter_name.startswith(learns))
        for module in self.modules():
            if stride_in_1x1 and isinstance(module, _Bottleneck):
                module.conv1.stride, module.conv2.stride = module.conv2.stride, (1, 1)
        for level in range(max(levels) + 1, 6):
            delattr(self, f"layer{level - 1}")

    def _make_layer(self, block: type[nn.Module], planes: int, *arguments, **options) -> nn.Sequential:
        return super()._make_layer(block, planes // self.divisor, *arguments, **options)

    @property
    def image_channels(self) -> int:
        """How many channels `forward` wants: cuDNN's kernels for tensor cores read 4 at once. The 4th must be 0."""
        return 4 if native.variant("stem") and isinstance(self.bn1, FrozenNorm) else 3

    def _stem(self, x: Tensor) -> Tensor:
        if not isinstance(self.bn1, FrozenNorm):
            return self.maxpool(_conv_norm_relu(x, self.conv1, self.bn1))
        weight, bias = _folded(self.conv1, self.bn1)
        # Adding a bias, rounding and ReLU never reverse an order: after the maximum they are the same, for a quarter
        # of the values.
        if native.variant("stem"):
            weight = F.pad(weight, (0, 0, 0, 0, 0, x.shape[1] - weight.shape[1]))
            convolved = conv2d(x, self.conv1, weight, None)
            if not convolved.requires_grad:
                return pool_bias_relu(convolved, bias)
            return bias_relu(self.maxpool(convolved), bias)
        if leaves_bias(x, self.conv1):
            return bias_relu(self.maxpool(conv2d(x, self.conv1, weight, None)), bias)
        return self.maxpool(conv_bias_relu(x, self.conv1, weight, bias))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        stages = [self.get_submodule(f"layer{level - 1}") for level in range(2, self.levels[-1] + 1)]
        at_once = native.variant("multi_cast") and isinstance(self.bn1, FrozenNorm)
        with _folded_at_once(((self, *stages[0]), *stages[1:]) if at_once else ()):
            x, maps = self._stem(x), []
            for stage in stages:
                x = stage(x)
                maps.append(x)
            return tuple(_uses(maps[level - 2])[2] for level in self.levels)

    def cut_last_stage(self) -> nn.Sequential:
        """Takes layer4 out of a network whose last level is 5, which then returns C4 alone; for `LastStage`."""
        stage, self.levels, self.channels = self.layer4, (4,), (self.channels[-1] // 2,)
        del self.layer4
        return stage


class LastStage(nn.Module):
    """The last stage of a residual network by itself, as C4 detectors run it on each region: [R, C4, h, w] -> C5.

    stage: layer4 of a `ResNet` that was built with level 5. dilation: over 1 the stage keeps the resolution.
    """

    def __init__(self, stage: nn.Sequential, dilation: int = 1):
        super().__init__()
        self.layer4 = stage
        for module in stage.modules() if dilation > 1 else ():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
                if module.kernel_size == (3, 3):
                    module.dilation = module.padding = (dilation, dilation)

    def forward(self, x: Tensor) -> Tensor:
        return _uses(self.layer4(x))[2]


def weights_file_name(name: str, version: str = "IMAGENET1K_V1") -> str:
    """Name of torchvision's ImageNet weights of a backbone, such as resnext50_32x4d-7cdf4587.pth.

    version: IMAGENET1K_V1, IMAGENET1K_V2 or DEFAULT, torchvision's choice. Raises UserError for one that the backbone
    doesn't have.
    """
    if name in NARROW:
        raise UserError(f"nobody has ImageNet weights of {name}: begin with random weights by --no-pretrained")
    versions = _NETWORKS[name][4].__members__
    if version not in versions:
        raise UserError(f"{name} has no weights {version!r}; choose one of {', '.join(versions)}")
    return versions[version].url.rsplit("/", 1)[1]


def load_backbone(
    model: nn.Module,
    name: str,
    weights: str | Path | None = None,
    version: str = "IMAGENET1K_V1",
    without: Sequence[str] = ("fc.",),
) -> Path:
    """Fill the network with ImageNet weights from a file in torchvision's format and return the file's path.

    weights: the file; without it, `weights_file_name` of the version under hub/checkpoints of torch's cache
    (TORCH_HOME). without: beginnings of the names of the layers that the network was cut of; the file's are left out.
    Nothing is downloaded. Where the file name ends in a hash, as torchvision's do, the file must begin with it
    (sha256). Raises UserError when the file is missing, damaged or of another network.
    """
    file_name = weights_file_name(name, version)
    path = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / file_name
    if not path.is_file():
        raise UserError(
            f"no weights for {name}: looked at {path}; fetch them with `public-scripts/download_backbone.sh -d DIR "
            f"{file_name}` and set TORCH_HOME=DIR, or begin with random weights by --no-pretrained"
        )
    state = read_weights(path)
    load_exactly(model, {k: v for k, v in state.items() if not str(k).startswith(tuple(without))}, str(path))
    return path
