"""Batches one step ahead: when they are fetched, where errors and the end come, and which stream waits for which."""

import contextlib
import threading
import time

import pytest
import torch

from detcore import UserError
from detcore.data.ahead import one_ahead
from detcore.data.batch import Batch, whole_images
from detcore.data.synthetic import synthetic_batches
from detcore.device.base import MAX_IN_FLIGHT
from detcore.device.cpu import CpuBackend
from detcore.device.cuda import CudaBackend
from detcore.device.select import select_backend

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


def batch(value: int) -> Batch:
    """Everything holds `value`; two boxes of 40 rows are real."""
    labels = torch.full((2, 40), -1)
    labels[:, :2] = value
    return whole_images(
        images=torch.full((2, 8, 8, 3), value, dtype=torch.uint8).permute(0, 3, 1, 2),
        boxes=torch.full((2, 40, 4), float(value)),
        labels=labels,
        image_id=torch.full((2,), value),
        size=torch.full((2, 2), value),
    )


class Source:
    """A stream of numbers that notes what is asked of it."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.count, self.error, self.taken, self.closed = count, error, 0, False

    def __iter__(self):
        return self

    def __next__(self):
        if self.taken == self.count:
            raise self.error or StopIteration
        self.taken += 1
        return self.taken

    def close(self):
        self.closed = True


def soon(condition) -> bool:
    """Whether it becomes true within a few seconds."""
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()


by_thread = pytest.mark.parametrize("in_thread", [False, True])


def numbers(source, in_thread: bool):
    return one_ahead(source, next, lambda sent: sent, in_thread=in_thread)


@by_thread
def test_nothing_is_fetched_before_it_is_asked_for_and_then_one_more(in_thread):
    source = Source(5)
    stream = numbers(source, in_thread)
    assert source.taken == 0
    for number, taken in [(1, 2), (2, 3), (3, 4), (4, 5), (5, 5)]:
        assert next(stream) == number and soon(lambda taken=taken: source.taken == taken)
        time.sleep(0.02)
        assert source.taken == taken, "never two ahead"
    assert next(stream, None) is None and source.closed


@by_thread
def test_an_error_comes_at_its_own_place(in_thread):
    source = Source(2, ValueError("third"))
    stream = numbers(source, in_thread)
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(ValueError, match="third"):
        next(stream)
    assert source.closed and next(stream, None) is None


@by_thread
@pytest.mark.parametrize("count", [0, 1, 2])
def test_short_streams(count, in_thread):
    assert list(numbers(iter(range(count)), in_thread)) == list(range(count))


@by_thread
def test_closing_closes_the_source(in_thread):
    source, before = Source(9), threading.active_count()
    stream = numbers(source, in_thread)
    next(stream)
    assert threading.active_count() == before + in_thread
    stream.close()
    assert source.closed and threading.active_count() == before


def test_a_batch_that_is_there_does_not_wait_for_the_next():
    late = threading.Event()

    def source():
        yield 1
        assert late.wait(20)
        yield 2

    stream = numbers(source(), True)
    assert next(stream) == 1 and not late.is_set()
    late.set()
    assert list(stream) == [2]


def test_closing_waits_for_the_batch_under_way():
    begun, late, ends = threading.Event(), threading.Event(), []

    def source():
        try:
            yield 1
            begun.set()
            assert late.wait(20)
            yield 2
        finally:
            ends.append(threading.current_thread() is threading.main_thread())

    stream = numbers(source(), True)
    assert next(stream) == 1 and begun.wait(20)
    threading.Timer(0.05, late.set).start()
    stream.close()
    assert ends == [True]


def test_the_cpu_gets_the_stream_itself():
    source = Source(3)
    assert select_backend("cpu", "fp32").prefetch(source) is source


@pytest.fixture
def told(monkeypatch):
    """Stands in for a GPU's streams on the CPU; what is asked of them, in order."""
    told: list = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def record_event(self):
            told.append(f"{self.name} records")
            return object()

        def wait_event(self, event):
            told.append(f"{self.name} waits")

    class Event:
        def __init__(self, blocking):
            self.number = -1

        def record(self, stream):
            self.number = sum("asked" in words for words in told)
            told.append(f"{stream.name} asked {self.number}")

        def synchronize(self):
            told.append(f"host waits for {self.number}")

    @contextlib.contextmanager
    def entered(stream):
        told.append(f"in {stream.name}")
        yield
        told.append(f"out of {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: told.append("own device"))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: told.append(f"used on {stream.name}"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: told.append("pinned") or tensor)
    return told


def test_fetching_and_copying_on_the_side_waiting_and_use_on_the_main_stream(told):
    threads = []

    def source():
        for value in range(2):
            threads.append(threading.current_thread())
            told.append(f"fetch {value}")
            yield batch(value)

    stream = CudaBackend(torch.device("cpu"), "fp32").prefetch(source())
    assert told == []
    aside = ("own device", "in side", "fetch", "pinned", "side records", "out of side")
    of = lambda side: [words for words in told if words.startswith(aside) == side]  # noqa: E731
    pinned, used = (words * len(Batch._fields) for words in (["pinned"], ["used on main"]))
    send = lambda n: ["own device", "in side", f"fetch {n}", *pinned, "side records", "out of side"]  # noqa: E731
    receive = lambda n: [f"main asked {n}", "main waits", *used]  # noqa: E731
    first = next(stream)
    assert soon(lambda: of(True) == [*send(0), *send(1)]) and of(False) == receive(0)
    assert first.boxes.shape == (2, 40, 4) and torch.equal(first.images, batch(0).images)
    told.clear()
    assert next(stream).image_id.tolist() == [1, 1]
    assert soon(lambda: of(True) == ["own device", "in side"])  # the source has ended
    assert of(False) == receive(0) and threading.main_thread() not in threads
    assert next(stream, None) is None


def test_the_host_is_no_more_than_three_batches_ahead(told):
    waits = [(n, f"host waits for {n - MAX_IN_FLIGHT}") for n in range(MAX_IN_FLIGHT, 6)]
    stream = CudaBackend(torch.device("cpu"), "fp32").prefetch(iter([batch(n) for n in range(6)]))
    for _ in stream:
        pass
    kept = [words for words in told if words.startswith(("host", "main asked"))]
    expected = []
    for n in range(6):
        expected += [words for m, words in waits if m == n] + [f"main asked {n}"]
    assert kept == expected


@pytest.mark.gpu
@needs_gpu
def test_batches_on_a_gpu_are_those_of_the_source_though_it_is_busy():
    """Each is read only after a long computation, and dropped before that has run, while the next ones are copied."""
    device = select_backend("cuda", "fp32")
    values = [torch.randint(0, 256, (4, 256, 256, 3), dtype=torch.uint8) for _ in range(12)]
    one = next(synthetic_batches(5, (256, 256), 4, 40, seed=0))
    stream = device.prefetch(one._replace(images=pixels.pin_memory().permute(0, 3, 1, 2)) for pixels in values)
    load, sums, copies = torch.randn(4096, 4096, device="cuda"), [], []
    for got in stream:
        assert got.images.is_contiguous(memory_format=torch.channels_last) and got.labels.is_cuda
        for _ in range(10):
            load = torch.tanh(load @ load)
        sums.append(got.images.double().sum() + 0 * load.sum())
        copies.append(got.images.clone())
        del got
    assert [int(s) for s in sums] == [int(v.double().sum()) for v in values]
    assert all(torch.equal(c.cpu().permute(0, 2, 3, 1), v) for c, v in zip(copies, values, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_gets_the_same_values_as_without_ahead():
    device = select_backend("cuda", "fp32")
    plain = [device.to_device(batch(n)) for n in range(5)]
    for a, b in zip(plain, device.prefetch(batch(n) for n in range(5)), strict=True):
        assert all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(a, b, strict=True))


class TestLargestBatch:
    @pytest.fixture
    def given_back(self, monkeypatch) -> list[bool]:
        """Stands in for a GPU that can be waited for; whether its memory was given back."""
        given_back: list[bool] = []
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(True))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        return given_back

    def tried(self, device: str, start: int, limit: int, most: int, error=None) -> tuple[int, list[int]]:
        sizes: list[int] = []

        def try_batch(size: int) -> None:
            sizes.append(size)
            if size > most:
                raise error or torch.OutOfMemoryError("CUDA out of memory")

        kind = CudaBackend if device == "cuda" else CpuBackend
        return kind(torch.device(device), "fp32").largest_batch(try_batch, start, limit), sizes

    def test_doubles_until_memory_ends(self, given_back, capsys):
        assert self.tried("cuda", 2, 128, most=40) == (32, [4, 8, 16, 32, 64])
        assert capsys.readouterr().err == (
            "evaluation batches of 64 do not fit, so that 32 are taken: CUDA out of memory\n"
        )

    @pytest.mark.parametrize(("start", "limit", "found"), [(2, 20, 16), (32, 128, 128), (24, 128, 96), (8, 3, 8)])
    def test_stops_at_the_limit(self, given_back, capsys, start, limit, found):
        assert self.tried("cuda", start, limit, most=10**9)[0] == found
        assert capsys.readouterr().err == ""

    def test_nothing_larger_fits(self, given_back):
        assert self.tried("cuda", 16, 128, most=16) == (16, [32])

    def test_the_cpu_tries_nothing(self):
        assert self.tried("cpu", 2, 128, most=10**9) == (2, [])

    @pytest.mark.parametrize(
        "words",
        [
            "GET was unable to find an engine to execute this computation",
            "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
            "Expected canUse32BitIndexMath(input) && canUse32BitIndexMath(output) to be true, but got false.",
        ],
    )
    def test_any_failure_of_a_size_is_one_that_does_not_fit(self, given_back, capsys, words):
        assert self.tried("cuda", 32, 128, most=64, error=RuntimeError(f"{words}\nfrom somewhere")) == (64, [64, 128])
        assert capsys.readouterr().err == f"evaluation batches of 128 do not fit, so that 64 are taken: {words}\n"

    def test_mistakes_of_the_program_are_not_hidden(self, given_back):
        with pytest.raises(TypeError, match="a real mistake"):
            self.tried("cuda", 1, 8, most=1, error=TypeError("a real mistake"))

    def test_a_fault_that_shows_only_when_waited_for_belongs_to_its_size(self, given_back, monkeypatch, capsys):
        """And one that stays has cost the process its GPU."""
        waits = iter([None, RuntimeError("CUDA error: out of range"), None])

        def synchronize(device) -> None:
            if error := next(waits, None):
                raise error

        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        assert self.tried("cuda", 1, 8, most=8) == (2, [2, 4])
        assert (
            "evaluation batches of 4 do not fit, so that 2 are taken: CUDA error: out of range"
            in capsys.readouterr().err
        )
        said = r"batches of 4 failed \(no kernel\), .* \(CUDA error: gone\).*--eval-batch-size 2"
        waits = iter([None, RuntimeError("CUDA error: gone")])
        with pytest.raises(UserError, match=said):
            self.tried("cuda", 1, 8, most=2, error=RuntimeError("no kernel"))

    def test_memory_of_the_failed_trial_is_given_back_after_it(self, given_back):
        self.tried("cuda", 2, 8, most=100)
        assert not given_back
        self.tried("cuda", 2, 8, most=4)
        assert given_back

    @pytest.mark.gpu
    @needs_gpu
    def test_on_a_gpu(self):
        """Within a tenth of its memory, since other processes may use it as well."""
        device = select_backend("cuda", "fp32")
        unit = torch.cuda.mem_get_info()[1] // 200
        torch.cuda.set_per_process_memory_fraction(0.1)
        try:
            found = device.largest_batch(lambda n: torch.empty(n, unit, dtype=torch.uint8, device="cuda"), 1, 64)
            assert 4 <= found <= 16
            torch.empty(unit * found, dtype=torch.uint8, device="cuda")
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.empty_cache()
