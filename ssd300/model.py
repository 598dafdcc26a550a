"""SSD300: a residual network up to its third stage, five added blocks, and two convolutions for each of six maps."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detcore import UserError
from detcore.nn.resnet import NARROW, ResNet
from detcore.nn.weights import load_with_classes
from detcore.ops.normalize import normalize
from ssd300.anchors import IMAGE_SIZE, PER_CELL, priors
from ssd300.config import BACKBONES

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
CUT_LAYERS = ("layer4.", "fc.")
"""What torchvision's files hold and this network doesn't: `without` of `detcore.nn.resnet.load_backbone`."""

_MIDDLE = (256, 256, 128, 128, 128)


class Body(ResNet):
    """conv1 to layer3 of a residual network, float [N, 3, 300, 300] -> [N, channels, 38, 38].

    The first block of layer3 has stride 1 instead of 2. Parameters carry torchvision's names.
    """

    def __init__(self, name: str):
        super().__init__(name, "batch", 5)
        del self.layer4
        self.channels = self.channels[1]
        first = self.layer3[0]
        for conv in (first.conv1, first.conv2, first.downsample[0]):
            conv.stride = (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        return self.layer3(self.layer2(self.layer1(x)))


def _added_block(inputs: int, middle: int, outputs: int, halves: bool) -> nn.Sequential:
    """Halves rows and columns, or takes a border of one cell off."""
    return nn.Sequential(
        nn.Conv2d(inputs, middle, 1, bias=False),
        nn.BatchNorm2d(middle),
        nn.ReLU(inplace=True),
        nn.Conv2d(middle, outputs, 3, stride=2 if halves else 1, padding=1 if halves else 0, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class SSD300(nn.Module):
    """forward: uint8 RGB [N, 3, 300, 300] -> (box deltas [N, 8732, 4], class logits [N, 8732, num_classes + 1]).

    Class 0 is the background, class k + 1 the class k of a Batch. Deltas are those of `ssd300.anchors.encode`, the
    order is that of the buffer `priors`, float32 [8732, 4], which is not part of the state dictionary. Values are
    normalised here, on the device. Call `model.to(memory_format=torch.channels_last)` for that layout.

    predictor_norm: batch normalisation after the predicting convolutions, as the original's documentation has it but
    neither its code nor its weights.

    Raises UserError for an unknown backbone, no classes, and images of another size or type.
    """

    def __init__(self, backbone: str = "resnet50", num_classes: int = 80, predictor_norm: bool = False):
        super().__init__()
        if backbone not in BACKBONES:
            raise UserError(f"backbone {backbone!r} is unknown; choose one of {', '.join(BACKBONES)}")
        if num_classes < 1:
            raise UserError(f"num_classes is {num_classes}; a detector needs at least one class")
        self.num_classes = num_classes
        self.backbone = Body(backbone)
        last = 128 if backbone in ("resnet18", "resnet18_x0_25") else 256
        channels = (self.backbone.channels, 512, 512, 256, 256, last)
        shapes = zip(channels, _MIDDLE, channels[1:], strict=False)
        self.additional_blocks = nn.ModuleList(_added_block(*shape, i < 3) for i, shape in enumerate(shapes))
        self.loc = self._predictors(channels, 4)
        self.conf = self._predictors(channels, num_classes + 1)
        for block in (*self.additional_blocks, self.loc, self.conf):
            for parameter in block.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        self.loc_norm = self._norms(4, predictor_norm)
        self.conf_norm = self._norms(num_classes + 1, predictor_norm)
        self.register_buffer("priors", priors(), False)
        std = torch.tensor(STD)
        self.register_buffer("pixel_scale", 1 / (255 * std), False)
        self.register_buffer("pixel_shift", -torch.tensor(MEAN) / std, False)

    @staticmethod
    def _predictors(channels: Sequence[int], values: int) -> nn.ModuleList:
        return nn.ModuleList(nn.Conv2d(c, n * values, 3, padding=1) for c, n in zip(channels, PER_CELL, strict=True))

    @staticmethod
    def _norms(values: int, wanted: bool) -> nn.ModuleList:
        return nn.ModuleList(nn.BatchNorm2d(n * values) if wanted else nn.Identity() for n in PER_CELL)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if tuple(images.shape[-2:]) != (IMAGE_SIZE, IMAGE_SIZE):
            raise UserError(f"images are {tuple(images.shape[-2:])}; SSD300 takes {IMAGE_SIZE} x {IMAGE_SIZE}")
        if images.dtype != torch.uint8:
            raise UserError(f"images are {images.dtype}, but must be uint8 pixels; the model normalises them")
        device = images.device.type
        mixed = torch.is_autocast_enabled(device)  # then the first layer wants its type, and no copy in float32 is made
        dtype = torch.get_autocast_dtype(device) if mixed else self.pixel_scale.dtype
        maps = [self.backbone(normalize(images, self.pixel_scale, self.pixel_shift, dtype))]
        for block in self.additional_blocks:
            maps.append(block(maps[-1]))
        return self._predict(maps, self.loc, self.loc_norm, 4), self._predict(
            maps, self.conf, self.conf_norm, self.num_classes + 1
        )

    @staticmethod
    def _predict(maps: Sequence[Tensor], convs: nn.ModuleList, norms: nn.ModuleList, values: int) -> Tensor:
        """[N, 8732, values]. A channel is value * priors of a cell + prior; the priors' order is prior, row, column."""
        levels = []
        for x, conv, norm in zip(maps, convs, norms, strict=True):
            y = norm(conv(x)).unflatten(1, (values, -1))
            levels.append(y.permute(0, 2, 3, 4, 1).reshape(len(x), -1, values))
        return torch.cat(levels, 1)


