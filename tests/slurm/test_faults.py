"""run.sub on a real Slurm of two nodes: ranks, folders and nodes fail. Jobs run side by side: they mostly wait."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import LONG, NEVER, ONE_RANK, SHARED

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A tmpfs of little more than the preflight asks for; the nodes see only mounts that were there before them."""
    folder = tmp_path_factory.mktemp("small disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1100m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, small_disk):
    with Cluster(tmp_path_factory.mktemp("slurm"), cpus=8) as running:
        yield running


def seconds_until(jobs: dict, ended) -> dict[str, float]:
    """How long each of the jobs takes from now until `ended(job)`."""
    began, took = time.monotonic(), {}
    while len(took) < len(jobs):
        for name, job in jobs.items():
            if name not in took and ended(job):
                took[name] = time.monotonic() - began
        left = {name: job.said() for name, job in jobs.items() if name not in took}
        assert not left or time.monotonic() - began < 150, left
        time.sleep(0.2)
    return took


# Ranks


@pytest.fixture(scope="module")
def hurt(submit_for_module, data, tmp_path_factory):
    """Three jobs, in each of which one rank is hurt, and the seconds until its trial has ended."""
    own = tmp_path_factory.mktemp("own") / "hanging data"
    shutil.copytree(data, own)
    for image in sorted((own / "train").glob("*.jpg"))[:4]:
        image.unlink()
        os.mkfifo(image)  # a read that never returns, as on a dead file server
    more = {"EXTRA_PARAMS": NEVER.replace("--workers 0", "--workers 1"), "HANG_MONITOR_TIMEOUT": 15}
    jobs = {
        "killed": submit_for_module(*SHARED, **LONG, NEXP=2),
        "stopped": submit_for_module(*SHARED, **LONG),
        "hanging": submit_for_module(*SHARED, **LONG | more, config=ONE_RANK, DATADIR=own),
    }
    for name in ("killed", "stopped"):
        jobs[name].until_step()
    os.kill(jobs["killed"].program(3), signal.SIGKILL)
    os.kill(jobs["stopped"].program(1), signal.SIGSTOP)
    return jobs, seconds_until(jobs, lambda job: any(job.logs.glob("*_1/exit_code")))


def test_a_failed_trial_does_not_stop_the_next(hurt):
    job, seconds = (part["killed"] for part in hurt)
    assert seconds < 60
    assert (job.trial() / "exit_code").read_text() == "137\n"
    assert job.status() == "aborted"
    said = job.said()
    verdict = re.search(r"trial.*rank 3.*n2.*", said)
    assert verdict and re.search(r"SIGKILL|signal 9", verdict[0]), said
    for rank in (0, 1, 2):
        assert "watchdog" in job.rank(rank)
        assert "Thread" in (job.trial() / f"stacks_rank{rank}.txt").read_text()
    job.until_step(k=2)
    job.cluster.run("scancel", job.id)


def test_a_stopped_rank_ends_the_trial_and_shows_its_stacks(hurt):
    job, seconds = (part["stopped"] for part in hurt)
    assert job.wait() != 0
    assert seconds < 65
    said = job.said()
    assert re.search(r"trial ended .*rank 1 .*n1.*no sign of life", said), said
    assert "SIGKILL" not in said and "run.sub killed the ranks that had not ended" in said
    assert len(re.findall(r"^  File .*, line \d+ in ", job.rank(1), re.MULTILINE)) > 10, "stacks of the stopped rank"
    assert job.status() == "aborted"


def test_a_hanging_rank_is_named_and_all_stacks_are_kept(hurt):
    job = hurt[0]["hanging"]
    assert job.wait() == 6
    said = job.said()
    assert "stood still for 15 s" in said and "waiting for data" in said, said
    for rank in range(2):
        assert "detcore/training/engine.py" in (job.trial() / f"stacks_rank{rank}.txt").read_text()
    assert job.status() == "aborted"


# Folders: the next trial would find the same, so that none is started


@pytest.fixture(scope="module")
def without(submit_for_module, data, small_disk, tmp_path_factory):
    """Three jobs of two trials, that lose LOGDIR, DATADIR and room on the disk; their folders; that DATADIR."""
    own = tmp_path_factory.mktemp("own") / "data of one job"
    shutil.copytree(data, own)
    small = LONG | {"config": ONE_RANK, "NEXP": 2}
    jobs = {
        "LOGDIR": submit_for_module(*SHARED, **small),
        "DATADIR": submit_for_module(*SHARED, **small, DATADIR=own),
        "disk": submit_for_module(*SHARED, **small, LOGDIR=small_disk),
    }
    for job in jobs.values():
        job.until_step(2)
    first = {name: job.trial() for name, job in jobs.items()}
    with contextlib.suppress(OSError), open(small_disk / "other data", "wb", buffering=0) as file:
        while True:
            file.write(bytes(2**20))
    shutil.rmtree(own)
    while jobs["LOGDIR"].logs.exists():
        shutil.rmtree(jobs["LOGDIR"].logs, ignore_errors=True)  # again where a rank has just made a file in it
    for job in jobs.values():
        assert job.wait() != 0
    return jobs, first, own


def test_a_folder_of_logs_that_is_removed_ends_the_job_and_is_named(without):
    job = without[0]["LOGDIR"]
    said = job.said()
    assert re.search(rf"no further trial: LOGDIR: {re.escape(str(job.logs))}/\S+ was removed$", said, re.M), said
    assert "trial 2 of 2" not in said and not any(job.logs.glob("*_2")), said


def test_a_data_set_that_is_removed_ends_the_job_and_is_named_with_the_nodes(without):
    jobs, first, own = without
    said = jobs["DATADIR"].said()
    gone = {f"{own} is gone on {node}" for node in ("n1", "n2")}
    assert set(re.search(r"no further trial: (.*)$", said, re.MULTILINE)[1].split(", ")) == gone, said
    assert re.search(r"^run.sub: trial 1 |trial ended with exit code", said, re.MULTILINE), said
    assert (first["DATADIR"] / "exit_code").read_text() not in ("0\n", "")
    assert "trial 2 of 2" not in said and jobs["DATADIR"].status() == "aborted"


def test_a_full_disk_is_said_and_not_filled_by_the_next_trial(without, small_disk, submit):
    job = without[0]["disk"]
    said = job.said()
    assert re.search(r"trial ended .*disk is full|No space left|disk.* full", said, re.DOTALL), said
    assert re.search(rf"no further trial: the disk of LOGDIR={re.escape(str(small_disk))} is full$", said, re.M), said
    assert "trial 2 of 2" not in said and not any(small_disk.glob("*_2"))
    job = submit(LOGDIR=small_disk / "next")
    assert job.wait() == 2
    assert re.search(r"small disk\d*/next.*GiB", job.said()) and not list(small_disk.glob("next/*_1")), job.said()


# Nodes


def cut(cluster, node: str, declared: bool) -> None:
    """A power cut; `declared`: Slurm has found out, as it does after SlurmdTimeout (300 s)."""
    cluster.power_off(node)
    if declared:
        cluster.set_node(node, "down")


def bring_back(cluster, node: str, *jobs) -> None:
    """The node starts again, and so do the jobs at once."""
    cluster.power_on(node)
    deadline = time.monotonic() + 90
    while not cluster.node_state(node).startswith("IDLE") and time.monotonic() < deadline:
        if cluster.node_state(node).startswith("DOWN"):  # else its slurmd has brought it back by itself
            cluster.run("scontrol", "update", f"NodeName={node}", "State=resume", check=False)
        time.sleep(0.5)
    for job in jobs:
        cluster.requeue_now(job.id, 60)


def resumes(job, count: int) -> None:
    """Waits until trial 1 has been resumed for the count-th time and trains."""
    job.until(lambda: job.said().count("_1.log --resume") == count, "resumed trial 1")
    job.until_step(job.steps() + 2)


def test_lost_nodes(submit, cluster):
    """Each loss hurts two jobs: `ending`, whose trial it ends, and `resuming` (REQUEUE=1), which goes on with it."""
    ending = submit(*SHARED, **LONG, NEXP=3)
    resuming = submit(*SHARED, **LONG, NEXP=3, REQUEUE=1, config=ONE_RANK)
    ending.until_step()
    resuming.until(lambda: any(resuming.logs.glob("*_1/last.pt")), "checkpoint")

    cut(cluster, "n1", declared=True)  # with the batch scripts
    bring_back(cluster, "n1", ending, resuming)
    ending.until_step(k=2)
    assert (ending.trial(1) / "exit_code").read_text() == "143\n"
    assert "trial 1 ended with code 143 before this start of the job" in ending.said()
    resumes(resuming, 1)

    cut(cluster, "n2", declared=False)
    jobs = {2: ending, 1: resuming}
    took = seconds_until(jobs, lambda job: f"requeued after trial {2 if job is ending else 1}" in job.said())
    assert max(took.values()) < 110
    for job in jobs.values():
        said = job.said()
        assert re.search(r"trial ended with exit code .*(n2|rank [123])", said), said
        assert "no answer from n2: a node is lost" in said
    assert ending.status(2) == "aborted"
    bring_back(cluster, "n2", ending, resuming)
    ending.until_step(k=3)
    assert "trial 2 ended with code" in ending.said()
    assert (ending.trial(2) / "exit_code").read_text() not in ("0\n", "")
    resumes(resuming, 2)

    # The daemon of a node alone: what runs there runs on, but no step can be started.
    cluster.kill_slurmd("n2")
    os.kill(ending.program(3), signal.SIGKILL)
    ending.until_end()
    said = ending.said()
    assert re.search(r"trial ended .*rank 3.*n2.*(SIGKILL|signal 9)", said), said
    assert said.count("no answer from n2: a node is lost") == 2 and "no further trial: no answer from n2" in said, said
    resuming.until_step(resuming.steps() + 2)
    assert not (resuming.logs / f"{resuming.stem}_2").exists()
    cluster.power_off("n2")
    cluster.run("scancel", resuming.id)
    bring_back(cluster, "n2")
