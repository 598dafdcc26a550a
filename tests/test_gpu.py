"""What only a GPU can show: the same program there, against the CPU. Skipped where torch sees none (make gpu)."""

import dataclasses

import pytest
import torch

from detcore import backend, engine, optim
from detcore.data.synthetic import synthetic_batches
from detcore.state import State
from detcore.task import Task
from single_stage_detector.loss import losses
from single_stage_detector.model import RetinaNet
from single_stage_detector.postprocess import postprocess
from single_stage_detector.train import Config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
SIZE, CLASSES = (128, 128), 5


def train(device: str, precision: str, steps: int = 3) -> tuple[list[float], RetinaNet]:
    """The losses of a few steps on one synthetic batch, and the model after them."""
    chosen = backend.select(device, precision)
    torch.manual_seed(0)
    model = chosen.place(RetinaNet("resnet18", CLASSES, SIZE, "batch", 5, 32, 1, (16, 32, 64, 128, 256)))
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


def test_detections_are_those_of_the_cpu():
    torch.manual_seed(0)
    _, model = train("cpu", "fp32", steps=0)
    logits = torch.randn(2, len(model.anchors), CLASSES) * 2 - 4
    deltas = torch.randn(2, len(model.anchors), 4) * 0.2
    ours = postprocess(logits.cuda(), deltas.cuda(), model.anchors.cuda(), SIZE)
    theirs = postprocess(logits, deltas, model.anchors, SIZE)
    assert torch.equal(ours[2].cpu(), theirs[2])
    assert torch.allclose(ours[1].cpu(), theirs[1], atol=1e-5) and torch.allclose(ours[0].cpu(), theirs[0], atol=1e-2)


def test_random_generators_come_back():
    chosen = backend.select("cuda", "fp32")
    before = chosen.rng_state()
    first = torch.rand(3, device="cuda"), torch.rand(3)
    chosen.set_rng_state(before)
    assert torch.equal(first[0], torch.rand(3, device="cuda")) and torch.equal(first[1], torch.rand(3))
