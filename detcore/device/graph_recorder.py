"""How a GPU records work: CUDA graphs."""

import gc
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from detcore import UserError


class GraphRecorder:
    """`graphs.Recorder` by CUDA graphs.

    One stream for warm-up and capture, as the gradients' nodes remember theirs, and one memory pool: what is captured
    later reuses the temporary memory of what was captured before. That is sound because replays follow one another on
    one stream and their outputs are cloned before the next.
    """

    def __init__(self, device: torch.device, *, steps: bool):
        if steps:
            # PyTorch's documentation for NCCL in graphs; `detcore.processes.watchdog` sees a rank that hangs.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        # Said in the warm-up of an optimizer that can be captured.
        warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []

    @contextmanager
    def aside(self) -> Iterator[None]:
        main = torch.cuda.current_stream()
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            yield
        main.wait_stream(self._stream)

    def record(self, work: Callable) -> Callable:
        gc.collect()  # torch no longer does: what only cycles hold would keep its memory beside the recording's
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads (NCCL's, the loader's that pins memory) may go on meanwhile: thread_local.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0][:300]
            raise UserError(f"the step can't be recorded ({reason}); --graphs off runs it as it is") from error
        self._graphs.append(graph)

        def replay():
            graph.replay()
            return outputs

        return replay

    def close(self) -> None:
        while self._graphs:
            self._graphs.pop().reset()
