"""The cut residual networks against torchvision's, and the loading of their weights."""

import hashlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import get_model
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d

from detcore import UserError
from detcore.device import native
from detcore.nn.resnet import BACKBONES, NARROW, NORMS, LastStage, ResNet, load_backbone, weights_file_name
from detcore.nn.weights import load_exactly
from detcore.ops import conv as conv_module
from detcore.ops.bias_relu import bias_relu, bias_relu_reference


def randomise_norms(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)


def twin(name: str, norm: str, trainable_layers: int = 5) -> tuple[ResNet, nn.Module]:
    """Ours and torchvision's network with equal weights, in training mode; the latter's C3, C4, C5 as a dictionary."""
    torch.manual_seed(0)
    theirs = get_model(name, weights=None, norm_layer=NORMS[norm])
    randomise_norms(theirs)
    ours = ResNet(name, norm, trainable_layers)
    load_exactly(ours, {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}, "torchvision")
    return ours.train(), IntermediateLayerGetter(theirs.train(), {"layer2": "c3", "layer3": "c4", "layer4": "c5"})


@pytest.mark.parametrize(
    ("name", "norm"),
    [("resnet18", "frozen"), ("resnet18", "batch"), ("resnet50", "frozen"), ("resnext50_32x4d", "frozen")],
)
def test_features_and_gradients_equal_torchvisions(name, norm):
    ours, theirs = twin(name, norm)
    ours, theirs = ours.double(), theirs.double()
    x = torch.randn(2, 3, 72, 56, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    features, expected = ours(x), list(theirs(x).values())
    assert tuple(f.shape[1] for f in features) == ours.channels
    for own, other in zip(features, expected):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)
    sum(f.mean() for f in features).backward()
    sum(f.mean() for f in expected).backward()
    gradients = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key].grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_convolutions_that_leave_their_bias_to_the_op(name, implementation, monkeypatch):
    """As on a GPU: float32 features and gradients, and nothing but masks and the convolutions' inputs kept."""
    used = []

    def spy(*inputs):
        used.append(len([i for i in inputs if i is not None]))
        return bias_relu(*inputs)

    for module in ("detcore.ops.bias_relu", "detcore.nn.resnet"):
        monkeypatch.setattr(f"{module}.bias_relu", spy)
        monkeypatch.setattr(f"{module}.leaves_bias", lambda x, conv: True)
    ours, theirs = twin(name, "frozen")
    device, layout = implementation.device, torch.channels_last
    ours, theirs = ours.to(device, memory_format=layout), theirs.to(device, memory_format=layout)
    x = torch.randn(1, 3, 64, 40, generator=torch.Generator().manual_seed(2)).to(device, memory_format=layout)
    features, expected = ours(x), list(theirs(x).values())
    blocks = {"resnet18": 8, "resnext50_32x4d": 16}[name]
    assert (used.count(2), used.count(3)) == (1 + (1 if name == "resnet18" else 2) * blocks, blocks)
    gpu = implementation.name == "cuda"
    for own, other in zip(features, expected):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4 if gpu else 1e-5)
    sum(f.mean() for f in features).backward()
    sum(f.mean() for f in expected).backward()
    gradients = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        wanted = gradients[key].grad
        if gpu:  # one value that rounding puts on the other side of ReLU's corner moves a whole filter, by 1e-2 at most
            assert (parameter.grad - wanted).norm() <= 3e-2 * wanted.norm(), key
        else:
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


