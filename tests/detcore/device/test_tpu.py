"""What TPUs need of the backend, as far as it runs without one; tests/test_tpu.py runs it on the emulations."""

import importlib.metadata
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from detcore import UserError
from detcore.data.batch import Batch, whole_images
from detcore.detection.program import spread
from detcore.device import tpu
from detcore.device.select import select_backend

ROOT = Path(__file__).parents[3]
GRADIENTS = """
import sys
import torch
import torch.distributed as dist
from detcore.device.tpu import TpuBackend


class OnTheHost(TpuBackend):
    def all_reduce_sum(self, values):
        dist.all_reduce(values)


rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
torch.manual_seed(0)
images, truth = torch.randn(6, 5), torch.randn(6, 3)
model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
((model(images) - truth) ** 2).mean().backward()
whole = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
mine = slice(3 * rank, 3 * rank + 3)
((model(images[mine]) - truth[mine]) ** 2).mean().backward()
apart = max((p.grad - g).abs().max() for p, g in zip(model.parameters(), whole))
OnTheHost(torch.device("cpu"), "fp32").reduce_gradients(list(model.parameters()))
together = max((p.grad - g).abs().max() for p, g in zip(model.parameters(), whole))
assert apart > 1e-2 and together < 1e-6, (apart, together)
dist.destroy_process_group()
"""


@pytest.fixture
def core() -> tpu.TpuBackend:
    """A TPU's backend whose tensors lie on the CPU."""
    return tpu.TpuBackend(torch.device("cpu"), "bf16")


@pytest.fixture
def nothing_installed(monkeypatch):
    """No torch-tpu has loaded, and neither package is there."""

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    monkeypatch.setitem(sys.modules, "torch_xla", None)


def test_without_either_package_the_user_is_told_what_to_install(nothing_installed):
    missing = r"--device tpu: torch-tpu is not installed, torch-xla is not installed"
    with pytest.raises(UserError, match=missing + r"\. Install torch-tpu .*\.\[tpu\].*torch-xla 2\.9"):
        select_backend("tpu", "auto")


def test_torch_tpu_without_a_tpu_is_named(nothing_installed, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"torch-tpu": "0.2.0"}.get(name) or "2.9.0")
    with pytest.raises(UserError, match=r"torch-tpu is 0\.2\.0 and sees no TPU, torch-xla is 2\.9\.0"):
        select_backend("tpu", "auto")


def test_what_a_tpu_cannot_do_is_refused():
    with pytest.raises(UserError, match="fp16 wants a GPU; on a TPU use bf16 or fp32"):
        select_backend("tpu", "fp16")
    with pytest.raises(UserError, match="--graphs on: only a GPU"):
        select_backend("tpu", "bf16", graphs="on")


@pytest.mark.parametrize("seen, expected", [("tpu", True), ("cuda", False), (None, False)])
def test_auto_asks_torch_for_a_tpu(monkeypatch, seen, expected):
    accelerator = type("Device", (), {"type": seen})
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: seen and accelerator)
    assert tpu.found() is expected


