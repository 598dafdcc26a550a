"""Steps of RetinaNet with each of its `native.VARIANTS`: recorded as written, and written as without the variant.

On a GPU the recordings are real and it computes in bf16; on the CPU a tape stands in and it is fp32: the same test.
"""

from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from detcore.data.synthetic import synthetic_batches
from detcore.device import native
from detcore.device.base import Backend
from detcore.device.cpu import CpuBackend
from detcore.device.select import select_backend
from detcore.nn import optim
from detcore.training import engine
from detcore.training.config import RunConfig
from detcore.training.state import State
from detcore.training.task import Task
from single_stage_detector.loss import losses
from single_stage_detector.model import RetinaNet
from tests.detcore.device.tape import TapeRecorder

SIZE, CLASSES = (64, 64), 5
STEPS = {"cpu": 3, "cuda": 10}
EPILOGUES = ("conv_epilogues", "frozen_stage")
"""Not there where deterministic algorithms are asked for; so their sums may have another order each time."""
OF_EFFICIENTDET = ("norm_activations", "pyramid_nodes")
APART = {"cpu": 1e-3, "cuda": 0.3}
"""How far a weight's momentum may lie apart, relative, by rounding in fp32 and in bf16; without a gradient it is 1.
On a CPU they are 5e-7 and, with class_bias, which rounds less, 0.11; with fp8_heads 0.25."""
FP8_APART = 0.5
Trained = tuple[list[float], dict[str, Tensor]]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> Iterator[str]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    yield request.param
    cudnn.deterministic, cudnn.benchmark = before


def opened(device: str, recorded: bool, exact: bool) -> Backend:
    if device == "cpu":
        return CpuBackend(torch.device("cpu"), "fp32", TapeRecorder() if recorded else None)
    chosen = select_backend("cuda", "bf16", graphs="on" if recorded else "off")
    torch.backends.cudnn.benchmark = False  # it may choose otherwise for the second run
    torch.backends.cudnn.deterministic = exact
    return chosen


def train(device: str, backbone: str, exact: bool, recorded: bool, *variants: str) -> Trained:
    """The loss of every step, and its momentum {weight's name: sum of its gradients}, where none is lost by rounding.

    Only the last stages train: the gradient of the pooling after the first adds in any order.
    """
    with native.using("auto", *variants):
        chosen = opened(device, recorded, exact)
        torch.manual_seed(0)
        model = chosen.place(RetinaNet(backbone, CLASSES, SIZE, "frozen", 3, 32, 2, (16, 32, 64, 128, 256)))
        optimizer = optim.sgd(model, 1e-3, 0.9, 0.0, fused=True)
        state, config = State(model, optimizer, chosen.scaler(), None), RunConfig(clip_norm=5.0)

        def loss(network, batch):
            return losses(network(batch.images), model.anchors, batch.boxes, batch.labels)

        def batch(number: int):
            return next(synthetic_batches(CLASSES, SIZE, 1, 10, number))

        rest = dict.fromkeys(("lr", "open_data", "targets", "eval_epochs", "hyperparameters"))
        task = Task(model, optimizer, loss=loss, examples=lambda: [batch(10**6)], **rest)
        model.train()
        step = engine.make_train_step(task, state, model, config, chosen)
        terms = [step([chosen.to_device(batch(number))]) for number in range(STEPS[device])]
        values = [float(sum(t.values())) for t in terms]
        known = {p: name for name, p in model.named_parameters()}
        moved = {known[p]: kept["momentum_buffer"].clone() for p, kept in optimizer.state.items()}
        chosen.close()
        return values, moved


plain = lru_cache(train)


def furthest(ours: Trained, theirs: Trained) -> tuple[float, str]:
    """The largest relative difference of a weight's momentum, and its name."""
    return max((float((a - theirs[1][n]).norm() / theirs[1][n].norm()), n) for n, a in ours[1].items())


@pytest.mark.parametrize("variant", [name for name in native.VARIANTS if name not in OF_EFFICIENTDET])
def test_a_recorded_step_with_a_variant_is_the_step(device, variant):
    if device == "cuda" and variant == "fp8_heads" and (missing := native._no_fp8(device)):
        pytest.skip(missing)
    exact = device == "cpu" or variant not in EPILOGUES
    backbone = "resnext50_32x4d" if variant == "merged_groups" else "resnet18"
    written = train(device, backbone, exact, False, variant)
    recorded = train(device, backbone, exact, True, variant)
    if exact:
        assert recorded[0] == written[0]
        assert all(torch.equal(moved, written[1][name]) for name, moved in recorded[1].items())
    else:
        assert recorded[0] == pytest.approx(written[0], rel=1e-2)
        assert furthest(recorded, written)[0] < APART[device]
    without = plain(device, backbone, exact, False)
    assert len(set(without[0])) == STEPS[device] and not [n for n, moved in without[1].items() if not moved.norm() > 0]
    eight = variant == "fp8_heads"
    assert written[0] == pytest.approx(without[0], rel=0.05 if eight else APART[device] / 10)
    apart, name = furthest(written, without)
    assert apart < (FP8_APART if eight else APART[device]), name
    assert not eight or apart > 1e-3, "8 bits are other numbers"


@pytest.mark.parametrize("recorded", [False, True])
def test_a_gradient_that_is_missing_would_be_seen(monkeypatch, recorded):
    """As from a kernel that forgets one: the bias's in the epilogue."""
    from detcore.ops import conv

    right = conv.masked_sum
    monkeypatch.setattr(
        conv, "masked_sum", lambda out, sums, grads: (right(out, sums, grads)[0], torch.zeros(out.shape[1]))
    )
    broken = train("cpu", "resnet18", True, recorded, "conv_epilogues")
    apart, name = furthest(broken, plain("cpu", "resnet18", True, False))
    assert apart > 0.9 and name.endswith("bias")
