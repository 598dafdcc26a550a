"""Two processes are one: the normaliser and the batch statistics are those of the images of both."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("processes.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """What each process wrote, by "<processes>-<rank>"; the two of a pair have one and three images."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = [(0, 1), (0, 2), (1, 2)]
    started = [
        subprocess.Popen([sys.executable, SCRIPT, folder, str(rank), str(size), port], stderr=subprocess.PIPE)
        for rank, size in places
    ]
    for process in started:
        _, told = process.communicate(timeout=300)
        assert process.returncode == 0, told.decode()[-3000:]
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}


@pytest.mark.parametrize("rank", ["2-0", "2-1"])
def test_losses_gradients_and_statistics(found, rank):
    """In float64, where only the order of the sums differs; some gradients are 0 but for rounding."""
    one, both = found["1-0"], found[rank]
    assert one.keys() == both.keys() and any(name.startswith("gradient ") for name in one)
    torch.testing.assert_close(both, one, rtol=1e-6, atol=1e-9)
    assert max(float(value.abs().max()) for name, value in one.items() if name.startswith("gradient ")) > 0.1


def test_the_two_agree(found):
    statistics = [name for name in found["2-0"] if "running" in name]
    assert statistics and all(torch.equal(found["2-0"][name], found["2-1"][name]) for name in statistics)
