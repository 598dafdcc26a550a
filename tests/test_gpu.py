"""What only a GPU can show: the same program there, against the CPU. Skipped where torch sees none (make gpu).

The ops have their own tests, which run on a GPU as well (the fixture `implementation`).
"""

import dataclasses

import pytest
import torch

from detcore import backend, engine, native, optim
from detcore.data.synthetic import synthetic_batches
from detcore.detection import detect
from detcore.state import State
from detcore.task import Task
from single_stage_detector.anchors import anchors, grids
from single_stage_detector.data import DETECTOR
from single_stage_detector.loss import losses
from single_stage_detector.model import RetinaNet
from single_stage_detector.postprocess import postprocess
from single_stage_detector.train import Config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
needs_kernels = pytest.mark.skipif(
    bool(native.load("single_stage_detector") or native.load("detcore")), reason="the kernels are not built"
)
SIZE, CLASSES = (128, 128), 5


@pytest.fixture(autouse=True)
def always_the_same_algorithms():
    """What the trial of convolutions would choose, and the order in which some of them add, may differ between runs."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark, cudnn.benchmark_limit
    cudnn.deterministic = True
    yield
    cudnn.deterministic, cudnn.benchmark, cudnn.benchmark_limit = before


def train(device: str, precision: str, steps: int = 3, norm: str = "batch") -> tuple[list[float], RetinaNet]:
    """The losses of a few steps on one synthetic batch, and the model after them."""
    chosen = backend.select(device, precision, benchmark_limit=1)
    torch.manual_seed(0)
    model = chosen.place(RetinaNet("resnet18", CLASSES, SIZE, norm, 5, 32, 1, (16, 32, 64, 128, 256)))
    config = Config(norm="batch", pretrained=False, trainable_backbone_layers=5)

    def loss(network, batch):
        return losses(network(batch.images), model.anchors, batch.boxes, batch.labels)

    optimizer = optim.adam(model, 1e-4, fused=chosen.is_gpu)
    fields = {field.name: None for field in dataclasses.fields(Task)}
    task = Task(**fields | {"model": model, "optimizer": optimizer, "loss": loss})
    step = engine.make_train_step(task, State(model, optimizer, chosen.scaler(), None), model, config, chosen)
    model.train()
    batch = chosen.to_device(next(synthetic_batches(CLASSES, SIZE, 4, 10, seed=1)))
    values = [step([batch]) for _ in range(steps)]
    return [float(sum(terms.values())) for terms in values], model


def test_fp32_training_is_that_of_the_cpu():
    ours, theirs = train("cuda", "fp32")[0], train("cpu", "fp32")[0]
    assert ours == pytest.approx(theirs, rel=2e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_other_precisions_train_close_to_fp32(precision):
    ours, theirs = train("cuda", precision)[0], train("cuda", "fp32")[0]
    assert ours == pytest.approx(theirs, rel=5e-2)


@needs_kernels
@pytest.mark.parametrize("norm", ["batch", "frozen"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("tf32", 1e-2), ("bf16", 3e-2), ("fp16", 3e-2)])
def test_native_training_is_that_of_the_references(norm, precision, tolerance):
    with native.using("native"):
        ours = train("cuda", precision, norm=norm)[0]
    with native.using("reference"):
        theirs = train("cuda", precision, norm=norm)[0]
    assert ours == pytest.approx(theirs, rel=tolerance)


@needs_kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_native_detections_are_those_of_the_references(precision):
    chosen = backend.select("cuda", precision)
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


def test_every_batch_of_a_stream_arrives_on_the_gpu():
    chosen = backend.select("cuda", "bf16")
    stream = synthetic_batches(CLASSES, SIZE, 4, 10, seed=1)
    sent = [next(stream)._replace(image_id=torch.full((4,), i)) for i in range(5)]
    arrived = list(chosen.ahead(iter(sent)))
    assert [int(b.image_id[0]) for b in arrived] == list(range(5))
    for before, after in zip(sent, arrived, strict=True):
        assert after.images.is_cuda and after.images.dtype == torch.uint8
        assert torch.equal(after.images.cpu(), before.images)
        rows = after.labels.shape[1]
        assert torch.equal(after.labels.cpu(), before.labels[:, :rows]) and (before.labels[:, rows:] < 0).all()


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


def test_random_generators_come_back():
    chosen = backend.select("cuda", "fp32")
    before = chosen.rng_state()
    first = torch.rand(3, device="cuda"), torch.rand(3)
    chosen.set_rng_state(before)
    assert torch.equal(first[0], torch.rand(3, device="cuda")) and torch.equal(first[1], torch.rand(3))