class Additions(TorchDispatchMode):
    """Counts the sums of feature maps."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func).startswith("aten.add") and all(getattr(a, "ndim", 0) == 4 for a in args[:2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_the_gradients_of_a_block_come_apart(name, implementation, monkeypatch):
    """The variant residual_gradient: no sum of feature maps is left, and the gradients are the same. Where three are
    added in one rounding instead of two, in the three feature maps, the last digits differ."""
    for module in ("detcore.ops.bias_relu", "detcore.nn.resnet"):
        monkeypatch.setattr(f"{module}.leaves_bias", lambda x, conv: True)
    model = twin(name, "frozen", 3)[0].to(implementation.device, memory_format=torch.channels_last)
    x = torch.randn(1, 3, 64, 40, generator=torch.Generator().manual_seed(2)).to(implementation.device)
    results = []
    for variants in ((), ("residual_gradient",)):
        with native.using("native", *variants):
            features = model(x)
            loss = sum(f.square().mean() for f in features)
        with Additions() as additions:
            gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        results.append((additions.count, [f.detach() for f in features], gradients))
    (usual, features, gradients), (left, same_features, same_gradients) = results
    blocks = {"resnet18": 2 + 2 + 2, "resnext50_32x4d": 4 + 6 + 3}[name]
    assert usual == blocks - 1 + 2 and left == 0  # all but the last block's; C3 and C4 have a third use
    assert all(map(torch.equal, features, same_features))
    for expected, found in zip(gradients, same_gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    layer4 = [n.startswith("layer4") for n, p in model.named_parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b, last in zip(gradients, same_gradients, layer4, strict=True) if last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_maximum_before_bias_and_relu_changes_nothing(implementation, monkeypatch, dtype):
    model = twin("resnet18", "frozen")[0].to(implementation.device, dtype)
    x = torch.randn(2, 3, 37, 50, generator=torch.Generator().manual_seed(4)).to(implementation.device, dtype)
    weight = model.conv1.weight * model.bn1.scale.view(-1, 1, 1, 1)
    convolved = F.conv2d(x, weight, None, 2, 3)
    expected = model.maxpool(bias_relu_reference(convolved, model.bn1.shift))
    monkeypatch.setattr("detcore.nn.resnet.leaves_bias", lambda x, conv: True)
    assert torch.equal(model._stem(x), expected)


VARIANTS = ("merged_groups", "conv_epilogues", "frozen_stage", "stem")
EACH_VARIANT = pytest.mark.parametrize(
    "variants", [*((v,) for v in VARIANTS), VARIANTS, (*VARIANTS, "residual_gradient", "multi_cast")], ids=",".join
)


def padded(model: ResNet, x: torch.Tensor) -> torch.Tensor:
    """Images with as many channels as the network wants."""
    return F.pad(x, (0, 0, 0, 0, 0, model.image_channels - 3)).contiguous(memory_format=torch.channels_last)


def outcome(model: ResNet, x: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Features, and the gradients of what learns."""
    model.zero_grad(set_to_none=True)
    features = model(padded(model, x))
    sum((i + 1) * f.float().square().mean() for i, f in enumerate(features)).backward()
    return features, {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@EACH_VARIANT
@pytest.mark.parametrize(
    ("name", "norm", "trainable_layers"),
    [("resnext50_32x4d", "frozen", 3), ("resnext50_32x4d", "batch", 5), ("resnet18", "frozen", 5)],
)
def test_variants_compute_the_same(name, norm, trainable_layers, variants):
    model = twin(name, norm, trainable_layers)[0].double().to(memory_format=torch.channels_last)
    state = {key: (value.shape, value.stride()) for key, value in model.state_dict().items()}
    x = torch.randn(2, 3, 64, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    features, gradients = outcome(model, x)
    with native.using("auto", *variants):
        found, found_gradients = outcome(model, x)
    for own, other in zip(found, features):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)
    assert found_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[key], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())
    assert {key: (value.shape, value.stride()) for key, value in model.state_dict().items()} == state


@EACH_VARIANT
def test_variants_in_mixed_precision(variants):
    model = twin("resnext50_32x4d", "frozen", 3)[0].to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 40, generator=torch.Generator().manual_seed(2))
    exact, exact_gradients = outcome(model, x)
    with native.using("auto", *variants), torch.autocast("cpu", torch.bfloat16):
        found, gradients = outcome(model, x)
    for own, other in zip(found, exact):
        assert own.dtype == torch.bfloat16 and (own.float() - other).norm() < 0.01 * other.norm()
    for key, gradient in exact_gradients.items():
        assert gradients[key].dtype == torch.float32
        assert (gradients[key] - gradient).norm() < 0.1 * gradient.norm(), key


