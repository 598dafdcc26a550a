"""The variants of the whole model against the model without them: losses, gradients, detections, recordings."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from detcore.data.batch import Batch
from detcore.data.synthetic import synthetic_batches
from detcore.detection.detector import detect
from detcore.device import native
from detcore.device.cpu import CpuBackend
from detcore.nn.resnet import FrozenNorm
from single_stage_detector import model as module
from single_stage_detector import train
from single_stage_detector.config import Config
from single_stage_detector.data import DETECTOR
from single_stage_detector.loss import losses
from single_stage_detector.model import RetinaNet
from tests.detcore.device.streams import logged_streams
from tests.detcore.device.tape import TapeRecorder

SIZE, CLASSES = (96, 96), 5
EXACT = ("multi_cast", "small_levels")
"""Variants that give the same numbers in every bit."""

pytestmark = pytest.mark.skipif(bool(native.load("single_stage_detector")), reason="the variants want the native ops")


@pytest.fixture
def model() -> RetinaNet:
    """With biases and statistics that matter."""
    torch.manual_seed(0)
    model = RetinaNet("resnet18", CLASSES, SIZE, "frozen", 3, 32, 1, (16, 32, 64, 128, 256)).train()
    for part in model.modules():
        if isinstance(part, FrozenNorm):
            part.weight.uniform_(0.5, 1.0)
            part.bias.normal_(0, 0.2)
            part.fold()
    for part in (*model.head.modules(), *model.backbone["fpn"].modules()):
        if isinstance(part, nn.Conv2d):
            nn.init.normal_(part.weight, std=part.weight[0].numel() ** -0.5)
            nn.init.normal_(part.bias, std=0.5)
    nn.init.normal_(model.head["classification_head"].output.bias, -1.0, 1.0)
    return model.to(memory_format=torch.channels_last)


@pytest.fixture(params=["modules", "ops"])
def path(request, monkeypatch):
    """Convolutions with their biases, as on a CPU, or those that leave them to the op, as on a GPU."""
    for name in ("detcore.ops.bias_relu", "detcore.nn.resnet"):
        monkeypatch.setattr(f"{name}.leaves_bias", lambda x, conv: request.param == "ops")
    return request.param


def a_batch(seed: int = 0) -> Batch:
    return next(synthetic_batches(CLASSES, SIZE, 2, 10, seed))


def results(model: RetinaNet, variants: tuple[str, ...], precision: str = "fp32", batch: Batch | None = None):
    """(losses, gradients by name, rows of detections) of a batch."""
    device, batch = CpuBackend(torch.device("cpu"), precision), batch or a_batch()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with native.using("native", *variants):
        with device.autocast():
            terms = losses(model(batch.images), model.anchors, batch.boxes, batch.labels)
        gradients = torch.autograd.grad(sum(terms.values()), list(named.values()))
        with torch.no_grad():
            found = detect(DETECTOR, model, batch, device, torch.arange(CLASSES))
    return {k: v.detach() for k, v in terms.items()}, dict(zip(named, gradients, strict=True)), found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", [*EXACT, "class_bias", "residual_gradient"])
def test_losses_gradients_and_detections_are_those_without(model, path, variant, precision):
    terms, gradients, found = results(model, (), precision)
    own_terms, own_gradients, own_found = results(model, (variant,), precision)
    assert found[:, 5].gt(0.1).sum() > 100 and set(own_gradients) == set(gradients)
    if variant in EXACT:
        assert all(map(torch.equal, terms.values(), own_terms.values())) and torch.equal(found, own_found)
        assert all(torch.equal(own_gradients[name], g) for name, g in gradients.items())
        return
    # Under bf16, class_bias rounds once less and residual_gradient too, at the three feature maps.
    error = 1e-5 if precision == "fp32" else 2e-2
    for name, value in terms.items():
        torch.testing.assert_close(own_terms[name], value, rtol=error / 10, atol=0)
    for name, gradient in gradients.items():
        assert (own_gradients[name] - gradient).norm() <= error * gradient.norm(), name
    if precision == "fp32" or variant == "residual_gradient":
        torch.testing.assert_close(own_found, found, rtol=1e-5, atol=1e-4)


def test_all_together(model, path):
    names = ("class_bias", "residual_gradient", *EXACT)
    terms, gradients, found = results(model, ())
    own_terms, own_gradients, own_found = results(model, names)
    for name, gradient in gradients.items():
        assert (own_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    torch.testing.assert_close(own_found, found, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(own_terms, terms)


def test_the_class_bias_is_an_output_and_its_gradient_the_convolutions(model):
    bias = model.head["classification_head"].output.bias
    images = a_batch().images
    with torch.no_grad():
        usual, _ = model(images)
        with native.using("auto", "class_bias"):
            logits, _, given = model(images)
    assert given is bias
    for with_bias, without in zip(usual, logits, strict=True):
        whole = without.unflatten(1, (-1, 9)) + bias.view(9, CLASSES)
        torch.testing.assert_close(whole.flatten(1, 2), with_bias, rtol=1e-5, atol=1e-5)
    double = model.double()
    plain = results_in_float64(double, ())
    with native.using("auto", "class_bias"):
        torch.testing.assert_close(results_in_float64(double, ("class_bias",)), plain, rtol=1e-9, atol=1e-12)


def results_in_float64(model: RetinaNet, variants: tuple[str, ...]) -> Tensor:
    """The gradient of the class convolution's bias by autograd alone."""
    batch = a_batch()
    with native.using("auto", *variants):
        terms = losses(model(batch.images), model.anchors.double(), batch.boxes.double(), batch.labels)
    return torch.autograd.grad(terms["cls"], model.head["classification_head"].output.bias)[0]


