"""SSD300 against a plain writing of the original's modules, golden counts, and the original's key names."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import get_model

from detcore import UserError
from detcore.data.batch import whole_images
from detcore.device.cpu import CpuBackend
from detcore.nn.resnet import NARROW, load_backbone
from detcore.processes.launcher import World
from detcore.training.task import Context
from ssd300.anchors import priors
from ssd300.config import BACKBONES, Config
from ssd300.loss import losses
from ssd300.model import CUT_LAYERS, MEAN, SSD300, STD, load_original_state
from ssd300.train import build_model, build_task

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "ssd300.json").read_text())
CHANNELS = {"resnet18": (256, 512, 512, 256, 256, 128), "resnet34": (256, 512, 512, 256, 256, 256)}
CLASSES = 5


class OriginalBackbone(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.out_channels = CHANNELS.get(name, (1024, 512, 512, 256, 256, 256))
        self.feature_extractor = nn.Sequential(*list(get_model(name, weights=None).children())[:7])
        block = self.feature_extractor[-1][0]
        block.conv1.stride = block.conv2.stride = block.downsample[0].stride = (1, 1)

    def forward(self, x):
        return self.feature_extractor(x)


class Original(nn.Module):
    """The original's module structure as the specification tells it: float images -> ([N, 4, 8732], [N, C, 8732])."""

    def __init__(self, name: str, labels: int):
        super().__init__()
        self.feature_extractor = OriginalBackbone(name)
        self.labels = labels
        sizes = self.feature_extractor.out_channels
        blocks = []
        for i, (inputs, outputs, middle) in enumerate(zip(sizes, sizes[1:], [256, 256, 128, 128, 128])):
            second = {"kernel_size": 3, "padding": 1, "stride": 2} if i < 3 else {"kernel_size": 3}
            blocks.append(
                nn.Sequential(
                    nn.Conv2d(inputs, middle, kernel_size=1, bias=False), nn.BatchNorm2d(middle), nn.ReLU(inplace=True),
                    nn.Conv2d(middle, outputs, bias=False, **second), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
                )
            )  # fmt: skip
        self.additional_blocks = nn.ModuleList(blocks)
        defaults = [4, 6, 6, 6, 4, 4]
        self.loc = nn.ModuleList(nn.Conv2d(c, n * 4, 3, padding=1) for c, n in zip(sizes, defaults))
        self.conf = nn.ModuleList(nn.Conv2d(c, n * labels, 3, padding=1) for c, n in zip(sizes, defaults))

    def forward(self, x):
        x = self.feature_extractor(x)
        maps = [x]
        for block in self.additional_blocks:
            x = block(x)
            maps.append(x)
        locs = [conv(m).view(len(x), 4, -1) for m, conv in zip(maps, self.loc)]
        confs = [conv(m).view(len(x), self.labels, -1) for m, conv in zip(maps, self.conf)]
        return torch.cat(locs, 2), torch.cat(confs, 2)


def original(name: str = "resnet18") -> Original:
    """With weights far enough from their initial values that every one counts."""
    torch.manual_seed(0)
    model = Original(name, CLASSES + 1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def some_images(count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, 3, 300, 300), dtype=torch.uint8, generator=generator)


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (images.double() / 255 - mean) / std


PUBLISHED = [name for name in BACKBONES if name not in NARROW]


