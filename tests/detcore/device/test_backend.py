"""What choosing a device sets for the whole process, with stand-ins for a GPU."""

import re

import pytest
import torch

from detcore import UserError
from detcore.device.base import PRECISIONS
from detcore.device.select import select_backend, why_eager
from detcore.processes.launcher import World
from detcore.training import engine
from detcore.training.config import RunConfig


@pytest.fixture(autouse=True)
def as_before():
    """Gives the switches of the process back."""
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, cudnn.benchmark_limit
    yield
    torch.set_float32_matmul_precision(before[0])
    cudnn.allow_tf32, cudnn.benchmark, cudnn.benchmark_limit = before[1:]


@pytest.fixture
def one_gpu(monkeypatch):
    for name, answer in (
        ("is_available", True),
        ("device_count", 1),
        ("set_device", None),
        ("is_bf16_supported", True),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *given, answer=answer: answer)


@pytest.mark.parametrize("limit", [0, 3])
def test_cudnn_tries_as_many_algorithms_as_the_config_says(one_gpu, limit):
    torch.backends.cudnn.benchmark = False
    config = RunConfig(device="cuda", graphs="off", cudnn_benchmark_limit=limit)
    assert engine.open_device(config, World()).collective_backend == "nccl"
    assert torch.backends.cudnn.benchmark and torch.backends.cudnn.benchmark_limit == limit


def test_without_a_config_cudnn_keeps_its_own_number(one_gpu):
    torch.backends.cudnn.benchmark_limit = 7
    select_backend("cuda", "bf16")
    assert torch.backends.cudnn.benchmark_limit == 7


@pytest.mark.parametrize("before", ["fp32", "tf32"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_switch_of_tf32_says_the_same(one_gpu, precision, before):
    """torch raises where the older ones and the newer ones contradict each other."""
    select_backend("cuda", before)
    select_backend("cuda", precision)
    tf32, cudnn = precision == "tf32", torch.backends.cudnn
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    assert torch.backends.cuda.matmul.allow_tf32 is cudnn.allow_tf32 is tf32
    for newer in (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn):
        assert (newer.fp32_precision == "tf32") is tf32


@pytest.mark.parametrize("device", ["cpu", "tpu"])
def test_graphs_on_where_no_gpu_is_meant_is_refused_with_the_configuration(device):
    with pytest.raises(UserError, match=f"--graphs on --device {device}: only a GPU"):
        RunConfig(graphs="on", device=device)


def test_who_records_steps():
    with pytest.raises(UserError, match="--graphs on: only a GPU"):
        select_backend("cpu", "fp32", graphs="on")
    device = select_backend("cpu", "fp32", graphs="auto")
    assert device.recorder is None and "only a GPU" in device.step_execution
    assert why_eager("cuda", "auto", 1) == "" and why_eager("cuda", "on", 8) == ""
    assert re.search("few images.*waits for the processor.*--graphs on", why_eager("cuda", "auto", 8))
    assert why_eager("cuda", "off", 1)


def test_a_machine_without_a_gpu_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"--device cuda: torch sees no GPU .*use --device cpu"):
        select_backend("cuda", "fp32")