_CLASSES = ("conf.", "conf_norm.")
_ORIGINAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3"}


def known_classes(state: Mapping) -> int | None:
    """Number of classes of a state dictionary of SSD300, by whatever prefix; None if it is none."""
    bias = next((value for name, value in state.items() if str(name).endswith("conf.0.bias")), None)
    return len(bias) // PER_CELL[0] - 1 if isinstance(bias, Tensor) and bias.ndim else None


_DEPTHS = {
    (2, False): "resnet18", (6, False): "resnet34", (6, True): "resnet50", (23, True): "resnet101",
    (36, True): "resnet152",
}  # fmt: skip


def known_backbone(state: Mapping) -> str | None:
    """The backbone of a state dictionary of SSD300, told by its third stage: blocks, whether they have three
    convolutions, and channels. None if it is none."""
    pattern = re.compile(r"(?:backbone\.layer3|feature_extractor\.6)\.(\d+)\.conv(\d)\.")
    found = [(*match.groups(), state[key]) for key in state if (match := pattern.search(str(key)))]
    name = _DEPTHS.get((len({block for block, *_ in found}), any(conv == "3" for _, conv, _ in found)))
    widths = {getattr(weight, "shape", ())[:1] for block, conv, weight in found if (block, conv) == ("0", "1")}
    return next((n for n, (wide, divisor) in NARROW.items() if (wide, {(256 // divisor,)}) == (name, widths)), name)


def load_original_state(
    model: SSD300, state: Mapping, source: str = "the checkpoint", *, other_classes: bool = False
) -> bool:
    """Load the weights of NVIDIA's SSD300 v1.1 (DeepLearningExamples), in place.

    state: a state dictionary, or a checkpoint that holds one under "model"; names may begin with "module.". There the
    backbone is a sequence without names: feature_extractor.feature_extractor.0.weight, ...4.0.conv1.weight. Names of
    this module are taken as well. `source` names the file in errors. other_classes: where the state is of another
    number of classes, the predictors of classes stay as they are. Returns whether they did. Raises UserError that lists
    missing, unexpected and misshapen entries.
    """
    state = state.get("model", state)
    if not isinstance(state, Mapping):
        raise UserError(f"{source} holds {type(state).__name__} under 'model', not a dictionary of weights")

    def own_name(key: str) -> str:
        key = key.removeprefix("module.")
        return re.sub(
            r"^feature_extractor\.feature_extractor\.(\d+)\.",
            lambda found: f"backbone.{_ORIGINAL.get(found[1], found[1])}.",
            key,
        )

    state = {own_name(str(key)): value for key, value in state.items()}
    return load_with_classes(model, state, source, known_classes(state), _CLASSES, other_classes=other_classes)


@torch.no_grad()
def scale_as_the_originals_inference(model: SSD300) -> None:
    """From now on pixels become (x / 255 * 256 - 128) / 128, as the original's inference script has it."""
    model.pixel_scale.fill_(256 / (255 * 128))
    model.pixel_shift.fill_(-1)