@pytest.mark.parametrize("backbone", PUBLISHED)
def test_parameter_counts(backbone):
    with torch.device("meta"):
        model = SSD300(backbone)
    assert sum(p.numel() for p in model.parameters()) == GOLDEN["parameter_counts_81_classes"][backbone]
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("backbone", PUBLISHED)
def test_state_has_the_originals_names_and_shapes(backbone):
    with torch.device("meta"):
        theirs, ours = Original(backbone, 81), SSD300(backbone)
    names = ("conv1", "bn1", "", "", "layer1", "layer2", "layer3")
    expected = {}
    for key, value in theirs.state_dict().items():
        if key.startswith("feature_extractor."):
            index, _, rest = key.removeprefix("feature_extractor.feature_extractor.").partition(".")
            key = f"backbone.{names[int(index)]}.{rest}"
        expected[key] = value.shape
    assert {key: value.shape for key, value in ours.state_dict().items()} == expected


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
@pytest.mark.parametrize("form", ["state", "checkpoint", "distributed"])
def test_original_checkpoint_gives_the_same_outputs(backbone, form):
    theirs = original(backbone)
    state = theirs.state_dict()
    if form != "state":
        prefix = "module." if form == "distributed" else ""
        state = {"epoch": 65, "iteration": 1, "model": {prefix + key: value for key, value in state.items()}}
    ours = SSD300(backbone, CLASSES)
    load_original_state(ours, state)
    images = some_images(1)
    with torch.no_grad():
        deltas, logits = ours.double().eval()(images)
        locs, confs = theirs.double()(normalised(images))
    assert deltas.shape == (1, 8732, 4) and logits.shape == (1, 8732, CLASSES + 1)
    torch.testing.assert_close(deltas, locs.transpose(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, confs.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_a_narrow_backbone_gives_as_many_boxes():
    deltas, logits = SSD300("resnet18_x0_25", CLASSES).eval()(some_images(1))
    assert deltas.shape == (1, 8732, 4) and logits.shape == (1, 8732, CLASSES + 1)
    assert deltas.isfinite().all() and logits.isfinite().all()


def test_own_state_loads_and_wrong_states_say_why():
    model = SSD300("resnet18", CLASSES)
    load_original_state(model, SSD300("resnet18", CLASSES).state_dict())
    state = original().state_dict()
    state["extra.weight"] = state.pop("loc.0.bias")
    with pytest.raises(UserError, match=r"epoch_3.pt does not fit.*missing loc\.0\.bias.*unexpected extra\.weight"):
        load_original_state(model, {"model": state}, "epoch_3.pt")
    with pytest.raises(UserError, match=r"knows 5 classes, the data set has 80: .*--weights-only"):
        load_original_state(SSD300("resnet18"), original().state_dict())
    with pytest.raises(UserError, match="list under 'model'"):
        load_original_state(model, {"model": []})


def test_order_of_the_outputs():
    """A prior's outputs depend on the pixels around it, and not on those far away."""
    model = SSD300("resnet18", 2).eval()
    table = priors()
    images = some_images(1)
    changed = images.clone()
    changed[..., 200:, 250:] = 255
    with torch.no_grad():
        difference = (model(images)[0] - model(changed)[0]).abs().amax(2)[0, :5776]
    inside = (table[:5776, 0] > 0.85) & (table[:5776, 1] > 0.7)
    far = (table[:5776, 0] < 0.25) | (table[:5776, 1] < 0.1)
    assert difference[inside].min() > 100 * max(1e-9, float(difference[far].median()))


def test_initialisation():
    model = SSD300("resnet18", CLASSES)
    for conv in [m for part in (model.additional_blocks, model.loc, model.conf) for m in part.modules()]:
        if isinstance(conv, nn.Conv2d):
            fan_out, fan_in = conv.weight.shape[0], conv.weight.shape[1]
            limit = (6 / ((fan_in + fan_out) * conv.kernel_size[0] ** 2)) ** 0.5
            assert 0.98 * limit < conv.weight.abs().max() <= limit
            assert conv.weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.05)
    assert model.conf[0].bias.any()  # torch's own initialisation
    assert not [key for key in model.state_dict() if key.startswith(("priors", "pixel", "loc_norm"))]


def test_norm_on_the_predictors():
    model = SSD300("resnet18", 3, predictor_norm=True)
    plain = SSD300("resnet18", 3)
    extra = 2 * 30 * (4 + 4)  # weights and biases; 30 priors a cell of all levels, 4 coordinates, 4 classes
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters()) + extra
    deltas, logits = model.train()(some_images())
    per_channel = deltas[:, :5776].reshape(2, 4, 38 * 38, 4)
    torch.testing.assert_close(per_channel.mean((0, 2)), torch.zeros(4, 4), rtol=0, atol=1e-4)
    torch.testing.assert_close(per_channel.var((0, 2)), torch.ones(4, 4), rtol=0, atol=1e-2)
    assert logits.shape == (2, 8732, 4)


