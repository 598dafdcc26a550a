"""The number of threads that training takes, for simulated free and busy processors."""

import pytest
import torch

from detcore.device import threads
from detcore.device.cpu import CpuBackend
from detcore.device.select import select_backend
from detcore.device.threads import RETRY_S, Threads, adaptive_threads


class Machine:
    """A machine with `busy` of its `cores` taken: operations with a thread on one of those take 20 times as long."""

    def __init__(self, cores: int, busy: int = 0):
        self.cores, self.busy, self.used, self.now, self.measured = cores, busy, [], 0.0, []
        self.threads = Threads(cores, self.speed, self.used.append, lambda: self.now)

    def speed(self, count: int) -> float:
        self.measured.append(count)
        return count / (20 if count > self.cores - self.busy else 1)


@pytest.mark.parametrize(
    "cores, busy, expected", [(2, 1, 1), (4, 1, 3), (64, 1, 63), (64, 3, 60), (64, 40, 24), (48, 20, 24)]
)
def test_the_cores_that_are_free_are_used(cores, busy, expected):
    machine = Machine(cores, busy)
    assert machine.threads.adapt() == f"{expected} of {cores} threads, other programs use the processors"
    assert machine.used == [expected]


@pytest.mark.parametrize("cores", [2, 64])
def test_on_a_free_machine_all_are_used_after_two_measurements(cores):
    machine = Machine(cores)
    assert machine.threads.adapt() == "" and machine.used == [cores] and machine.measured == [cores, 1]


def test_a_small_gain_does_not_change_the_order_of_sums():
    machine = Machine(2)
    machine.threads._speed = lambda count: {2: 1.0, 1: 1.2}[count]  # as two threads of one core
    assert machine.threads.adapt() == "" and machine.used == [2]


def test_it_measures_again_when_the_rate_has_halved():
    machine = Machine(2)
    assert [machine.threads.adapt(rate) for rate in (0, 30, 40, 21)] == [""] * 4
    assert len(machine.used) == 1
    machine.busy = 1
    assert machine.threads.adapt(19).startswith("1 of 2") and machine.used == [2, 1]
    assert machine.threads.adapt(20).startswith("1 of 2") and len(machine.used) == 2


def test_a_rate_that_halves_for_another_reason_is_looked_into_once():
    machine = Machine(2)
    notes = [machine.threads.adapt(rate) for rate in (0, 40, 15, 15, 14)]
    assert notes == [""] * 5 and machine.used == [2, 2]
    machine.threads.adapt(7)
    assert len(machine.used) == 3


def test_cores_that_become_free_are_used_again():
    machine = Machine(4, busy=1)
    machine.threads.adapt()
    machine.busy, machine.now = 0, RETRY_S - 1
    assert machine.threads.adapt(30).startswith("3 of 4")
    machine.now = RETRY_S
    assert machine.threads.adapt(30) == "" and machine.used == [3, 4]
    machine.now = 5 * RETRY_S
    assert machine.threads.adapt(30) == "" and len(machine.used) == 2, "with all in use there is nothing to gain"


@pytest.mark.parametrize("given", [{"OMP_NUM_THREADS": "2"}, {"MKL_NUM_THREADS": "2"}])
def test_a_number_that_is_given_is_obeyed(monkeypatch, given):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert adaptive_threads(given, 1) is None
    assert adaptive_threads({}, 1).most == 2


def test_several_processes_or_one_core_leave_nothing_to_choose(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert adaptive_threads({}, 2) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert adaptive_threads({}, 1) is None


def test_the_backend_of_the_cpu_adapts_and_says_so(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(threads, "measured_speed", Machine(3, busy=1).speed)
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    assert select_backend("cpu", "fp32").adapt_threads().startswith("2 of 3") and used == [2]
    assert CpuBackend(torch.device("cpu"), "fp32").adapt_threads(5.0) == "" and used == [2]


def test_what_is_measured_is_work_by_that_many_threads_and_draws_no_random_number():
    before, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        assert threads.measured_speed(2) > 0 and torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(before)
