"""One batch on its way to the device while the one before it is used."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from detcore.data.batch import Batch


def one_ahead(
    batches: Iterator[Batch],
    send: Callable[[Iterator[Batch]], Any],
    receive: Callable[[Any], Batch],
    *,
    in_thread: bool = False,
) -> Iterator[Batch]:
    """The batches of a stream, each sent one step before it is received.

    send(batches): takes the next batch of the stream and begins its copy; what it returns goes to receive, which gives
    the batch to use. Nothing is taken before the first batch is asked for; then always one more than was asked for. An
    error of the stream, or its end, is kept until the batch in its place is asked for.

    in_thread: send runs in a thread of this stream, so that a batch that is there is handed out while the next one is
    waited for; else within `next`, before the batch is handed out. Closing closes the stream, after the batch that is
    under way, and ends the thread.
    """
    pool = ThreadPoolExecutor(1, "ahead") if in_thread else None

    def take() -> Future:
        return pool.submit(send, batches) if pool else _done(send, batches)

    try:
        sent = take()
        while True:
            try:
                batch = sent.result()
            except StopIteration:
                return
            sent = take()
            yield receive(batch)
    finally:
        if pool:
            pool.shutdown()
        if hasattr(batches, "close"):
            batches.close()


def _done(function: Callable, *arguments: Any) -> Future:
    """What a pool's submit returns, of a call in this thread."""
    future: Future = Future()
    try:
        future.set_result(function(*arguments))
    except Exception as error:  # StopIteration too
        future.set_exception(error)
    return future
