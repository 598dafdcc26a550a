"""What all ranks of `tools.preflight` found, brought together on rank 0: problems, warnings, the table."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from detcore import UserError
from detcore.cli import BAD_INPUT, OK
from tools import system_description
from tools.preflight.team import Team, ranks, say

_NODES_SHOWN = 8


class Summary:
    """Collects what the ranks send; words that several of them say stand there once, with all of their names."""

    def __init__(self, team: Team) -> None:
        self._team = team
        self._facts: dict[int, dict[str, Any]] = {}
        self.problems: dict[str, set[int]] = {}  # words: the ranks that say so
        self.warnings: dict[str, set[int]] = {}
        self._clocks: dict[int, tuple[float, float]] = {}  # first rank of a node: seconds ahead of rank 0, uncertainty
        self._reduce: dict[str, Any] | None = None

    @property
    def complete(self) -> bool:
        return len(self._facts) == self._team.world.size

    @property
    def all_have_gpus(self) -> bool:
        return all("gpu" in facts for facts in self._facts.values())

    def take_reports(self, reports: dict[int, dict[str, Any]], ranks_per_node: int | None) -> None:
        """What each rank saw for itself."""
        for rank, report in sorted(reports.items()):
            self._facts[rank] = report["facts"]
            for words in report["problems"]:
                self.problems.setdefault(words, set()).add(rank)
            for words in report["warnings"]:
                self.warnings.setdefault(words, set()).add(rank)
        for host, here in self._nodes().items():
            if ranks_per_node not in (None, len(here)):
                self.problems[
                    f"{len(here)} rank{'s' * (len(here) != 1)} on {host}, --ranks-per-node wants {ranks_per_node}: "
                    "start as many on each node (srun --ntasks-per-node, torchrun --nproc-per-node)"
                ] = set(here)
            self._check_gpus(host, here)
        self._check_sameness()

    def _check_gpus(self, host: str, here: list[int]) -> None:
        gpus = {rank: self._facts[rank]["gpu"] for rank in here if "gpu" in self._facts.get(rank, {})}
        for name in dict.fromkeys(gpu["id"] for gpu in gpus.values() if gpu["id"]):
            users = [rank for rank, gpu in gpus.items() if gpu["id"] == name]
            if len(users) > 1:
                self.problems[
                    f"{ranks(users)} on {host} got the same GPU ({name}): give each rank one of its own "
                    "(srun --gpus-per-task=1, or all GPUs visible to all ranks of the node)"
                ] = set(users)
        visible = max((gpu["visible"] for gpu in gpus.values()), default=0)
        if visible > len(here):
            words = f"{visible} GPUs for {len(here)} rank{'s' * (len(here) != 1)}: the rest stays idle"
            self.warnings.setdefault(words, set()).update(here)

    def _check_sameness(self) -> None:
        """Versions and GPU models that differ from rank to rank are worth a look, if no reason to stop."""
        said: dict[str, dict[str, set[int]]] = {}
        for rank, facts in self._facts.items():
            for what, value in {**facts["versions"], "GPU": facts.get("gpu", {}).get("name", "none")}.items():
                said.setdefault(what, {}).setdefault(value, set()).add(rank)
        for what, values in said.items():
            for value, who in values.items() if len(values) > 1 else ():
                self.warnings[f"not the same everywhere: {what} {value}"] = who

    def take_measured(self, results: dict[int, dict[str, Any]], max_clock_skew_s: float) -> None:
        """Clocks and all-reduce."""
        for text, (ahead, doubt) in results.get(0, {}).get("clocks", {}).items():
            rank = int(text)
            self._clocks[rank] = ahead, doubt
            if abs(ahead) - doubt > max_clock_skew_s:
                self.problems[
                    f"the clock of {self._team.hosts[rank]} is {abs(ahead):.3f} s (± {doubt:.3f} s) "
                    f"{'ahead of' if ahead > 0 else 'behind'} that of {self._team.hosts[0]}, --max-clock-skew allows "
                    f"{max_clock_skew_s:g} s: set them, start chrony or ntpd"
                ] = {rank}
        figures = {rank: result["reduce"] for rank, result in results.items() if result["reduce"]}
        for rank, one in figures.items():
            if words := one.get("error") or one.get("wrong"):
                self.problems.setdefault(words, set()).add(rank)
        if figures and all("seconds" in one for one in figures.values()):
            slowest = max(figures.values(), key=lambda one: one["seconds"])
            size = self._team.world.size
            speed = slowest["bytes"] / slowest["seconds"] / 1e9
            self._reduce = {key: slowest[key] for key in ("bytes", "dtype", "backend", "seconds")}
            self._reduce |= {"ranks": size, "algorithm_gb_s": speed, "bus_gb_s": speed * 2 * (size - 1) / size}

    def describe_system(self, path: Path, values: dict[str, Any]) -> None:
        """Write the system description; a file that can't be written is a problem like the others."""
        nodes = {rank: facts["system"] for rank, facts in sorted(self._facts.items()) if "system" in facts}
        gpus = max((len({self._facts[r]["gpu"]["id"] for r in here if "gpu" in self._facts[r]} - {""})
                    for here in self._nodes().values()), default=0)  # fmt: skip
        description, differences = system_description.merge(list(nodes.values()), values, gpus_seen=gpus)
        for words in differences:
            self.warnings.setdefault(words, set()).update(nodes)
        try:
            system_description.write(path, description)
        except UserError as error:
            self.problems[f"--system-json: {error}"] = {0}

    def conclude(self, json_path: Path | None) -> int:
        """Say everything; returns the exit code."""
        for rank, doing in sorted(self._team.silent.items()):
            words = (
                f"no answer for {self._team.timeout_s:g} s, last seen {doing or 'joining'}: is the process alive, is a "
            )
            self.problems.setdefault(words + "file system stuck there?", set()).add(rank)
        if json_path:
            try:
                json_path.write_text(json.dumps(self._figures(), indent=2) + "\n")
            except OSError as error:
                self.problems[f"--json {json_path} can't be written: {error.strerror}"] = {0}
        if self.problems:
            say(self._problem_words())
            return BAD_INPUT
        print(self._table(), flush=True)
        return OK

    def stuck(self, words: str) -> None:
        """This process itself came to a halt: what is known so far must not be lost."""
        self.problems.setdefault(words, set()).add(0)
        say(self._problem_words())

    def _problem_words(self) -> str:
        count = len(self.problems)
        lines = [f"error: preflight found {count} problem{'s' * (count != 1)}; nothing was started"]
        lines += [f"  {self._names(who)}: {words}" for words, who in self.problems.items()]
        return "\n".join(lines + self._warning_words())

    def _warning_words(self) -> list[str]:
        return [f"  warning, {self._names(who)}: {words}" for words, who in self.warnings.items()]

    def _names(self, who: Iterable[int]) -> str:
        """Ranks and their nodes: "ranks 0-7 on n1, ranks 8-15 on n2"."""
        by_node: dict[str, list[int]] = {}
        for rank in sorted(who):
            by_node.setdefault(self._team.hosts[rank], []).append(rank)
        names = [f"{ranks(here)} on {host}" for host, here in by_node.items()]
        more = [f"and on {len(names) - _NODES_SHOWN} more nodes"] * (len(names) > _NODES_SHOWN)
        return ", ".join(names[:_NODES_SHOWN] + more)

    def _nodes(self) -> dict[str, list[int]]:
        nodes: dict[str, list[int]] = {}
        for rank, host in enumerate(self._team.hosts):
            nodes.setdefault(host, []).append(rank)
        return nodes

    def _figures(self) -> dict[str, Any]:
        """Everything, for programs: seconds, bytes, GiB, 1e9 bytes a second."""
        hosts = self._team.hosts
        return {
            "nodes": {
                host: {
                    "ranks": here,
                    "gpus": [self._facts.get(rank, {}).get("gpu") for rank in here],
                    "free_shm_gib": self._facts.get(here[0], {}).get("free_shm_gib"),
                    "clock_ahead_s": self._clocks.get(here[0], (None, None))[0],
                    "clock_uncertainty_s": self._clocks.get(here[0], (None, None))[1],
                }
                for host, here in self._nodes().items()
            },
            "free_output_gib": self._facts.get(0, {}).get("free_output_gib"),
            "folders": self._facts.get(0, {}).get("folders", {}),
            "all_reduce": self._reduce,
            "problems": [{"ranks": sorted(who), "nodes": sorted({hosts[r] for r in who}), "what": words}
                         for words, who in self.problems.items()],
            "warnings": [{"ranks": sorted(who), "nodes": sorted({hosts[r] for r in who}), "what": words}
                         for words, who in self.warnings.items()],
        }  # fmt: skip

    def _table(self) -> str:
        nodes, facts = self._nodes(), self._facts
        names = list(nodes) if len(nodes) <= _NODES_SHOWN else [*list(nodes)[:_NODES_SHOWN], "..."]
        models: dict[str, int] = {}
        for one in facts.values():
            name = one["gpu"]["name"] if "gpu" in one else "none asked for"
            models[name] = models.get(name, 0) + 1
        each = sorted({len(here) for here in nodes.values()})
        rows = [
            ("nodes", f"{len(nodes)}: {', '.join(names)}"),
            ("ranks", f"{len(facts)}, {' or '.join(map(str, each))} a node"),
            ("GPUs", ", ".join(name if "none" in name else f"{count} x {name}" for name, count in models.items())),
        ]
        others = {rank: clock for rank, clock in self._clocks.items() if rank}
        if others:
            worst = max(others, key=lambda rank: abs(others[rank][0]))
            ahead, doubt = others[worst]
            rows.append(
                (
                    "clocks",
                    f"at most {abs(ahead) * 1e3:.3f} ms apart (± {doubt * 1e3:.3f} ms, {self._team.hosts[worst]})",
                )
            )
        rows += [(name, words) for name, words in facts[0].get("folders", {}).items()]
        shm = {rank: one["free_shm_gib"] for rank, one in facts.items() if "free_shm_gib" in one}
        free = [f"output {facts[0]['free_output_gib']:.1f} GiB"] if "free_output_gib" in facts[0] else []
        if shm:
            least = min(shm, key=shm.__getitem__)
            free.append(f"/dev/shm {shm[least]:.1f} GiB{f' or more ({self._team.hosts[least]})' * (len(shm) > 1)}")
        rows.append(("free", ", ".join(free)))
        if self._reduce and self._reduce["ranks"] > 1:
            r = self._reduce
            rows.append((
                "all-reduce",
                f"{r['bytes']:,} bytes of {r['dtype']} over {r['backend']}, {r['ranks']} ranks, sums right: "
                f"{r['seconds'] * 1e3:.3f} ms, algorithm {r['algorithm_gb_s']:.2f} GB/s, bus {r['bus_gb_s']:.2f} GB/s",
            ))  # fmt: skip
        else:
            rows.append(("all-reduce", "not measured"))
        lines = ["preflight: everything is in place", *(f"  {name:<11} {words}" for name, words in rows)]
        return "\n".join(lines + self._warning_words())
