"""What happens when a process of the job dies or hangs: the others end, and say which and where."""

import faulthandler
import json
import os
import re
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from detcore import UserError
from detcore.cli import WATCHDOG
from detcore.processes.distributed import all_reduce_max
from detcore.processes.launcher import World

_FINAL_STATES = ("done", "failed", "ending")
_KNOWN_AFTER = 50  # times after which it is known how long a phase takes


class _Beat(NamedTuple):
    """Where the training thread is; (round, step, place) is its order in time, the same on every rank.

    `round` counts how often the step went back (an evaluation counts its own), `place` the beats within the step, and
    `count` all beats. `timeout_s`: within which the next beat must come.
    """

    round: int = 0
    step: int = 0
    place: int = 0
    phase: str = "start"
    count: int = 0
    timeout_s: float = float("inf")


def _record(rank: int, host: str, pid: int, state: str, reason: str, alive: int, beat: _Beat) -> dict:
    """What a rank publishes: `alive` counts its exchanges with the store; `reason` explains the state."""
    about = {"rank": rank, "host": host, "pid": pid, "state": state, "reason": reason, "alive": alive}
    return about | beat._asdict()


class _Peer:
    """One rank as this process knows it: its last record, and for how many seconds each of its two counters (`alive`
    and `count`) has not changed."""

    def __init__(self, rank: int):
        self.record = _record(rank, "", 0, "running", "", -1, _Beat(count=-1))
        self.silent = self.still = 0.0

    def update(self, record: dict, elapsed: float) -> None:
        self.silent = 0.0 if record["alive"] != self.record["alive"] else self.silent + elapsed
        self.still = 0.0 if record["count"] != self.record["count"] else self.still + elapsed
        self.record = record

    @property
    def time(self) -> tuple[int, int, int]:
        return self.record["round"], self.record["step"], self.record["place"]

    def __str__(self) -> str:
        r = self.record
        return f"rank {r['rank']} (host {r['host']}, pid {r['pid']}, step {r['step']}, phase {r['phase']})"


