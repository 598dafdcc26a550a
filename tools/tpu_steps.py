"""Training steps of SSD300 on a device, by the product's own lines; run by tools.tpu_check in each environment.

    python -m tools.tpu_steps --device tpu --precision bf16 --steps 20 --json FILE

Writes what it saw as JSON: losses of every step, seconds, programs compiled after each step, and the checks of its
device. Where torch-tpu is installed but no TPU is there, TPU_LIBRARY_PATH names an emulation.
"""

import argparse
import importlib.util
import itertools
import json
import os
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn


def open_emulation() -> None:
    """Lets torch-tpu take the library of TPU_LIBRARY_PATH for a TPU; by itself it looks for hardware first."""
    if os.environ.get("TPU_LIBRARY_PATH") and importlib.util.find_spec("torch_tpu"):
        from torch_tpu import _loader

        _loader._init_device("tpu")
        with warnings.catch_warnings():  # says that it is experimental
            warnings.simplefilter("ignore")
            # Each operation is waited for: several at a time have been seen to wait for each other for ever.
            torch.tpu.eager_mode = torch.tpu.EagerMode.DEFER_NEVER_AND_LAUNCH_BLOCKING


def narrowed(model: nn.Module, by: int) -> nn.Module:
    """The same network with a part of the channels: those of every convolution, normalisation and map divided by `by`;
    the predictions keep theirs."""
    predictors = {*model.loc, *model.conf}
    for module in [*model.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, nn.Conv2d):
                inputs = child.in_channels if child.in_channels == 3 else child.in_channels // by
                outputs = child.out_channels if child in predictors else child.out_channels // by
                bias = child.bias is not None
                new = nn.Conv2d(inputs, outputs, child.kernel_size, child.stride, child.padding, bias=bias)
                module._modules[name] = new
            elif isinstance(child, nn.BatchNorm2d):
                module._modules[name] = nn.BatchNorm2d(child.num_features // by)
    return model


def build(given: argparse.Namespace, device) -> tuple:
    """Task, State and config of a small SSD300 on a device: what `engine.make_train_step` wants."""
    from detcore.nn import optim
    from detcore.training.config import RunConfig
    from detcore.training.state import State
    from detcore.training.task import Task
    from ssd300.loss import losses
    from ssd300.model import SSD300

    torch.manual_seed(0)
    model = device.place(narrowed(SSD300("resnet18", num_classes=5), given.narrow))

    def loss(network, batch):
        return losses(network(batch.images), model.priors, batch.boxes, batch.labels)

    optimizer = optim.sgd(model, given.lr, 0.9, 5e-4, fused=False)
    unused = {"open_data": None, "targets": {"AP": None}, "eval_epochs": None, "hyperparameters": {}}
    task = Task(model=model, optimizer=optimizer, lr=lambda step, per_epoch, base: given.lr, loss=loss, **unused)
    return task, State(model, optimizer, device.scaler(), None), RunConfig(accumulate=given.accumulate)


def batches_of(given: argparse.Namespace):
    """An endless stream of different batches of one shape."""
    from detcore.data.synthetic import synthetic_batches

    seed = 0
    while True:
        yield next(synthetic_batches(5, (300, 300), given.batch_size, 8, seed))
        seed += 1


def compiled() -> int | None:
    """Programs compiled so far by torch-xla; None where it does not compute."""
    if "torch_xla" not in sys.modules:
        return None
    from torch_xla.debug import metrics

    return metrics.counter_value("UncachedCompile") or 0


def on_the_host() -> list[str]:
    """Operations that torch-xla left to the CPU."""
    if "torch_xla" not in sys.modules:
        return []
    from torch_xla.debug import metrics

    reading = "aten::_local_scalar_dense"  # a number, for the report
    return [name for name in metrics.counter_names() if name.startswith("aten::") and name != reading]


def refused(step, batch) -> str:
    """What the step says to a batch of another shape; "" if it takes it."""
    from detcore import UserError

    try:
        step([batch._replace(boxes=batch.boxes[:, :4], labels=batch.labels[:, :4])])
    except UserError as error:
        return str(error)
    return ""


def checkpoint_returns(task, state, device) -> bool:
    """Whether weights, moments and generators come back from a checkpoint's contents."""
    contents = device.to_host(state.contents())
    before, generators = contents["model"]["conf.0.bias"].clone(), device.rng_state()
    with torch.no_grad():
        task.model.conf[0].bias.zero_()
    state.model.load_state_dict(contents["model"])
    device.set_rng_state(generators)
    same = torch.equal(task.model.conf[0].bias.detach().cpu(), before)
    return same and torch.equal(device.rng_state(), generators) and before.device.type == "cpu"


def best_scores(given: argparse.Namespace, task, device) -> list[float]:
    """The ten best detections of two batches by the lines of an evaluation, then of an image by those of a prediction;
    20 of an image instead of 200."""
    from detcore.detection import detector as detection
    from detcore.detection import inference
    from ssd300.config import Config
    from ssd300.data import DETECTOR
    from ssd300.postprocess import postprocess

    task.model.eval()

    def infer(model, batch, autocast) -> tuple:
        with autocast():
            outputs = model(batch.images)
        return postprocess(outputs, model.priors, detections=20)

    detector = DETECTOR._replace(infer=infer)
    find = detection.compiled_detect(detector, task.model, range(1, 6), device)
    rows = detection.detect_all(find, itertools.islice(batches_of(given), 2), device, lambda phase, count: None).rows
    image, ids = next(batches_of(given)).images[0], torch.arange(1, 6).to(device.device)
    seen = inference.look(Config(), detector, task.model, image, device, ids)
    return rows[:, 5].sort(descending=True).values[:10].tolist() + seen.rows[:10, 5].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="tpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--narrow", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    open_emulation() if given.device == "tpu" else None
    from detcore.device.select import select_backend
    from detcore.nn import optim
    from detcore.training import engine

    began = time.perf_counter()
    device = select_backend(given.device, given.precision)
    task, state, config = build(given, device)
    step = engine.make_train_step(task, state, task.model, config, device)
    found = {"device": device.name, "torch": torch.__version__, "losses": [], "seconds": [], "compiled": []}
    stream = device.prefetch(batches_of(given))
    found["scores"] = best_scores(given, task, device)  # of the same weights as the CPU's
    task.model.train()
    for number in range(given.steps):
        start = time.perf_counter()
        batches = [device.to_device(next(stream)) for _ in range(given.accumulate)]
        optim.set_lr(optimizer=task.optimizer, lr=given.lr)
        terms = step(batches)
        found["compiled"].append(compiled())  # before the loss is read, which is a program too
        found["losses"].append(float(sum(terms.values())))
        found["seconds"].append(round(time.perf_counter() - start, 2))
        print(f"{given.device} {given.precision} step {number + 1}: {found['losses'][-1]:.6f}", file=sys.stderr)
    norm = task.model.backbone.bn1
    found["statistics"] = [
        str(norm.running_mean.dtype),
        norm.running_mean.cpu().tolist(),
        norm.running_var.cpu().tolist(),
    ]
    found["loss_dtype"] = sorted({str(value.dtype) for value in terms.values()})
    found["finite"] = optim.finite(task.optimizer)
    found["on_the_host"] = on_the_host()
    found["refused"] = refused(step, batches[0])
    found["checkpoint"] = checkpoint_returns(task, state, device)
    found["peak_gib"] = round(device.peak_memory_gib(), 2)
    device.synchronize()
    found["total_seconds"] = round(time.perf_counter() - began, 1)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
