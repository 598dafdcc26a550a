"""How the ranks of `tools.preflight` find each other, report to rank 0, and never wait for ever.

Everything but the bandwidth test goes through a TCPStore at MASTER_ADDR:MASTER_PORT, torchrun's own or one that rank 0
opens: a rank that is missing, dead or stuck can then be named, where a collective would only say that it timed out.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from detcore import UserError
from detcore.cli import BAD_INPUT
from detcore.processes.launcher import World, discover

GRACE_S = 15.0  # how much longer the others wait than rank 0, whose message says more
_SIGN_S = 2.0  # how often a rank that makes progress says so
_CLOCK_SAMPLES = 10


class Silent(Exception):
    """A rank that did not answer in time; the text says which, and what it was doing when last heard of."""


class Team:
    """The ranks of this job; made by `join`. `hosts[r]` is the name of rank r's node."""

    def __init__(self, world: World, store: dist.Store, timeout_s: float) -> None:
        self.world, self.store, self.timeout_s = world, store, timeout_s
        self.hosts = [""] * world.size
        self.silent: dict[int, str] = {}  # rank: what it was doing when last heard of
        self.when_stuck: Callable[[str], None] = say
        self._stage, self._ticks, self._posted = "joining", 0, float("-inf")
        self._last = time.monotonic()
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    @property
    def host(self) -> str:
        return self.hosts[self.world.rank]

    @property
    def leaders(self) -> list[int]:
        """The first rank of each node, in rank order."""
        return [self.hosts.index(host) for host in dict.fromkeys(self.hosts)]

    @property
    def is_leader(self) -> bool:
        return self.world.rank in self.leaders

    def begin(self, stage: str) -> None:
        """From here on this rank is doing `stage`; the words are for messages about a rank that is stuck."""
        self._stage, self._posted = stage, float("-inf")
        self.tick()

    def tick(self) -> None:
        """There was progress: postpone the end of everybody's patience with this rank."""
        self._last = time.monotonic()
        if self._last - self._posted > _SIGN_S:
            self._ticks, self._posted = self._ticks + 1, self._last
            self.store.set(f"sign/{self.world.rank}", f"{self._ticks} {self._stage}")

    def send(self, key: str, value: Any) -> None:
        """Leave `value`, anything that JSON knows, for `gather` or `receive`."""
        self.store.set(f"{key}/{self.world.rank}", json.dumps(value))
        self.tick()

    def receive(self, key: str, sender: int) -> Any:
        """What `sender` left under `key`, waiting for it while the sender shows progress. Raises `Silent`."""
        patience = self.timeout_s + (GRACE_S if self.world.rank else 0)
        sign, start = "", time.monotonic()
        since = start
        # Not store.wait, which prints warnings of its own while it waits. Without sleep at first, for the clocks.
        while not self.store.check([f"{key}/{sender}"]):
            latest = self._sign(sender)
            now = self._last = time.monotonic()  # this rank itself is not stuck
            if latest != sign:
                sign, since = latest, now
            if now - since > patience:
                self.silent[sender] = sign.partition(" ")[2]
                raise Silent(f"{self.name(sender)} has not answered for {patience:.0f} s")
            if now - start > 0.05:
                time.sleep(min((now - start) / 10, 0.25))
        return json.loads(self.store.get(f"{key}/{sender}"))

    def gather(self, key: str) -> dict[int, Any]:
        """On rank 0: what each rank left under `key`. Ranks without progress for too long go to `silent`."""
        found: dict[int, Any] = {}
        signs = {rank: ("", time.monotonic()) for rank in range(self.world.size) if rank not in self.silent}
        while signs:
            for rank in list(signs):
                if self.store.check([f"{key}/{rank}"]):
                    found[rank] = json.loads(self.store.get(f"{key}/{rank}"))
                    del signs[rank]
                elif (sign := self._sign(rank)) != signs[rank][0]:
                    signs[rank] = sign, time.monotonic()
                    self.tick()
                elif time.monotonic() - signs[rank][1] > self.timeout_s:
                    self.silent[rank] = sign.partition(" ")[2]
                    del signs[rank]
            self._last = time.monotonic()
            if signs:
                time.sleep(0.02)
        return found

    def name(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}" if self.hosts[rank] else f"rank {rank}"

    def leave(self) -> None:
        """Say goodbye; rank 0, which holds the store, waits a moment until the others have."""
        self.store.set(f"bye/{self.world.rank}", "")
        deadline = time.monotonic() + 5
        others = [f"bye/{r}" for r in range(1, self.world.size) if r not in self.silent] if self.world.rank == 0 else []
        while others and time.monotonic() < deadline and not all(self.store.check([key]) for key in others):
            time.sleep(0.02)

    def clock_offsets(self) -> dict[int, tuple[float, float]]:
        """On rank 0: how far each node's clock is ahead of rank 0's, and the uncertainty of that, in seconds.

        By round trips, as NTP does: rank 0's answer was written between the question and its arrival, which bounds the
        offset by half of the trip to either side, however unequal the two ways are. The shortest of the trips counts.
        Every leader of a node calls this; leaders other than rank 0 get an empty dict. Raises `Silent`.
        """
        found = {0: (0.0, 0.0)}
        for leader in self.leaders[1:]:
            if self.world.rank == 0:
                for i in range(_CLOCK_SAMPLES):
                    self.receive(f"ask/{i}", leader)
                    self.send(f"told/{leader}/{i}", time.time())
                found[leader] = tuple(self.receive("offset", leader))
            elif self.world.rank == leader:
                best = (0.0, float("inf"))
                for i in range(_CLOCK_SAMPLES):
                    asked, start = time.time(), time.monotonic()
                    self.send(f"ask/{i}", None)
                    told = self.receive(f"told/{leader}/{i}", 0)
                    half = (time.monotonic() - start) / 2
                    best = min(best, (asked + half - told, half), key=lambda sample: sample[1])
                self.send("offset", best)
        return found if self.world.rank == 0 else {}

    def _sign(self, rank: int) -> str:
        return self.store.get(f"sign/{rank}").decode() if self.store.check([f"sign/{rank}"]) else ""

    def _watch(self) -> None:
        """Ends this process where its main thread stands still, in a dead file system or a collective, say."""
        while not self._ended.wait(0.2):
            if time.monotonic() - self._last > self.timeout_s + GRACE_S:
                self.when_stuck(
                    f"{self.name(self.world.rank)} stands still for {self.timeout_s + GRACE_S:.0f} s ({self._stage})"
                )
                os._exit(BAD_INPUT)


