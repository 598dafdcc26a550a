"""A device without streams of its own, whose streams log what is asked of them."""

from contextlib import contextmanager

from detcore.device import streams


class Device:
    """A device module whose streams write their waits down, with the stream that each operation was asked for on."""

    def __init__(self):
        self.log, self.made = [], 0
        self.now = self._stream("main")

    def _stream(self, name: str):
        device = self

        class Stream:
            def wait_stream(self, other):
                device.log.append(f"{self} waits for {other}")

            def __repr__(self):
                return name

        return Stream()

    def Stream(self):
        self.made += 1
        return self._stream("second")

    def current_stream(self):
        return self.now

    @contextmanager
    def stream(self, chosen):
        before, self.now = self.now, chosen
        yield
        self.now = before


@contextmanager
def logged_streams(monkeypatch):
    """While it is open, `detcore.device.streams` takes every device for one `Device`, which is given."""
    device = Device()
    streams._side_stream.cache_clear()
    monkeypatch.setattr(streams, "get_device_module", lambda of: device)
    monkeypatch.setattr(
        streams, "_record_use", lambda stream, tensors: device.log.append(f"{stream} uses {len(list(tensors))}")
    )
    yield device
    monkeypatch.undo()
    streams._side_stream.cache_clear()
