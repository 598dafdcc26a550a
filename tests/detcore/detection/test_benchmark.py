"""What `--mode benchmark` counts."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from detcore.detection import benchmark
from detcore.detection import detector as detection
from detcore.processes.launcher import World


@pytest.mark.parametrize(
    ("images", "batch", "processes", "real"), [(70, 32, 1, 32), (64, 32, 2, 64), (100, 32, 2, 64), (5, 32, 1, 5)]
)
def test_inference_counts_no_padding(monkeypatch, images, batch, processes, real):
    index, config = range(images), SimpleNamespace()
    world = World(0, processes, 0, processes)
    monkeypatch.setattr(detection, "open_val", lambda detector, config: index)
    monkeypatch.setattr(detection, "eval_batch_size", lambda *given: batch)

    def stream(detector, config, index, world, device, size):
        """Rank 0's batches, as `detcore.data.plan.EvalPlan` has them; -1 is padding."""
        for first in range(0, len(index), size * world.size):
            yield [i if i < len(index) else -1 for i in range(first, first + size)]

    monkeypatch.setattr(detection, "eval_stream", stream)
    task = SimpleNamespace(model=torch.nn.Identity())
    context = SimpleNamespace(world=world, backend=None)
    batches, at_once = benchmark._stream("inference", config, None, task, context)
    assert at_once == real
    for found in itertools.islice(batches, 7):
        assert sum(i >= 0 for i in found) * processes == real


def test_weights_are_named():
    given = {"checkpoint": None, "resume": False, "synthetic": False, "pretrained": True}

    def words(**more) -> str:
        return benchmark.weights(SimpleNamespace(**given | more))

    assert words(pretrained=False) == words(synthetic=True) == "random"
    assert words() == "random but for the backbone"
    assert words(checkpoint=Path("a.pt"), pretrained=False) == "a.pt"