def join(timeout_s: float, environ: Mapping[str, str] = os.environ) -> Team | None:
    """Meet the other ranks that the launcher started. None where some did not come in time: rank 0 has said which.

    Raises `UserError` for bad variables, and where rank 0 can't be reached.
    """
    world, port = discover(environ)
    address = f"{world.master}:{port}"
    agent = "TORCHELASTIC_RUN_ID" in environ  # torchrun's agent already serves a store there
    wait = timedelta(seconds=timeout_s)
    if world.size == 1:
        store: dist.Store = dist.HashStore()
    else:
        try:
            store = dist.TCPStore(world.master, port, None, world.rank == 0 and not agent, wait, wait_for_workers=False)
        except RuntimeError as error:  # torch's classes for these all are RuntimeErrors
            hint = "is MASTER_PORT free there?" if world.rank == 0 else "was rank 0 started there, is the port open?"
            raise UserError(
                f"rank {world.rank} of {world.size} on {socket.gethostname()} can't meet the others at {address} "
                f"({first_line(error)}). Is MASTER_ADDR rank 0's host, {hint}"
            ) from error
    store = dist.PrefixStore(f"preflight/{environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    team = Team(world, store, timeout_s)
    store.set(f"here/{world.rank}", socket.gethostname())
    if world.rank == 0:
        return _call_the_roll(team, address)
    try:
        hosts = team.receive("roll", 0)
    except Silent as silent:
        raise UserError(f"rank {world.rank} on {socket.gethostname()} waits in vain: {silent}") from silent
    except dist.DistNetworkError as error:
        raise UserError(
            f"rank {world.rank} on {socket.gethostname()}: rank 0 at {address} is gone; its output may say why"
        ) from error
    if hosts is None:
        team.leave()
        return None
    team.hosts = hosts
    return team


def _call_the_roll(team: Team, address: str) -> Team | None:
    size, deadline = team.world.size, time.monotonic() + team.timeout_s
    missing = list(range(size))
    while missing and time.monotonic() < deadline:
        missing = [rank for rank in missing if not team.store.check([f"here/{rank}"])]
        team.tick()
        if missing:
            time.sleep(0.02)
    if missing:
        came = [rank for rank in range(size) if rank not in missing]
        nodes = sorted({team.store.get(f"here/{rank}").decode() for rank in came})
        # Said before the others leave, since a launcher ends this process as soon as one of them has.
        say(
            f"error: {len(missing)} of {size} ranks did not come to {address} within {team.timeout_s:g} s: "
            f"{ranks(missing)}; there are {ranks(came)} on {', '.join(nodes)}. Were all processes started, do their "
            "nodes reach that address (firewall, MASTER_ADDR)?"
        )
        team.silent = dict.fromkeys(missing, "")
        team.send("roll", None)
        team.leave()
        return None
    team.hosts = [team.store.get(f"here/{rank}").decode() for rank in range(size)]
    team.send("roll", team.hosts)
    return team


def ranks(numbers: Iterable[int]) -> str:
    """Ranks in words: "rank 3", "ranks 0-3, 5"."""
    ordered = sorted(numbers)
    runs: list[list[int]] = []
    for number in ordered:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = ", ".join(str(a) if a == b else f"{a}{'-' if b > a + 1 else ', '}{b}" for a, b in runs)
    return f"rank{'s' * (len(ordered) != 1)} {words}"


def first_line(error: Exception) -> str:
    """The first line of what a library says, cut where it becomes long."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def say(text: str) -> None:
    """One write, so that the lines of several processes do not mix."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
