"""What choosing a device sets for the whole process, with stand-ins for a GPU."""

import pytest
import torch

from detcore.device import backend
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
    assert engine.open_device(config, World()).is_gpu
    assert torch.backends.cudnn.benchmark and torch.backends.cudnn.benchmark_limit == limit


def test_without_a_config_cudnn_keeps_its_own_number(one_gpu):
    torch.backends.cudnn.benchmark_limit = 7
    backend.select("cuda", "bf16")
    assert torch.backends.cudnn.benchmark_limit == 7


@pytest.mark.parametrize("before", ["fp32", "tf32"])
@pytest.mark.parametrize("precision", backend.PRECISIONS)
def test_every_switch_of_tf32_says_the_same(one_gpu, precision, before):
    """torch raises where the older ones and the newer ones contradict each other."""
    backend.select("cuda", before)
    backend.select("cuda", precision)
    tf32, cudnn = precision == "tf32", torch.backends.cudnn
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    assert torch.backends.cuda.matmul.allow_tf32 is cudnn.allow_tf32 is tf32
    for newer in (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn):
        assert (newer.fp32_precision == "tf32") is tf32
