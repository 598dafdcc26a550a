"""A real Slurm on one machine, for tests: one controller and a few nodes on loopback, started in about a second.

Each node is a slurmd in its own process, host name and mount namespaces, so nodes see neither each other's processes
nor mounts, `power_off` is what a power cut is, and nothing outlives `stop`: when a namespace's first process dies the
kernel kills the rest and drops the mounts. Processes are tracked by cgroup v1 where this machine has it, so that
signals reach what they reach on a real cluster. No authentication, no accounting database. Root and Linux only; jobs
that are submitted with `identity` belong to a user who is not root.
"""

import contextlib
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.slurm.configuration import BOOT, CGROUP, CONFIGURATION, NO_CGROUP, closed_python, free_ports, remove_cgroups
from tests.slurm.containers import install, require

PACKAGES = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client"
UNFINISHED = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "SIGNALING", "STAGE_OUT"}
FOREIGN = re.compile("SLURM|SBATCH|SRUN|SALLOC|PYXIS|ENROOT|XDG_|PMI|RANK$|WORLD_SIZE$|LOCAL_RANK$|MASTER_")
USER = pwd.getpwnam("nobody")


class Cluster:
    """A running Slurm as a context manager; its state and logs are files of `folder`.

    `cpus` and `memory` (MiB) are declared for each node and need not exist; `gpus` are device files that only Slurm
    believes in, for --gpus-per-node and CUDA_VISIBLE_DEVICES. `kill_wait` is the seconds between SIGTERM and SIGKILL.
    `containers` is the version of a test double of Pyxis (spank_containers.c; images and records: containers.py) for
    every node; none without.
    `settings` are more lines of slurm.conf, as in settings={"SlurmdTimeout": 10}.
    """

    def __init__(
        self, folder, nodes=("n1", "n2"), cpus=4, gpus=0, memory=8000, containers="", kill_wait=2, settings=None
    ):
        self.folder = Path(folder).absolute()
        self.nodes, self.cpus, self.gpus, self.memory = tuple(nodes), cpus, gpus, memory
        self.containers, self.kill_wait, self.settings = containers, kill_wait, dict(settings or {})
        self.daemons: dict[str, subprocess.Popen] = {}
        self._first_job = 0
        self._link: Path | None = None

    # Starting and stopping

    def __enter__(self) -> "Cluster":
        require("slurmctld", "slurmd", "sbatch", packages=PACKAGES)
        if os.geteuid():
            raise RuntimeError("the local Slurm needs root (unshare, mount, hostname): run these tests as root")
        self.folder.mkdir(parents=True, exist_ok=True)
        # slurm.conf takes no spaces and a socket's path holds 107 bytes, so the daemons come here by a short link
        self._link = Path(tempfile.mkdtemp(prefix="slurm-")) / "d"
        self._link.parent.chmod(0o755)
        self._link.symlink_to(self.folder)
        try:
            for attempt in range(3):  # somebody may take a port between the look and the daemon's start
                self._configure()
                self.daemons["slurmctld"] = self._spawn("slurmctld", "-D", "-c")
                for node in self.nodes:
                    self.power_on(node)
                try:
                    self._wait_idle()
                    return self
                except AssertionError as error:
                    if attempt == 2 or "Address already in use" not in str(error):
                        raise
                    self._stop_daemons()
        except BaseException:
            self.stop()
            raise
        raise AssertionError("unreachable")

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        """Kills every daemon, job and mount; harmless when nothing runs."""
        self._stop_daemons()
        if self._link is not None:
            shutil.rmtree(self._link.parent, ignore_errors=True)  # the link, not what it points to
            self._link = None

    def _stop_daemons(self) -> None:
        for name in list(self.daemons):
            if name != "slurmctld":
                self.power_off(name)
        controller = self.daemons.pop("slurmctld", None)
        if controller:
            controller.kill()
            controller.wait()
            remove_cgroups(range(self._first_job, self._first_job + 1000))

    @property
    def identity(self) -> dict:
        """The user of the jobs, for subprocess.run."""
        return {"user": USER.pw_uid, "group": USER.pw_gid, "extra_groups": []}

    def _configure(self) -> None:
        for file in [*self.folder.glob("*.log"), self.folder / "containers.jsonl"]:
            file.unlink(missing_ok=True)
        for name in ("state", *(f"{kind}-{node}" for node in self.nodes for kind in ("spool", "tmp"))):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir()
        ports = free_ports(1 + len(self.nodes))
        self._first_job = ports[0]
        proctrack = "linuxproc" if NO_CGROUP else "cgroup"
        text = CONFIGURATION.format(
            port=ports[0], folder=self._link, kill_wait=self.kill_wait, proctrack=proctrack
        )  # fmt: skip
        (self.folder / "cgroup.conf").write_text(CGROUP)
        (self.folder / "home").mkdir(exist_ok=True)
        os.chown(self.folder / "home", USER.pw_uid, USER.pw_gid)
        text += "".join(f"{key}={value}\n" for key, value in self.settings.items())
        gres = f" Gres=gpu:{self.gpus}" if self.gpus else ""
        if self.gpus:
            text += "GresTypes=gpu\n"
            for index in range(self.gpus):
                device = self.folder / f"gpu{index}"
                if not device.exists():
                    os.mknod(device, 0o666 | 0o020000, os.makedev(1, 3))  # another /dev/null
            (self.folder / "gres.conf").write_text(f"Name=gpu File={self._link}/gpu[0-{self.gpus - 1}]\n")
        hosts = Path("/etc/hosts").read_text()
        for index, (node, port) in enumerate(zip(self.nodes, ports[1:]), 1):
            text += f"NodeName={node} NodeHostname={node} NodeAddr=127.0.1.{index} Port={port}"
            text += f" CPUs={self.cpus} RealMemory={self.memory}{gres} State=UNKNOWN\n"
            hosts += f"\n127.0.1.{index} {node}"
        text += f"PartitionName=main Nodes={','.join(self.nodes)} Default=YES MaxTime=INFINITE State=UP\n"
        (self.folder / "hosts").write_text(hosts + "\n")
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "plugstack.conf").write_text(
            install(self.folder, self._link, self.containers) if self.containers else ""
        )

    def _spawn(self, *command: str) -> subprocess.Popen:
        """A daemon that dies with this process, even when pytest is killed."""
        with open(self.folder / "daemons.log", "ab") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            command = ("setpriv", "--pdeathsig", "KILL", *command)
            return subprocess.Popen(command, env=self.env(), cwd=self.folder, start_new_session=True, **streams)

    def power_on(self, node: str) -> None:
        """Starts the node's slurmd; its jobs of before are gone."""
        namespaces = ["--uts", "--mount", "--pid", "--mount-proc", "--propagation", "private"]
        self.daemons[node] = self._spawn(
            "unshare", *namespaces, "--fork", "--kill-child=KILL", "bash", "-ec", BOOT, "boot", node, str(self._link),
            *closed_python()
        )  # fmt: skip

    def power_off(self, node: str) -> None:
        """Kills everything on the node at once, as a power cut does, and returns when it is gone."""
        daemon = self.daemons.pop(node, None)
        if daemon is None:
            return
        deadline = time.monotonic() + 5
        while daemon.poll() is None:
            for child in children(daemon.pid):  # the namespace's first process; unshare waits until all are dead
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            if time.monotonic() > deadline:
                daemon.kill()
            time.sleep(0.01)

    def kill_slurmd(self, node: str) -> None:
        """Kills the node's slurmd alone: what runs there runs on, nothing new starts. power_off ends the rest."""
        (pid,) = [pid for pid, words in self.processes(node).items() if words[:1] == ["slurmd"]]
        os.kill(pid, signal.SIGKILL)

    def _wait_idle(self, timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and all(daemon.poll() is None for daemon in self.daemons.values()):
            with contextlib.suppress(subprocess.TimeoutExpired):  # sinfo is patient with a controller that is gone
                answer = self.run("sinfo", "-ht", "idle", "-o%D", check=False, timeout=5)
                if answer.stdout.strip() == str(len(self.nodes)):
                    return
            time.sleep(0.05)
        dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
        why = f"{', '.join(dead)} ended" if dead else f"the nodes are not idle after {timeout} s"
        said = (self.folder / "daemons.log").read_text(errors="replace")[-3000:]
        raise AssertionError(f"Slurm did not start: {why}\n--- daemons\n{said}\n{self.logs()}")

    # Using it

    def env(self, **more: str | None) -> dict[str, str]:
        """The environment of a user of this cluster who has activated the project's Python; None removes a name."""
        values = {name: value for name, value in os.environ.items() if not FOREIGN.match(name)}
        path = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]
        values |= {"SLURM_CONF": f"{self._link}/slurm.conf", "PATH": ":".join(path), "OMP_NUM_THREADS": "1"}
        values |= {"HOME": f"{self._link}/home", "USER": USER.pw_name, "LOGNAME": USER.pw_name}
        # the clone is that of another user
        values |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
        for name, value in more.items():
            if value is None:
                values.pop(name, None)
            else:
                values[name] = str(value)
        return values

    def run(self, *command, check=True, timeout=240, env=None, cwd=None, **identity) -> subprocess.CompletedProcess:
        """Runs a command such as sinfo, srun or scontrol to its end, as root unless told otherwise (`self.identity`).

        A failure raises with what it said.
        """
        command = [str(word) for word in command]
        result = subprocess.run(
            command, env=self.env() if env is None else env, cwd=cwd or self.folder, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors="replace", timeout=timeout, **identity,
        )  # fmt: skip
        if check and result.returncode:
            raise AssertionError(f"{command} ended with {result.returncode}\n{result.stdout}{result.stderr}")
        return result

    def submit(self, *words, env=None, cwd=None) -> int:
        """sbatch with these words, [option...] script [argument...], in `cwd` (default: the folder); the job's id."""
        return int(self.run("sbatch", "--parsable", *words, env=env, cwd=cwd).stdout.split(";")[0])

    def job(self, job: int) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        return parse_job(self.run("scontrol", "show", "job", job).stdout)

    def wait(self, job: int, timeout: float = 240, states: set[str] | None = None) -> dict[str, str]:
        """Waits (seconds) until the job has ended, or is in one of `states`; its fields.

        After the time: an AssertionError with the job's output and the daemons' logs.
        """
        deadline = time.monotonic() + timeout
        while True:
            fields = self.job(job)
            if fields["JobState"] in states if states else fields["JobState"] not in UNFINISHED:
                return fields
            if time.monotonic() > deadline:
                state = f"job {job} is {fields['JobState']} ({fields.get('Reason')}) after {timeout} s"
                raise AssertionError(f"{state}\n--- output\n{self.output(job)[-6000:]}\n{self.logs()}")
            time.sleep(0.1)

    def output(self, job: int) -> str:
        """What the batch script said so far (--output, and --error where that is another file)."""
        fields = self.job(job)
        files = dict.fromkeys(fields[name] for name in ("StdOut", "StdErr") if name in fields)
        return "".join(Path(file).read_text(errors="replace") for file in files if Path(file).is_file())

    def requeue_now(self, job: int, timeout: float = 120) -> None:
        """After a requeue: waits until the job is pending, then takes its waiting time (6 to 120 s) away."""
        self.wait(job, timeout, {"PENDING"})
        time.sleep(2)  # slurmd counts whole seconds and refuses a job that starts in the second in which it was ended
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def node_state(self, node: str) -> str:
        """Such as IDLE, MIXED, ALLOCATED, DOWN+NOT_RESPONDING."""
        return re.search(r" State=(\S+)", self.run("scontrol", "-o", "show", "node", node).stdout)[1]

    def set_node(self, node: str, state: str) -> None:
        """state: down, drain, resume."""
        self.run("scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=test")

    def logs(self, lines: int = 25) -> str:
        """The ends of the daemons' logs."""
        parts = []
        for file in sorted(self.folder.glob("slurm*.log")):
            parts += [f"--- {file.name}", *file.read_text(errors="replace").splitlines()[-lines:]]
        return "\n".join(parts)

    def processes(self, node: str) -> dict[int, list[str]]:
        """Arguments of everything that runs on the node, by the process id that os.kill understands here."""
        found = {}
        waiting = children(self.daemons[node].pid) if node in self.daemons else []
        while waiting:
            pid = waiting.pop()
            waiting += children(pid)
            with contextlib.suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        return found

    def task(self, job: int, rank: int, timeout: float = 120) -> int:
        """Process id (for os.kill) of the main process of one task of the job's newest step; waits until it runs."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self.job(job)["JobState"] in UNFINISHED:
            best = (-1, 0)
            for daemon in list(self.daemons.values()):
                for stepd in stepds(daemon.pid):
                    for pid in children(stepd):
                        place = environment(pid)
                        if place.get("SLURM_JOB_ID") == str(job) and place.get("SLURM_PROCID") == str(rank):
                            best = max(best, (int(place.get("SLURM_STEP_ID", -1)), pid))
            if best[0] >= 0:
                return best[1]
            time.sleep(0.05)
        state = f"job {job} ({self.job(job)['JobState']}) has no task of rank {rank}"
        raise AssertionError(f"{state}\n--- output\n{self.output(job)[-6000:]}\n{self.logs()}")


def parse_job(text: str) -> dict[str, str]:
    """Fields of `scontrol show job`; names and paths, with spaces and equals signs, have lines of their own."""
    fields = {}
    for line in text.strip().splitlines():
        whole = re.match(r"\s*(?:JobId=(\d+) )?(JobName|Command|WorkDir|StdErr|StdIn|StdOut|Comment)=(.*)", line)
        if whole:
            fields |= {whole[2]: whole[3]} | ({"JobId": whole[1]} if whole[1] else {})
        else:
            fields |= dict(re.findall(r"(\S+?)=(\S*)", line))
    return fields


def children(pid: int) -> list[int]:
    """Process ids of the children of any thread of a process; none when it's gone."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(word) for word in file.read_text().split()]
    return found


def stepds(pid: int) -> list[int]:
    """The slurmstepd processes of one node: below slurmd, or adopted by the namespace's first process."""
    found = []
    for child in children(pid):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{child}/comm").read_text().strip() == "slurmstepd":
                found.append(child)
        found += stepds(child)
    return found


def environment(pid: int) -> dict[str, str]:
    """The environment that a process was started with; empty when it's gone."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        return dict(word.split("=", 1) for word in words if "=" in word)
    return {}