def test_the_stem_of_padded_images(implementation):
    model = twin("resnet18", "frozen", 3)[0].to(implementation.device, memory_format=torch.channels_last)
    x = torch.randn(2, 3, 37, 50, generator=torch.Generator().manual_seed(4)).to(implementation.device)
    for dtype in (torch.float32, torch.bfloat16):
        model, x = model.to(dtype), x.to(dtype)
        expected = model._stem(x.contiguous(memory_format=torch.channels_last))
        with native.using("native", "stem"):
            assert model.image_channels == 4
            found = model._stem(padded(model, x))
        assert found.is_contiguous(memory_format=torch.channels_last)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert model.image_channels == ResNet("resnet18", "batch").image_channels == 3


def test_variants_compile():
    torch.compiler.reset()
    model, x = twin("resnet18", "frozen", 3)[0], torch.randn(1, 3, 32, 40)
    with native.using("auto", *VARIANTS):
        x = padded(model, x)
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        for own, other in zip(found, model(x)):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_frozen_stages_alone_are_fused(monkeypatch):
    calls, forward = [], conv_module._forward
    monkeypatch.setattr(conv_module, "_forward", lambda *inputs: calls.append(1) or forward(*inputs))
    model, x = ResNet("resnext50_32x4d", "frozen", 3), torch.randn(1, 3, 64, 64)
    count = {"frozen": 1 + 3 * 3, "all": 1 + 3 * 16}
    for variant, expected in (("frozen_stage", "frozen"), ("conv_epilogues", "all")):
        with native.using("auto", variant):
            calls.clear()
            assert [f.requires_grad for f in model(x)] == [True] * 3
            assert len(calls) == count[expected]
            calls.clear()
            with torch.no_grad():
                model(x)
            assert len(calls) == count["all"]


def test_folded_norms_follow_loading_and_types():
    ours, theirs = twin("resnet18", "frozen")
    norm, expected = ours.layer3[1].bn2, theirs["layer3"][1].bn2
    x = torch.randn(2, norm.scale.numel(), 3, 3)
    for dtype in (torch.float32, torch.float64, torch.float32):
        norm, expected, x = norm.to(dtype), expected.to(dtype), x.to(dtype)
        folded = x * norm.scale.view(-1, 1, 1) + norm.shift.view(-1, 1, 1)
        torch.testing.assert_close(folded, FrozenBatchNorm2d.forward(expected, x), rtol=1e-6, atol=1e-6)
        assert norm.scale.dtype == dtype
    assert torch.equal(norm.scale, norm.weight * (norm.running_var + norm.eps).rsqrt())
    address = norm.scale.data_ptr()
    state = {**norm.state_dict(), "running_var": torch.full_like(norm.running_var, 4 - norm.eps)}
    norm.load_state_dict(state)
    assert torch.equal(norm.scale, norm.weight / 2) and norm.scale.data_ptr() == address
    assert set(norm.state_dict()) == {"weight", "bias", "running_mean", "running_var"}