@pytest.mark.parametrize("variants", [(), ("class_bias",), ("multi_cast", "small_levels", "class_bias")])
def test_several_processes_exchange_every_gradient(model, variants):
    """DistributedDataParallel refuses a second step if a parameter of the first had no gradient."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = CpuBackend(torch.device("cpu"), "fp32").parallel(model, world_size=2)
        with native.using("auto", *variants):
            for step in range(2):
                model.zero_grad(set_to_none=True)
                batch = a_batch(step)
                sum(losses(parallel(batch.images), model.anchors, batch.boxes, batch.labels).values()).backward()
    finally:
        torch.distributed.destroy_process_group()
    _, expected, _ = results(model, variants, batch=a_batch(1))
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-5, atol=1e-7)


class Conversions(TorchDispatchMode):
    """The shapes of what is converted or scaled, of 4-D weights in float32, and the passes that do it all at once."""

    def __init__(self, weights):
        super().__init__()
        self.places = {w.untyped_storage().data_ptr() for w in weights}
        self.single, self.passes = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.passes += name == "fold_"
        if name in ("_to_copy", "mul", "copy_") and any(
            isinstance(a, Tensor) and a.dim() == 4 and a.untyped_storage().data_ptr() in self.places for a in args
        ):
            self.single.append((name, tuple(args[0].shape)))
        return func(*args, **(kwargs or {}))


def test_all_copies_are_made_in_a_few_passes(model):
    batch, weights = a_batch(), [p for p in model.parameters() if p.dim() == 4]
    counts = []
    for variants in ((), ("multi_cast",)):
        with native.using("auto", *variants), torch.autocast("cpu", torch.bfloat16), Conversions(weights) as seen:
            outputs = model(batch.images)
        counts.append((len(seen.single), seen.passes))
        with Conversions(weights) as backward:
            sum(x.float().sum() for part in outputs for x in part).backward()
        assert backward.passes == (5 if variants else 0)  # all but that of the frozen layers
    assert counts == [(len(weights), 0), (0, 6)]
    assert all(norm.folded is None for norm in model.modules() if isinstance(norm, FrozenNorm))
    with pytest.raises(RuntimeError), native.using("auto", "multi_cast"):
        model.backbone["body"](torch.zeros(1, 4, 32, 32))
    assert all(norm.folded is None for norm in model.modules() if isinstance(norm, FrozenNorm))


def test_small_levels_run_beside_the_large_ones(model, monkeypatch):
    """After the copies of the weights that both read, with one fork and one join for both heads."""
    batch, copies = a_batch(), module.narrow_copies
    weights = [p for p in model.head.parameters() if p.dim() == 4]
    with logged_streams(monkeypatch) as device:

        def spy(parameters):
            device.log.append("copies")
            return copies(parameters)

        monkeypatch.setattr(module, "narrow_copies", spy)
        convolve = module._convolve

        def on_stream(x, conv, *rest):
            if conv.out_channels in (9 * CLASSES, 36):
                device.log.append(f"{tuple(x.shape[-2:])} on {device.now}")
            return convolve(x, conv, *rest)

        monkeypatch.setattr(module, "_convolve", on_stream)
        with native.using("auto", "small_levels"), torch.autocast("cpu", torch.bfloat16), Conversions(weights) as seen:
            model(batch.images)
        large, small = [(12, 12), (6, 6)], [(3, 3), (2, 2), (1, 1)]
        assert device.log == [
            "copies",
            "second waits for main",
            f"second uses {3 + len(weights) + 2}",  # the levels, and copies of weights and of two biases
            *[f"{size} on main" for size in large * 2],
            *[f"{size} on second" for size in small * 2],
            "main waits for second",
            "main uses 6",
        ]
        assert seen.single == [] and seen.passes == 1


@pytest.mark.parametrize("variant", ["class_bias", "residual_gradient", *EXACT])
def test_a_recorded_step_follows_weights_and_batches(model, path, variant):
    """What a replay computes from new weights, statistics and images is what the step would have computed."""
    batch, device = a_batch(), CpuBackend(torch.device("cpu"), "bf16")
    learns = [p for p in model.parameters() if p.requires_grad]

    def step():
        with device.autocast():
            terms = losses(model(batch.images), model.anchors, batch.boxes, batch.labels)
        return [*terms.values(), *torch.autograd.grad(sum(terms.values()), learns)]

    with native.using("native", variant):
        replay = TapeRecorder().record(step)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.9)
            for norm in (m for m in model.modules() if isinstance(m, FrozenNorm)):
                norm.weight.mul_(1.1)
                norm.fold()
            for old, new in zip(batch, a_batch(3), strict=True):
                old.copy_(new)
        found, expected = replay(), step()
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        ({}, []),
        ({"backbone": "resnet18"}, ["merged_groups"]),
        ({"norm": "batch", "mlperf_division": "open"}, ["stem"]),
        ({"ops": "reference"}, ["stem", "class_bias", "merged_groups"]),
    ],
)
def test_variants_that_do_nothing_are_said(options, idle):
    config = Config(synthetic=True, variants=("stem", "class_bias", "merged_groups"), **options)
    assert train.idle_variants(config) == idle
    said = [note for note in train.notes(config) if "nothing here" in note]
    assert [note.partition(":")[0] for note in said] == ([f"--variants {','.join(idle)}"] if idle else [])