class Watchdog:
    """Ends this process, naming the culprit, when a rank dies or hangs: `with Watchdog(...) as dog`.

    Every rank enters it (a collective call), and its training thread calls `beat` at each change of phase or step.
    About once a second a thread publishes this rank's counters in a store on rank 0's host and reads the others'. A
    second thread, which no network call can block, ends the process with exit code `cli.WATCHDOG` when

    * a rank gave no sign of life, or the store did not answer, for `dead_timeout_s` (killed, stopped, host gone), or a
      rank left with an exception and this one has not ended by then;
    * the training thread of a rank that has not finished did not beat for `hang_timeout_s` (0: no limit), or, in a
      phase that came fifty times already, for 20 times as long as it ever took and `quick_hang_s`. Where several stand
      still, those at the earliest step and phase are named: the others wait for them.

    Python's stacks of this process go to `folder`/stacks_rank<k>.txt first. Time in which this process was itself
    stopped does not count. A call into C code that holds the interpreter's lock for `dead_timeout_s` looks like death.
    A rank that leaves the `with` normally is not missed; rank 0, which holds the store, waits there for the others. An
    exception of a collective leaves only after `dead_timeout_s`, so that the rank that caused it can be named.
    `device`: where the process group wants its tensors. `before_exit` is called before this process ends itself.
    """

    def __init__(
        self, world: World, hang_timeout_s, dead_timeout_s=30.0, folder=Path("."), device="cpu",
        before_exit=lambda: None, quick_hang_s=40.0,
    ):  # fmt: skip
        self._world, self._device, self._before_exit = world, device, before_exit
        self._hang_s, self._dead_s, self._quick_s = hang_timeout_s or float("inf"), dead_timeout_s, quick_hang_s
        self._folder = Path(folder)
        self._interval = min(1.0, self._hang_s / 5, self._dead_s / 5)
        self._beat, self._state, self._reason, self._exchanges = _Beat(timeout_s=self._hang_s), "running", "", 0
        self._since, self._spans = time.monotonic(), {}  # of the last beat; phase: (times, longest seconds)
        self._host = socket.gethostname()
        self._peers = [_Peer(rank) for rank in range(world.size)]
        self._latest: list[dict] = []
        self._store, self._store_error = None, "no answer"
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._monitor, name="watchdog monitor", daemon=True)]

    def beat(self, phase: str, step: int) -> None:
        """Say where the training thread is. Costs a few microseconds."""
        last, now = self._beat, time.monotonic()
        times, longest = self._spans.get(last.phase, (0, 0.0))
        longest = max(longest, now - self._since) if times > 1 else 0.0  # the first ones warm up
        self._spans[last.phase], self._since = (times + 1, longest), now
        times, longest = self._spans.get(phase, (0, 0.0))
        timeout_s = min(self._hang_s, max(self._quick_s, 20 * longest)) if times >= _KNOWN_AFTER else self._hang_s
        place = last.place + 1 if step == last.step else 0
        self._beat = _Beat(last.round + (step < last.step), step, place, phase, last.count + 1, timeout_s)

    def __enter__(self) -> "Watchdog":
        if self._world.size > 1:
            self._open_store()
            self._threads.append(threading.Thread(target=self._exchange, name="watchdog exchange", daemon=True))
        self._arm_last_resort()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._world.size > 1:
            if error is not None and _is_from_a_collective(error) and self._state == "running":
                self._print(
                    f"a collective failed ({_first_line(error)}); waiting up to {self._dead_s:g} s for the cause"
                )
                self._state = "lost its peers"
                self._sleep_until(lambda: False, self._dead_s + 5 * self._interval)
            self._state = "done" if error is None else "failed"
            self._reason = "" if error is None else _first_line(error)
            self._publish_now()
            if self._world.rank == 0 and error is None:
                self._sleep_until(lambda: all(r["state"] in _FINAL_STATES for r in self._latest), float("inf"))
        self._stop.set()
        self._threads[0].join()  # it ends at once, or is about to end this process
        faulthandler.cancel_dump_traceback_later()

    def _open_store(self) -> None:
        rank, timeout = self._world.rank, timedelta(seconds=max(60.0, self._dead_s))
        port = 0
        if rank == 0:
            self._store = dist.TCPStore(self._world.master, 0, None, True, timeout, wait_for_workers=False)
            port = self._store.port
        (port,) = all_reduce_max([port], self._device)
        try:
            if rank != 0:
                self._store = dist.TCPStore(self._world.master, port, None, False, timeout, wait_for_workers=False)
            self._store.set(str(rank), json.dumps(self._local_record()))
        except RuntimeError as error:
            where = f"{self._world.master}:{port}"
            raise UserError(
                f"rank {rank} cannot reach the watchdog's store at {where}: {_first_line(error)}"
            ) from error
        all_reduce_max([0], self._device)  # from here on every rank's record can be read
        for peer, record in zip(self._peers, self._read_all()):
            peer.record = record

    def _local_record(self) -> dict:
        return _record(
            self._world.rank, self._host, os.getpid(), self._state, self._reason, self._exchanges, self._beat
        )

    def _read_all(self) -> list[dict]:
        return [json.loads(text) for text in self._store.multi_get([str(rank) for rank in range(self._world.size)])]

    def _exchange(self) -> None:
        """Publish and read; may be blocked for ever by a store that stopped answering, which `_monitor` notices."""
        try:
            while not self._stop.wait(self._interval):
                record = self._local_record()
                self._store.set(str(self._world.rank), json.dumps(record))
                if record["state"] in _FINAL_STATES and self._world.rank != 0:
                    return  # rank 0 may be gone, and the store with it, as soon as it has read this
                self._latest = self._read_all()
                self._exchanges += 1
        except RuntimeError as error:  # a broken connection stays broken; trying again only fills the log
            self._store_error = _first_line(error)

    def _monitor(self) -> None:
        before, unheard, heard = time.monotonic(), 0.0, 0
        local = self._peers[self._world.rank]
        while not self._stop.wait(self._interval):
            now = time.monotonic()
            elapsed, before = min(now - before, 2 * self._interval), now
            local.update(self._local_record(), elapsed)
            local.silent = 0.0
            unheard += elapsed
            if self._exchanges != heard:
                for peer, record in zip(self._peers, self._latest):
                    if peer is not local:
                        peer.update(record, unheard)
                unheard, heard = 0.0, self._exchanges
            self._arm_last_resort()
            verdict = self._verdict(unheard)
            if verdict:
                self._end(verdict)

    def _arm_last_resort(self) -> None:
        """End the process without Python's help if C code holds its lock for so long that the others have left."""
        if self._world.size > 1:
            faulthandler.dump_traceback_later(2 * self._dead_s + 5, exit=True, file=2)

    def _verdict(self, unheard: float) -> str | None:
        others = [peer for peer in self._peers if peer.record["rank"] != self._world.rank]
        for peer in others:
            record = peer.record
            if record["state"] == "ending":
                return record["reason"]
            if record["state"] == "failed" and (peer.silent >= self._dead_s or self._state == "lost its peers"):
                return f"{peer} ended with an error: {record['reason']}. Its own output says more"
            if record["state"] != "done" and peer.silent >= self._dead_s:
                return (
                    f"{peer} gave no sign of life for {self._dead_s:g} s: it was killed (out of memory? see dmesg on "
                    f"{record['host']}), stopped, or its host is gone"
                )
        if self._world.size > 1 and unheard >= self._dead_s:
            first = self._peers[0]
            first.silent = unheard
            cause = "it was killed (out of memory?) or stopped, or its host or the network is gone"
            if first.record["state"] == "failed":
                cause = f"it ended with an error: {first.record['reason']}"
            silence = f"out of reach for {self._dead_s:g} s ({self._store_error})"
            return f"{first} holds the watchdog's store, {silence}: {cause}"
        return self._hang_verdict()

    def _hang_verdict(self) -> str | None:
        running = [peer for peer in self._peers if peer.record["state"] == "running"]
        over = [peer for peer in running if peer.still >= peer.record["timeout_s"]]
        if not over:
            return None
        limit = max(peer.record["timeout_s"] for peer in over)
        standing = [peer for peer in running if peer.still >= limit / 2]
        earliest = min(peer.time for peer in standing)
        behind = [peer for peer in standing if peer.time == earliest]
        names = "; ".join(map(str, behind[:8])) + (" and more" if len(behind) > 8 else "")
        several = "no single rank is behind the others; " if len(behind) == len(standing) > 1 else ""
        return (
            f"{names} stood still for {limit:g} s ({several}the stacks in {self._folder}/stacks_rank"
            f"{behind[0].record['rank']}.txt show where). A slow disk, a stuck loader or a network fault are usual"
        )

    def _end(self, verdict: str) -> None:
        """Say it, leave the stacks, let the others read the verdict, and end the process."""
        path = self._folder / f"stacks_rank{self._world.rank}.txt"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(path, "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            dumped = f"stacks of this rank: {path}"
        except OSError as error:
            dumped = f"the stacks could not be written: {error}"
        living = [s.record["rank"] for s in self._peers if s.silent < self._dead_s / 2 and s.record["state"] != "done"]
        table = self._table() if self._world.rank == min([*living, self._world.rank]) else ""
        self._print(f"{verdict}.\n{table}  {dumped}; exit code {WATCHDOG}")
        self._state, self._reason = "ending", verdict
        if self._world.size > 1:
            self._publish_now()
        try:
            self._before_exit()
        finally:
            os._exit(WATCHDOG)

    def _table(self) -> str:
        lines = ["  rank  host              pid       step      phase         still for  state\n"]
        for peer in self._peers:
            r = peer.record
            lines.append(
                f"  {r['rank']:<5} {r['host']:<17} {r['pid']:<9} {r['step']:<9} {r['phase']:<13} "
                f"{peer.still:>6.0f} s  {'no sign of life' if peer.silent >= self._dead_s / 2 else r['state']}\n"
            )
        return "".join(lines)

    def _print(self, text: str) -> None:
        """Straight to the descriptor: the training thread may hang while it holds the lock of sys.stderr."""
        os.write(2, f"watchdog on rank {self._world.rank}: {text}\n".encode())

    def _publish_now(self) -> None:
        """Wait until the present state is in the store; on rank 0 for so long that every rank has read it."""
        enough = min(self._dead_s, 10 * self._interval)
        if self._world.rank != 0:
            self._threads[-1].join(enough)
        else:
            target = self._exchanges + 4
            self._sleep_until(lambda: self._exchanges >= target, enough)

    def _sleep_until(self, condition, seconds: float) -> None:
        while not condition() and seconds > 0:
            time.sleep(self._interval / 4)
            seconds -= self._interval / 4


def _is_from_a_collective(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    words = r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out waiting|socket timeout"
    return isinstance(error, RuntimeError) and re.search(words, str(error), re.IGNORECASE) is not None


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__
