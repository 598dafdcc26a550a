"""A recorder for the CPU that behaves as a recorded graph: what it replays are the operations on the very same tensors.

No line of Python runs at a replay, so a number that was computed on the host, or a choice that it made, stays what it
was; tensors keep their places, and outputs are overwritten by the next replay.
"""

from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FORBIDDEN = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.nonzero", "aten.lift_fresh")
"""Operations that wait for the device, give shapes that depend on values, or come from values of the host."""


class Tape(TorchDispatchMode):
    """Writes down every operation of its body."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert not str(func).startswith(FORBIDDEN), f"{func} can't be recorded"
        outputs = func(*args, **kwargs)
        given = {_place(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = [t for t in tree_leaves(outputs) if isinstance(t, torch.Tensor)]
        mutates = func._schema.is_mutable
        if mutates or not made or any(_place(t) not in given for t in made):  # else a view: it needs no work
            fresh = [] if mutates else [t.detach() for t in made]
            self.steps.append((func, args, kwargs, fresh))
        return outputs


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class TapeRecorder:
    """`graphs.Recorder` by tapes. replays: how often any of them was run."""

    def __init__(self):
        self.recordings, self.replays, self.closed = 0, 0, False

    def side_stream(self):
        return nullcontext()

    def record(self, work):
        with Tape() as tape:
            outputs = work()
        self.recordings += 1

        def replay():
            self.replays += 1
            with torch.inference_mode():
                for func, args, kwargs, fresh in tape.steps:
                    again = func(*args, **kwargs)
                    if fresh:
                        for old, new in zip(fresh, [t for t in tree_leaves(again) if isinstance(t, torch.Tensor)]):
                            old.copy_(new)
            return outputs

        return replay

    def close(self):
        self.closed = True
