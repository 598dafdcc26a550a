"""One batch on its way to the device while the one before it is used."""

from collections.abc import Callable, Iterator
from typing import Any

from detcore.data import Batch


def one_ahead(
    batches: Iterator[Batch], send: Callable[[Iterator[Batch]], Any], receive: Callable[[Any], Batch]
) -> Iterator[Batch]:
    """The batches of a stream, each sent one step before it is received.

    send(batches): takes the next batch of the stream and begins its copy; what it returns goes to receive, which gives
    the batch to use. Nothing is taken before the first batch is asked for; then always one more than was asked for. An
    error of the stream, or its end, is kept until the batch in its place is asked for. Closing closes the stream.
    """

    def take() -> tuple[Any, Exception | None]:
        try:
            return send(batches), None
        except Exception as error:  # StopIteration too
            return None, error

    try:
        sent, error = take()
        while error is None:
            later = take()
            yield receive(sent)
            sent, error = later
        if not isinstance(error, StopIteration):
            raise error
    finally:
        if hasattr(batches, "close"):
            batches.close()