def normalised(core, values: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    """A convolution that leaves bf16 values as they are, and a normalisation that learns from them."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3)[:, :, None, None])
    model = core.place(model) if core else model
    with torch.autocast("cpu", torch.bfloat16):
        return model[1], model(values)


def test_normalisation_computes_and_learns_in_float32_under_bf16(core):
    torch.manual_seed(0)
    values = (torch.randn(4, 3, 16, 16) + 20).bfloat16().float()
    norm, found = normalised(core, values)
    plain = nn.BatchNorm2d(3)
    expected = plain(values)
    assert norm.running_mean.dtype == norm.running_var.dtype == found.dtype == torch.float32
    assert torch.equal(found, expected) and torch.equal(norm.running_mean, plain.running_mean)
    assert torch.equal(norm.running_var, plain.running_var)
    assert normalised(None, values)[1].dtype == torch.bfloat16, "this is what autocast alone does"


def test_statistics_that_a_device_forgets_are_learned_as_torch_does(core, monkeypatch):
    torch.manual_seed(0)
    plain, ours = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    ours.load_state_dict(plain.state_dict())
    for _ in range(3):
        values = torch.randn(4, 3, 5, 5) * 3 + 1
        plain(values)
        tpu._learn_statistics(ours, (values,))
    torch.testing.assert_close(ours.running_mean, plain.running_mean)
    torch.testing.assert_close(ours.running_var, plain.running_var)
    ours.eval()
    before = ours.running_mean.clone()
    tpu._learn_statistics(ours, (torch.ones(4, 3, 5, 5),))
    assert torch.equal(ours.running_mean, before)
    assert core._learns_statistics(), "the CPU keeps them up, so that nothing is added there"
    assert len(core.place(nn.BatchNorm2d(3))._forward_pre_hooks) == 1
    monkeypatch.setattr(tpu.TpuBackend, "_learns_statistics", lambda self: False)
    assert len(core.place(nn.BatchNorm2d(3))._forward_pre_hooks) == 2


def batch(images: int = 2, boxes: int = 4) -> Batch:
    return whole_images(
        torch.zeros(images, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(images, boxes, 4),
        torch.full((images, boxes), -1),
        torch.arange(images),
        torch.ones(images, 2, dtype=torch.int64),
    )


def test_a_step_keeps_the_shape_of_its_first_batch(core):
    step = core.prepare_eager_step(lambda batches: len(batches), None)
    assert step([batch(), batch()]) == 2
    assert step([batch()]) == 1, "the tail of an epoch"
    with pytest.raises(
        UserError, match=r"boxes was 2x4x4 float32, is 2x7x4 float32; labels was 2x4 int64, is 2x7 int64"
    ):
        step([batch(), batch(boxes=7)])
    with pytest.raises(UserError, match=r"images was 2x3x8x8 uint8, is 1x3x8x8 uint8"):
        step([batch(images=1)])


def test_batches_go_to_the_device_whole_and_one_ahead(core):
    asked = []

    def stream():
        for number in range(3):
            asked.append(number)
            yield batch()

    ahead = core.prefetch(stream())
    assert asked == []
    first = next(ahead)
    assert asked == [0, 1] and first.images.dtype == torch.uint8 and first.boxes.shape == (2, 4, 4)
    assert len(list(ahead)) == 2


def test_a_checkpoint_holds_tensors_of_the_host(core):
    given = {
        "model": {"w": torch.ones(2)},
        "step": 3,
        "evaluations": [[1, 0.5]],
        "ema": None,
        "state": {0: torch.ones(1)},
    }
    assert repr(core.to_host(given)) == repr(given)
    assert core.collective_device == core.loader_device == torch.device("cpu")


def test_cores_take_the_mean_of_their_gradients():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [sys.executable, "-c", GRADIENTS]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*words, rank, port], env=environ) for rank in ("0", "1")]
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]


def test_num_cores_goes_on_through_torchrun(monkeypatch):
    calls = []
    monkeypatch.setattr(os, "execve", lambda *given: calls.append(given))
    environ = {"A": "b"}
    spread(8, "ssd300.train", ["--device", "tpu", "--num-cores", "8"], environ)
    ((program, words, given),) = calls
    assert (
        program == sys.executable and given["A"] == "b" and given["PET_SIGNALS_TO_HANDLE"] == "SIGTERM,SIGINT,SIGUSR1"
    )
    assert words[1:3] == ["-m", "torch.distributed.run"] and "--nproc_per_node=8" in words
    assert words[words.index("ssd300.train") :] == ["ssd300.train", "--device", "tpu", "--num-cores", "8"]


def test_num_cores_where_the_processes_are_there_already(monkeypatch):
    monkeypatch.setattr(os, "execve", lambda *given: pytest.fail("started again"))
    launched = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1"}
    launched["MASTER_ADDR"] = "h"
    spread(2, "ssd300.train", [], launched)
    spread(0, "ssd300.train", [], launched)
    spread(1, "ssd300.train", [], {})
    with pytest.raises(UserError, match="--num-cores 4: a launcher has started 2 processes"):
        spread(4, "ssd300.train", [], launched)
