"""What only a GPU can show: the same program there, against the CPU. Skipped where torch sees none (make gpu).

The ops have their own tests, which run on a GPU as well (the fixture `implementation`). What compares trainings runs on
the CPU too, against itself: so that it is known to fail where it should.
"""

import dataclasses

import pytest
import torch

from detcore.data.synthetic import synthetic_batches
from detcore.detection.detector import detect
from detcore.device import native
from detcore.device.select import select_backend
from detcore.nn import optim
from detcore.ops.focal import focal_loss
from detcore.training import engine
from detcore.training.state import State
from detcore.training.task import Task
from single_stage_detector import loss as loss_module
from single_stage_detector.anchors import anchors, grids
from single_stage_detector.data import DETECTOR
from single_stage_detector.loss import losses
from single_stage_detector.model import RetinaNet
from single_stage_detector.postprocess import postprocess
from single_stage_detector.train import Config

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
ON_GPU = (pytest.mark.gpu, NO_GPU)


def on_gpu(test):
    return pytest.mark.gpu(NO_GPU(test))


def on_cuda(*precisions):
    return (pytest.param("cuda", precision, marks=ON_GPU) for precision in precisions)


needs_kernels = pytest.mark.skipif(
    bool(native.load("single_stage_detector") or native.load("detcore")), reason="the kernels are not built"
)
SIZE, CLASSES = (128, 128), 5
SCALE = 256.0
"""Of the loss in fp16: low enough for the first step, which is not left out and whose gradients are finite."""


@pytest.fixture(autouse=True)
def always_the_same_algorithms():
    """What the trial of convolutions would choose, and the order in which some of them add, may differ between runs."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark, cudnn.benchmark_limit
    cudnn.deterministic = True
    yield
    cudnn.deterministic, cudnn.benchmark, cudnn.benchmark_limit = before


def train(device: str, precision: str, steps: int = 1, norm: str = "batch") -> tuple[list[float], RetinaNet]:
    """The losses of a few steps on one synthetic batch, and the model after them with the last one's gradients."""
    chosen = select_backend(device, precision, benchmark_limit=1)
    torch.manual_seed(0)
    model = chosen.place(RetinaNet("resnet18", CLASSES, SIZE, norm, 5, 32, 1, (16, 32, 64, 128, 256)))
    config = Config(norm="batch", pretrained=False, trainable_backbone_layers=5)

    def loss(network, batch):
        return losses(network(batch.images), model.anchors, batch.boxes, batch.labels)

    optimizer = optim.adam(model, 1e-4, fused=chosen.fused_optimizers)
    scaler = torch.amp.GradScaler(device, init_scale=SCALE, enabled=precision == "fp16")
    fields = {field.name: None for field in dataclasses.fields(Task)}
    task = Task(**fields | {"model": model, "optimizer": optimizer, "loss": loss})
    step = engine.make_train_step(task, State(model, optimizer, scaler, None), model, config, chosen)
    model.train()
    batch = chosen.to_device(next(synthetic_batches(CLASSES, SIZE, 4, 10, seed=1)))
    values = [step([batch]) for _ in range(steps)]
    return [float(sum(terms.values())) for terms in values], model


def apart(ours: RetinaNet, theirs: RetinaNet) -> dict[str, float]:
    """How far each weight's gradients lie apart, relative; 1 where ours are missing. Those of fp16 may be scaled."""
    found = {}
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        expected = b.grad.cpu().double()
        given = torch.zeros_like(expected) if a.grad is None else a.grad.cpu().double()
        assert given.isfinite().all() and expected.norm() > 0, name
        scale = SCALE if given.norm() > SCALE / 16 * expected.norm() else 1.0
        found[name] = float((given / scale - expected).norm() / expected.norm())
    return found


@on_gpu
def test_fp32_gradients_are_those_of_the_cpu():
    ours, theirs = (train(device, "fp32") for device in ("cuda", "cpu"))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4)
    assert max(apart(ours[1], theirs[1]).values()) < 1e-2


@pytest.mark.parametrize(
    ("device", "precision"),
    [("cpu", "bf16"), *on_cuda("bf16", "fp16", "tf32")],
)
def test_gradients_of_other_precisions_are_near_those_of_fp32(device, precision):
    """Batch statistics of four images let rounding grow: on the CPU to 0.5 in the first layer."""
    ours, theirs = train(device, precision), train(device, "fp32")
    assert ours[0] == pytest.approx(theirs[0], rel=1e-2)
    assert max(apart(ours[1], theirs[1]).values()) < 0.8