@pytest.mark.parametrize("name", BACKBONES)
def test_parameter_names_and_shapes_are_torchvisions(name):
    with torch.device("meta"):
        ours, theirs = ResNet(name, "batch"), get_model(name, weights=None)
    expected = {k: v.shape for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    assert {k: v.shape for k, v in ours.state_dict().items()} == expected
    assert theirs.fc.in_features == ours.channels[-1]


@pytest.mark.parametrize(("name", "wide", "divisor"), [(name, *of) for name, of in NARROW.items()])
def test_a_narrow_network_has_a_share_of_the_channels(name, wide, divisor):
    ours, theirs = ResNet(name, "batch"), ResNet(wide, "batch")
    assert ours.channels == tuple(channels // divisor for channels in theirs.channels)
    for key, value in theirs.state_dict().items():
        of_the_stem = key.split(".")[0] in ("conv1", "bn1")
        expected = [size // divisor for size in value.shape[:2]] if not of_the_stem else list(value.shape[:2])
        if key == "layer1.0.conv1.weight":
            expected[1] = 64  # what the stem gives
        assert list(ours.state_dict()[key].shape) == [*expected, *value.shape[2:]], key
    maps = ours(torch.rand(1, 3, 64, 96))
    assert [tuple(x.shape[1:]) for x in maps] == [(c, 64 // s, 96 // s) for c, s in zip(ours.channels, (8, 16, 32))]
    with pytest.raises(UserError, match=f"weights of {name}.*--no-pretrained"):
        load_backbone(ours, name)


def trainable(model: nn.Module) -> set[str]:
    return {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_frozen_layers():
    order = ["layer4", "layer3", "layer2", "layer1", "conv1"]
    for count in range(6):
        assert trainable(ResNet("resnet18", "frozen", count)) == set(order[:count])
    assert trainable(ResNet("resnet18", "batch", 3)) == {"layer4", "layer3", "layer2"}
    assert all(p.requires_grad for p in ResNet("resnet18", "batch", 5).parameters())


@pytest.mark.parametrize("variants", [(), ("frozen_stage",), VARIANTS], ids=",".join)
def test_frozen_layers_keep_nothing_for_the_backward(variants):
    model, saved = ResNet("resnet18", "frozen", 3), []
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.append, lambda kept: kept)
    with native.using("auto", *variants), hooks:
        before = model.layer1(model._stem(padded(model, torch.randn(1, 3, 64, 64))))
        assert not saved and not before.requires_grad
        assert model.layer2(before).requires_grad
    assert saved


def test_frozen_norm_has_no_parameters_and_keeps_its_statistics():
    model = ResNet("resnet18").train()
    before = {k: v.clone() for k, v in model.named_buffers()}
    model(torch.randn(2, 3, 64, 64))
    assert not any("bn" in name for name, _ in model.named_parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())


@pytest.mark.parametrize(
    "bad", [("resnet19",), ("resnet18", "group"), ("resnet18", "frozen", 6), ("resnet18", "batch", -1)]
)
def test_wrong_choices(bad):
    with pytest.raises(UserError):
        ResNet(*bad)


def write_weights(folder, name="resnet18", seed=3):
    """A file like torchvision's, named by its own hash, and its weights."""
    torch.manual_seed(seed)
    state = get_model(name, weights=None).state_dict()
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, folder / "new.pth")
    digest = hashlib.sha256((folder / "new.pth").read_bytes()).hexdigest()
    return (folder / "new.pth").rename(folder / f"{name}-{digest[:8]}.pth"), state


@pytest.mark.parametrize("norm", list(NORMS))
def test_load_from_a_path(tmp_path, norm):
    path, state = write_weights(tmp_path)
    model = ResNet("resnet18", norm)
    assert load_backbone(model, "resnet18", path) == path
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_load_from_torch_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    model = ResNet("resnet18")
    with pytest.raises(UserError) as error:
        load_backbone(model, "resnet18")
    assert str(folder / weights_file_name("resnet18")) in str(error.value)
    assert f"public-scripts/download_backbone.sh -d DIR {weights_file_name('resnet18')}`" in str(error.value)
    path, _ = write_weights(folder)
    monkeypatch.setattr("detcore.nn.resnet.weights_file_name", lambda name, version: path.name)
    assert load_backbone(model, "resnet18") == path


def test_file_names_are_the_published_ones():
    assert weights_file_name("resnext50_32x4d") == "resnext50_32x4d-7cdf4587.pth"
    assert weights_file_name("resnet50") == "resnet50-0676ba61.pth"
    assert weights_file_name("resnet50", "IMAGENET1K_V2") == weights_file_name("resnet50", "DEFAULT")
    assert weights_file_name("resnet50", "DEFAULT") == "resnet50-11ad3fa6.pth"
    with pytest.raises(UserError, match="resnet18 has no weights 'IMAGENET1K_V2'; choose one of IMAGENET1K_V1"):
        weights_file_name("resnet18", "IMAGENET1K_V2")


def test_damaged_and_wrong_files(tmp_path):
    path, _ = write_weights(tmp_path)
    model = ResNet("resnet18")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    content = path.read_bytes()
    path.write_bytes(content[:-1000])
    with pytest.raises(UserError, match="damaged"):
        load_backbone(model, "resnet18", path)
    renamed = tmp_path / "weights.pth"
    renamed.write_bytes(content[:-1000])
    with pytest.raises(UserError, match=r"weights\.pth .* is cut off"):
        load_backbone(model, "resnet18", renamed)
    torch.save([1, 2], renamed)
    with pytest.raises(UserError, match="list"):
        load_backbone(model, "resnet18", renamed)
    other, _ = write_weights(tmp_path, "resnet34")
    with pytest.raises(UserError, match=r"unexpected layer1\.2\.conv1\.weight"):
        load_backbone(model, "resnet18", other)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_load_exactly_lists_every_kind_of_difference():
    model = nn.Linear(2, 3)
    with pytest.raises(UserError) as error:
        load_exactly(model, {"weight": torch.zeros(3, 5), "extra": torch.zeros(1), "text": "x"}, "file.pth")
    message = str(error.value)
    assert all(part in message for part in ("file.pth", "missing bias", "unexpected extra", "[3, 5]", "[3, 2]", "str"))


def test_load_exactly_shortens_what_does_not_fit_at_all():
    """A wholly other network is three names of each kind, and how many there are."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(20)))
    other = {f"layer{i}": torch.zeros(1) for i in range(300)} | {f"{i}.bias": torch.zeros(3) for i in range(4)}
    with pytest.raises(UserError) as error:
        load_exactly(model, other, "file.pth")
    assert str(error.value) == (
        "file.pth does not fit this model: missing 0.weight, 1.weight, 2.weight, ... (36 of the model's 40); "
        "unexpected layer0, layer1, layer2, ... (300 of the file's 304); 0.bias is [3], needs [2], "
        "1.bias is [3], needs [2], 2.bias is [3], needs [2], ... (4 such)"
    )


def plain(layer: nn.Sequential, x: torch.Tensor, strides: tuple[int, int, int], dilation: int = 1) -> torch.Tensor:
    """A stage of bottlenecks, frozen norms written out; strides: of the first block's 1x1, 3x3 and shortcut."""

    def normed(conv, norm, x, stride, dilation=1):
        x = F.conv2d(x, conv.weight, None, stride, dilation * (conv.kernel_size[0] // 2), dilation, conv.groups)
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        return (x - norm.running_mean.view(-1, 1, 1)) * factor.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)

    for i, block in enumerate(layer):
        first, second, beside = strides if i == 0 else (1, 1, 1)
        out = F.relu(normed(block.conv1, block.bn1, x, first))
        out = F.relu(normed(block.conv2, block.bn2, out, second, dilation))
        shortcut = normed(*block.downsample, x, beside) if block.downsample is not None else x
        x = F.relu(normed(block.conv3, block.bn3, out, 1) + shortcut)
    return x


@pytest.mark.parametrize("in_1x1", [True, False])
def test_levels_and_where_the_stride_is(in_1x1):
    torch.manual_seed(0)
    model = ResNet("resnet50", "frozen", 3, (2, 4), in_1x1)
    randomise_norms(model)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.fold()
    model, x = model.double(), torch.randn(1, 3, 64, 96, dtype=torch.float64)
    assert model.channels == (256, 1024) and not hasattr(model, "layer4")
    c2, c4 = model(x)
    assert c2.shape[2:] == (16, 24)
    strides = (2, 1, 2) if in_1x1 else (1, 2, 2)
    expected = plain(model.layer3, plain(model.layer2, c2, strides), strides)
    torch.testing.assert_close(c4, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dilation", [1, 2])
def test_the_last_stage_by_itself(dilation):
    torch.manual_seed(0)
    whole = ResNet("resnet50", "frozen", 3, (4, 5), True)
    stage = whole.cut_last_stage()
    assert whole.channels == (1024,) and whole.levels == (4,) and not hasattr(whole, "layer4")
    head, x = LastStage(stage, dilation).double(), torch.randn(2, 1024, 6, 6, dtype=torch.float64)
    found = head(x)
    expected = plain(stage, x, (2, 1, 2) if dilation == 1 else (1, 1, 1), dilation)
    assert found.shape[2:] == ((3, 3) if dilation == 1 else (6, 6))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_frozen_norm_without_variance_or_eps_gives_its_bias():
    norm = NORMS["frozen"](2, eps=0.0)
    norm.running_var.copy_(torch.tensor([0.0, 4]))
    norm.bias.copy_(torch.tensor([3.0, 0]))
    norm.fold()
    assert norm.scale.tolist() == [0, 0.5] and norm.shift.tolist() == [3, 0]