def test_channels_last_and_half_precision():
    model = SSD300("resnet18", 3).eval()
    images = some_images(1)
    with torch.no_grad():
        expected = model(images)
        model = model.to(memory_format=torch.channels_last)
        for layout in (torch.contiguous_format, torch.channels_last):
            for own, other in zip(model(images.contiguous(memory_format=layout)), expected):
                torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-3)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(images)
    assert mixed[0].dtype == torch.bfloat16
    for own, other in zip(mixed, expected):
        assert (own - other).abs().max() < 0.1 * other.abs().max()


def test_a_few_steps_learn_a_batch():
    torch.manual_seed(0)
    model = SSD300("resnet18", 3).train()
    boxes = torch.tensor([[[30.0, 40, 150, 200], [180, 60, 290, 140]], [[0.0] * 4, [0.0] * 4]])
    labels = torch.tensor([[0, 2], [-1, -1]])
    optimizer = torch.optim.SGD(model.parameters(), lr=5e-3, momentum=0.9)
    history = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = sum(losses(model(some_images()), model.priors, boxes, labels).values())
        loss.backward()
        history.append(loss.item())
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
    assert history[-1] < 0.8 * history[0]


def test_wrong_choices():
    with pytest.raises(UserError, match="resnet19"):
        SSD300("resnet19")
    with pytest.raises(UserError, match="num_classes is 0"):
        SSD300("resnet18", 0)
    model = SSD300("resnet18", 1)
    with pytest.raises(UserError, match=r"\(300, 320\)"):
        model(torch.zeros(1, 3, 300, 320, dtype=torch.uint8))
    with pytest.raises(UserError, match="uint8 pixels; the model normalises them"):
        model(torch.zeros(1, 3, 300, 300))


def test_backbone_weights_without_the_layers_cut_off(tmp_path):
    torch.manual_seed(3)
    whole = get_model("resnet18", weights=None)
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    model = SSD300("resnet18", 1)
    load_backbone(model.backbone, "resnet18", tmp_path / "weights.pth", without=CUT_LAYERS)
    state = whole.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.backbone.state_dict().items())
    with pytest.raises(UserError, match=r"unexpected layer4\.0\.conv1\.weight"):
        load_backbone(model.backbone, "resnet18", tmp_path / "weights.pth")
    torch.save(get_model("resnet34", weights=None).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"unexpected layer1\.2\."):
        load_backbone(model.backbone, "resnet18", tmp_path / "weights.pth", without=CUT_LAYERS)


@pytest.mark.parametrize(
    ("options", "file"),
    [
        ({}, "resnet50-11ad3fa6.pth"),
        ({"torchvision_weights_version": "IMAGENET1K_V1"}, "resnet50-0676ba61.pth"),
        ({"torchvision_weights_version": "DEFAULT"}, "resnet50-11ad3fa6.pth"),
        ({"backbone": "resnet101", "torchvision_weights_version": "IMAGENET1K_V1"}, "resnet101-63fe2227.pth"),
        ({"backbone": "resnet34"}, "resnet34-b627a593.pth"),
    ],
)
def test_training_starts_from_the_weights_asked_for(options, file, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=file):
        build_model(Config(**options), 80)


@pytest.mark.parametrize("legacy", [False, True])
def test_images_without_objects_train_but_with_legacy(legacy):
    config = Config(backbone="resnet18", pretrained=False, synthetic=True, num_classes=2, legacy=legacy)
    task = build_task(config, Context(CpuBackend(torch.device("cpu"), "fp32"), World(0, 1, 0, 1), 3))
    batch = whole_images(some_images(1), torch.zeros(1, 4, 4), torch.full((1, 4), -1), torch.zeros(1), torch.ones(1, 2))
    outputs = torch.zeros(1, 8732, 4), torch.zeros(1, 8732, 3)
    found = task.loss(lambda images: outputs, batch)
    assert found["box"] == 0 and found["cls"] == pytest.approx(0 if legacy else 3 * math.log(3))