def against_references(device: str, precision: str, norm: str) -> None:
    """In fp32 each weight's gradient is that of the references; in another precision it lies no further from theirs in
    fp32 than about twice as far as their own in that precision."""
    with native.using("native"):
        ours = train(device, precision, norm=norm)
    with native.using("reference"):
        exact = train(device, "fp32", norm=norm)
        theirs = exact if precision == "fp32" else train(device, precision, norm=norm)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5 if precision == "fp32" else 5e-3)
    own = apart(theirs[1], exact[1])
    allowed = {name: 1e-3 if precision == "fp32" else min(0.02 + 2 * own[name], 0.9) for name in own}
    wrong = {name: found for name, found in apart(ours[1], exact[1]).items() if found > allowed[name]}
    assert not wrong, f"further apart than rounding takes them: {wrong}"


@needs_kernels
@pytest.mark.parametrize("norm", ["batch", "frozen"])
@pytest.mark.parametrize(
    ("device", "precision"),
    [
        ("cpu", "fp32"),
        ("cpu", "bf16"),
        *on_cuda("fp32", "tf32", "bf16", "fp16"),
    ],
)
def test_native_gradients_are_those_of_the_references(device, precision, norm):
    against_references(device, precision, norm)


@needs_kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_op_without_gradients_would_be_seen(monkeypatch, precision):
    def without(*given, **recipe):
        out = focal_loss(*given, **recipe)
        return out.detach() + 0 * given[0].sum() if native._policy == "native" else out

    monkeypatch.setattr(loss_module, "focal_loss", without)
    with pytest.raises(AssertionError, match=r"further apart .*classification_head\.cls_logits\.weight': 1\.0"):
        against_references("cpu", precision, "frozen")


@on_gpu
@needs_kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_native_detections_are_those_of_the_references(precision):
    chosen = select_backend("cuda", precision)
    _, model = train("cuda", precision, steps=0)
    # Scores around 0.08: thousands above the threshold.
    model.head["classification_head"].cls_logits.bias.data.fill_(-2.5)
    batch = chosen.to_device(next(synthetic_batches(CLASSES, SIZE, 4, 10, seed=1)))
    ids = torch.arange(CLASSES, device="cuda")
    found = []
    for policy in ("native", "reference"):
        with native.using(policy), torch.no_grad():
            found.append(detect(DETECTOR, model.eval(), batch, chosen, ids).cpu())
    ours, theirs = found
    assert ours.shape == theirs.shape and (theirs[:, 5] > 0).any()
    loose = 1e-3 if precision == "fp32" else 3e-2
    assert torch.allclose(ours[:, 5], theirs[:, 5], atol=loose)


@on_gpu
def test_every_batch_of_a_stream_arrives_on_the_gpu():
    chosen = select_backend("cuda", "bf16")
    stream = synthetic_batches(CLASSES, SIZE, 4, 10, seed=1)
    sent = [next(stream)._replace(image_id=torch.full((4,), i)) for i in range(5)]
    arrived = list(chosen.prefetch(iter(sent)))
    assert [int(b.image_id[0]) for b in arrived] == list(range(5))
    for before, after in zip(sent, arrived, strict=True):
        assert after.images.is_cuda and after.images.dtype == torch.uint8
        assert torch.equal(after.images.cpu(), before.images)
        rows = after.labels.shape[1]
        assert torch.equal(after.labels.cpu(), before.labels[:, :rows]) and (before.labels[:, rows:] < 0).all()


@on_gpu
def test_detections_are_those_of_the_cpu():
    torch.manual_seed(0)
    lengths = [rows * columns * 9 for rows, columns in grids(SIZE)]
    place = anchors(SIZE, grids(SIZE))
    logits = [torch.randn(2, a, CLASSES) * 2 - 4 for a in lengths]
    deltas = [torch.randn(2, a, 4) * 0.2 for a in lengths]
    ours = postprocess([x.cuda() for x in logits], [d.cuda() for d in deltas], place.cuda(), SIZE)
    theirs = postprocess(logits, deltas, place, SIZE)
    assert torch.equal(ours[2].cpu(), theirs[2])
    assert torch.allclose(ours[1].cpu(), theirs[1], atol=1e-5) and torch.allclose(ours[0].cpu(), theirs[0], atol=1e-2)


@on_gpu
def test_random_generators_come_back():
    chosen = select_backend("cuda", "fp32")
    before = chosen.rng_state()
    first = torch.rand(3, device="cuda"), torch.rand(3)
    chosen.set_rng_state(before)
    assert torch.equal(first[0], torch.rand(3, device="cuda")) and torch.equal(first[1], torch.rand(3))
