"""Jobs of run.sub for tests: every path has a space, the model is tiny and the data 64 scenes.

An epoch of 2 x 2 ranks takes a second or two.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.slurm.cluster import USER, Cluster, children

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "source configs/config_cpu_demo_002x02x004.sh"
ONE_RANK = f"{CONFIG}; export DGXNGPU=1 DGXSYSTEM=small"  # a node, where a test wants no more
SHARED = ("--oversubscribe", "--mem=1500", "--ntasks-per-node=2")  # words of jobs that run side by side
TINY = (
    "--dataset custom --backbone resnet18 --norm batch --trainable-backbone-layers 5 --no-pretrained --fpn-channels 16 "
    "--head-convs 1 --image-size 64 64 --anchor-sizes 16,32,64,128,256 --max-boxes 32 --workers 1 --device cpu "
    "--ema-decay 0.9 --target-map"
)
SUCCESS, NEVER = f"{TINY} 0", f"{TINY} 1".replace("--workers 1", "--workers 0")  # a process less to start a rank
LONG = {"EXTRA_PARAMS": NEVER, "NUMEPOCHS": 500}
WHOLE = re.compile(r':::MLLOG \{"namespace": .*"metadata": \{.*\}\}')


def make_data(folder: Path) -> Path:
    command = [sys.executable, ROOT / "tools/make_scenes.py", "--out", folder, "--train", "64", "--val", "16"]
    subprocess.run([*command, "--size", "64"], check=True, stdout=subprocess.DEVNULL)
    return folder


class Submission:
    """A job of run.sub: its environment, what it wrote, and ways to hurt it."""

    def __init__(self, cluster: Cluster, folder: Path, environ: dict, words=(), config=CONFIG):
        self.cluster, self.folder = cluster, folder
        self.logs = Path(environ["LOGDIR"])
        script = f'{config} && exec sbatch --parsable -N 2 "$@" run.sub'
        done = subprocess.run(
            ["bash", "-euc", script, "bash", f"--output={folder}/slurm %j.out", *words],
            env=cluster.env(**environ), cwd=folder / "work tree", capture_output=True, text=True, timeout=240,
            **cluster.identity,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.id = int(done.stdout)

    @property
    def stem(self) -> str:
        return next(self.logs.glob("*_1")).name.removesuffix("_1")

    def trial(self, k=1) -> Path:
        return self.logs / f"{self.stem}_{k}"

    def said(self) -> str:
        return self.cluster.output(self.id)

    def steps(self, k=1) -> int:
        """Training steps of trial k so far."""
        return (self.trial(k) / "progress.jsonl").read_text().count('"kind": "step"')

    def wait(self, timeout=420) -> int:
        """The job's exit code."""
        return int(self.cluster.wait(self.id, timeout)["ExitCode"].split(":")[0])

    def until(self, condition, what: str, timeout=420):
        deadline = time.monotonic() + timeout
        while True:
            state = self.cluster.job(self.id)["JobState"]
            if condition():
                return
            assert time.monotonic() < deadline and state in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"), (
                f"no {what}; {state}\n{self.said()}\n{self.rank(0) if any(self.logs.glob('*_1')) else ''}"
            )
            time.sleep(0.2)

    def until_step(self, steps=1, k=1):
        def trained():
            with contextlib.suppress(StopIteration, FileNotFoundError):
                return self.steps(k) >= steps
            return False

        self.until(trained, f"training step {steps}")

    def until_end(self, timeout=180):
        """Until run.sub has said its last line; Slurm itself waits for lost nodes before the job has ended."""
        self.until(lambda: re.search(r"^\d of \d trials ended", self.said(), re.MULTILINE), "last line", timeout)

    def rank(self, rank: int, k=1) -> str:
        return (self.trial(k) / f"rank_{rank}.log").read_text(errors="replace")

    def program(self, rank: int) -> int:
        """The process id of a rank's Python: the child of run_and_time.sh."""
        return children(self.cluster.task(self.id, rank))[0]

    def events(self, k=1) -> list[dict]:
        lines = (self.trial(k) / f"result_{k - 1}.txt").read_text().splitlines()
        assert all(WHOLE.fullmatch(line) for line in lines)
        return [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]

    def status(self, k=1) -> str:
        (stop,) = [event for event in self.events(k) if event["key"] == "run_stop"]
        return stop["metadata"]["status"]

    def end(self) -> None:
        """Nothing of it runs any more."""
        self.cluster.run("scancel", self.id, check=False)
        self.cluster.wait(self.id, 60)


def weights(folder: Path) -> dict:
    """What a checkpoint holds of the model and its average."""
    saved = torch.load(folder / "last.pt", weights_only=False)
    return saved["model"] | {f"ema {name}": value for name, value in saved["ema"].items()}


def start(cluster: Cluster, data: Path, folder: Path, *words, config=CONFIG, **environ) -> Submission:
    """Submits run.sub from a new folder, after `config` in the same shell.

    `words` are for sbatch, `environ` for the job, over its defaults.
    """
    folder.mkdir()
    (folder / "work tree").symlink_to(ROOT)
    (folder / "my logs").mkdir()
    for path in (folder, folder / "my logs"):
        os.chown(path, USER.pw_uid, USER.pw_gid)
    defaults = {
        "DATADIR": data, "LOGDIR": folder / "my logs", "CONT": "", "DROPCACHE_CMD": "true", "NUMEPOCHS": 2,
        "LOG_INTERVAL": 2, "WARMUP_EPOCHS": 0, "EVALBATCHSIZE": 4, "EXTRA_PARAMS": SUCCESS,
        "MLPERF_SUBMISSION_PLATFORM": "test",
    }  # fmt: skip
    return Submission(cluster, folder, defaults | environ, ("-t", "30", *words), config)
