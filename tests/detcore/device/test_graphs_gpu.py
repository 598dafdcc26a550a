"""Recorded steps on a real GPU against the same steps as they are written. Skipped where torch sees none (make gpu)."""

import copy
import gc

import pytest
import torch

from detcore.data.synthetic import synthetic_batches
from detcore.detection.detector import detect
from detcore.device.select import select_backend
from detcore.nn import optim
from detcore.training import checkpoint, engine
from detcore.training.config import RunConfig
from detcore.training.state import State
from detcore.training.task import Task
from single_stage_detector.data import DETECTOR
from single_stage_detector.loss import losses
from single_stage_detector.model import RetinaNet
from tests.detcore.device.test_graphs import same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
SIZE, CLASSES, STEPS = (128, 128), 5, 20
ADAM, SGD = "adam", "sgd"


@pytest.fixture(autouse=True)
def always_the_same_algorithms():
    """The trial of convolutions may choose others for the second run; `select` switches it on."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


def batch_of(images: int, number: int):
    return next(synthetic_batches(CLASSES, SIZE, images, 10, number))


class Run:
    """A small RetinaNet and its step, recorded or not. Nothing that it makes refers to it, so that it ends with its
    last name."""

    def __init__(self, graphs: str, precision: str = "fp32", optimizer: str = ADAM, scored: bool = False, **options):
        self.device = select_backend("cuda", precision, graphs=graphs)
        torch.backends.cudnn.benchmark = False
        torch.manual_seed(0)
        # Only the last stages train: the gradient of the pooling after the first adds in any order.
        model = RetinaNet("resnet18", CLASSES, SIZE, "batch", 3, 32, 1, (16, 32, 64, 128, 256))
        self.model = self.device.place(model)
        if scored:  # about 0.08 for every class of every anchor: above the threshold of detections
            self.model.head["classification_head"].cls_logits.bias.data.fill_(-2.5)
        self.config = RunConfig(**{"accumulate": 2, "clip_norm": 5.0, "ema_decay": 0.9} | options)
        fused = {ADAM: lambda: optim.adam(self.model, 1e-4, fused=True)}
        fused[SGD] = lambda: optim.sgd(self.model, 1e-3, 0.9, 1e-4, fused=True)
        self.state = State(self.model, fused[optimizer](), self.device.scaler(), optim.Ema(self.model, 0.9))
        self.images = 4
        self.step = None

    def prepare(self) -> None:
        anchors, images = self.model.anchors, self.images

        def loss(network, batch):
            return losses(network(batch.images), anchors, batch.boxes, batch.labels)

        rest = dict.fromkeys(("lr", "open_data", "targets", "eval_epochs", "hyperparameters"))
        task = Task(self.model, self.state.optimizer, loss=loss, examples=lambda: [batch_of(images, 10**6)], **rest)
        self.model.train()
        self.step = engine.make_train_step(task, self.state, self.model, self.config, self.device)

    def batch(self, number: int):
        return batch_of(self.images, number)

    def go_on(self, steps: int) -> list[dict[str, float]]:
        if not self.step:
            self.prepare()
        self.model.train()
        terms = []
        for _ in range(steps):
            number = self.state.step
            optim.set_lr(self.state.optimizer, 1e-4 * min(1, (number + 1) / 10))
            count = self.config.accumulate
            terms.append(self.step([self.device.to_device(self.batch(number * count + i)) for i in range(count)]))
            self.state.step += 1
        return [{name: float(value) for name, value in t.items()} for t in terms]

    def contents(self) -> dict:
        return copy.deepcopy(self.state.contents()) | {"generators": self.device.rng_state()}

    def load(self, saved: dict) -> None:
        self.model.load_state_dict(saved["model"])
        optim.load_state_dict(self.state.optimizer, saved["optimizer"])
        self.state.scaler.load_state_dict(saved["scaler"])
        self.state.ema.load_state_dict(saved["ema"])
        self.state.step = saved["step"]
        self.device.set_rng_state(saved["generators"])


@pytest.mark.parametrize("optimizer", [ADAM, SGD])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_a_recorded_step_is_the_step(precision, optimizer):
    plain, again, recorded = (Run(g, precision, optimizer) for g in ("off", "off", "on"))
    expected = plain.go_on(STEPS)
    assert again.go_on(STEPS) == expected and same(again.contents(), plain.contents()), "eager steps are not repeatable"
    assert recorded.go_on(STEPS) == expected
    assert same(recorded.contents(), plain.contents())
    assert len({t["cls"] for t in expected}) == STEPS
    recorded.device.close()


@pytest.mark.parametrize(("first", "second"), [("on", "off"), ("off", "on"), ("on", "on")])
def test_a_checkpoint_goes_on_recorded_or_not(tmp_path, first, second):
    whole = Run("off", "fp16")
    expected = whole.go_on(10)
    start = Run(first, "fp16")
    terms = start.go_on(5)
    checkpoint.save(tmp_path / "x.pt", start.contents())
    rest = Run(second, "fp16")
    rest.load(checkpoint.load(tmp_path / "x.pt"))
    assert terms + rest.go_on(5) == expected and same(rest.contents(), whole.contents())
    for run in (start, rest):
        run.device.close()


@torch.inference_mode()
def found(run: Run, find, number: int) -> torch.Tensor:
    run.model.eval()
    with run.state.ema.applied(run.model):
        rows = find(run.device.to_device(run.batch(number)))
    run.model.train()
    return rows


def test_evaluation_in_between_is_recorded_too_and_disturbs_nothing():
    ids = torch.arange(CLASSES, device="cuda")
    plain, recorded = Run("off", "bf16", scored=True), Run("on", "bf16", scored=True)
    finders = []
    for run in (plain, recorded):
        model, device = run.model, run.device
        finders.append(device.compile_inference(lambda b, m=model, d=device: detect(DETECTOR, m, b, d, ids)))
    kept = []
    for part in range(3):
        assert recorded.go_on(4) == plain.go_on(4)
        for number in (part, part + 100):
            rows = [found(run, find, number) for run, find in zip((plain, recorded), finders, strict=True)]
            kept.append((rows[1], rows[1].clone(), rows[0]))
    for replayed, copied, expected in kept:
        assert torch.equal(replayed, copied), "a result was overwritten by a later replay"
        assert torch.allclose(replayed, expected, atol=1e-3)
    assert (kept[0][0][:, 5] > 0).any() and not torch.equal(kept[0][0], kept[-1][0])
    assert same(recorded.contents(), plain.contents())
    recorded.device.close()


def test_memory_does_not_grow_and_comes_back():
    gc.collect()  # of other tests
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    run = Run("on", "bf16")
    run.go_on(3)
    torch.cuda.synchronize()
    used = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    run.go_on(STEPS)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == used[0]
    assert torch.cuda.memory_reserved() <= used[1] + 2**21  # one more segment, for the terms of more steps
    run.device.close()
    gc.disable()  # what the run held must go without
    try:
        del run
        torch.cuda.empty_cache()
        assert torch.cuda.memory_allocated() <= before + 2**20
    finally:
        gc.enable()


def test_recorded_batches_keep_their_padding_and_events_give_seconds():
    given = next(synthetic_batches(CLASSES, SIZE, 2, 100, 0))
    recording, plain = (select_backend("cuda", "fp32", graphs=g) for g in ("on", "off"))
    start = plain.record_event()
    assert recording.to_device(given).boxes.shape[1] == plain.to_device(given).boxes.shape[1] == 100
    torch.randn(4096, 4096, device="cuda") @ torch.randn(4096, 4096, device="cuda")
    end = plain.record_event()
    plain.synchronize()
    assert 0 < plain.seconds_between([(start, end)]) < 60
