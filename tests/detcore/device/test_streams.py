"""Work on a second stream: the order of fork, work and join, by streams that only log."""

import pytest
import torch

from detcore.device.streams import side_by_side
from tests.detcore.device.streams import logged_streams


@pytest.fixture
def device(monkeypatch):
    with logged_streams(monkeypatch) as device:
        yield device


def test_the_second_stream_waits_and_is_waited_for(device):
    def work(name, *made):
        device.log.append(f"{name} on {device.now}")
        return made

    x = torch.ones(2)
    for _ in range(2):
        device.log.clear()
        result = side_by_side(lambda: work("large", x), lambda: work("small", x, [x, x]), [x, x])
        assert result == ((x,), (x, [x, x]))
        assert device.log == [
            "second waits for main",
            "second uses 2",
            "large on main",
            "small on second",
            "main waits for second",
            "main uses 3",
        ]
    assert device.made == 1, "warm-up and recording use the same stream"


def test_on_the_cpu_one_follows_the_other():
    x = torch.arange(3.0, requires_grad=True)
    order = []
    first, second = side_by_side(lambda: order.append("large") or x * 2, lambda: order.append("small") or [x * 3], [x])
    assert order == ["large", "small"] and torch.equal(first, x * 2) and torch.equal(second[0], x * 3)
    assert torch.equal(torch.autograd.grad((first + second[0]).sum(), x)[0], torch.full((3,), 5.0))
