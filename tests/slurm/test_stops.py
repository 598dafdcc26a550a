"""run.sub on a real Slurm of two nodes: scancel, time limits, preemptions and what requeueing makes of them."""

import json
import re

import pytest
import torch

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import LONG, ONE_RANK, SHARED, SUCCESS, weights

pytestmark = pytest.mark.slurm
WIDE = (*SHARED[:-1], "--ntasks-per-node=5")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """KillWait is what a rank has to write its checkpoint when the job is cancelled; Slurm's default is 30 s.

    Jobs of the partition `urgent` preempt those of `main`, which have GraceTime to end by themselves.
    """
    settings = {"PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE"}
    with Cluster(tmp_path_factory.mktemp("slurm"), cpus=8, kill_wait=20, settings=settings) as running:
        running.run("scontrol", "update", "PartitionName=main", "GraceTime=120")
        running.run("scontrol", "create", "PartitionName=urgent", "Nodes=n1,n2", "PriorityTier=9")
        yield running


@pytest.fixture(scope="module")
def over_time(submit_for_module):
    """Two jobs that run into a time limit, beside another test: the job's own, and WALLTIME_RUNANDTIME."""
    own = submit_for_module(*SHARED, "-t", "3", "--signal=B:USR1@90", **LONG, NEXP=2, config=ONE_RANK)
    short = f"{ONE_RANK} WALLTIME_RUNANDTIME=1"
    return own, submit_for_module(*SHARED, **LONG, NEXP=2, REQUEUE=1, config=short)


def ask_for_stacks(job) -> None:
    """As docs/cluster.md says. Under proctrack/cgroup the signal reaches run_and_time.sh alone, as on most clusters."""
    listed = job.cluster.run("squeue", "--noheader", "--steps", f"--jobs={job.id}", "--format=%i %j").stdout
    steps = dict(line.split() for line in listed.splitlines())
    training = next(step for step, name in steps.items() if name == "trial_1")
    job.cluster.run("scancel", "--signal=QUIT", training)
    job.until(lambda: all("most recent call first" in job.rank(rank) for rank in range(4)), "stacks of every rank", 30)
    job.until_step(job.steps() + 3)  # it goes on


def test_stacks_of_a_running_job_and_scancel(submit, over_time):
    job = submit(*SHARED, **LONG, NEXP=2, REQUEUE=1)
    job.until_step()
    ask_for_stacks(job)
    job.cluster.run("scancel", job.id)
    job.wait()
    assert job.cluster.job(job.id)["JobState"] == "CANCELLED"
    assert job.status() == "aborted" and (job.trial() / "last.pt").exists()
    assert "Stopped by SIGTERM" in job.rank(0)
    assert "SIGTERM" in job.said() and "requeued" not in job.said()
    assert not (job.logs / f"{job.stem}_2").exists()


def test_time_limit(over_time):
    job, _ = over_time
    assert job.wait() == 4, job.said()
    assert job.status() == "aborted" and (job.trial() / "last.pt").exists()
    assert "Stopped by SIGUSR1" in job.rank(0)
    assert not (job.logs / f"{job.stem}_2").exists()


def test_a_trial_over_its_time_does_not_stop_the_next(over_time):
    _, job = over_time
    job.until_step(k=2)
    assert (job.trial() / "exit_code").read_text() == "124\n"
    assert "took longer than WALLTIME_RUNANDTIME=1 minutes" in job.said() and "requeued" not in job.said()
    assert job.status() == "aborted"
    job.cluster.run("scancel", job.id)


def preempt(cluster) -> int:
    """Starts an urgent job that needs the place of one with WIDE (five CPUs of eight), returns when it has got that."""
    words = ["-p", "urgent", "-N2", "--ntasks-per-node=4", "--mem=1000", "--output=/dev/null", "--wrap=sleep 600"]
    urgent = cluster.submit(*words)
    cluster.wait(urgent, 110, {"RUNNING"})
    return urgent


def test_after_requeue_and_preemption_the_weights_are_the_same(submit, cluster):
    environ = {"EXTRA_PARAMS": SUCCESS.replace("-map 0", "-map none"), "NUMEPOCHS": 14, "SEED": 3}
    whole = submit("-p", "urgent", *SHARED, config=ONE_RANK, **environ)  # nothing preempts it
    job = submit(*WIDE, config=ONE_RANK, REQUEUE=1, **environ)
    job.until_step(steps=9)
    cluster.run("scancel", "--batch", "--signal=USR1", job.id)
    cluster.requeue_now(job.id, 90)
    job.until(lambda: job.said().count("_1.log --resume") == 1, "resumed trial")
    job.until_step(job.steps() + 1)
    assert "Stopped by SIGUSR1" in job.rank(0) and job.said().count("requeued after trial 1 (code 4)") == 1

    # Its ranks get TERM, and run.sub nothing; it asks for another start before GraceTime is over.
    urgent = preempt(cluster)
    assert cluster.job(job.id)["JobState"] == "PENDING"
    assert "Stopped by SIGTERM" in job.rank(0) and "PREEMPTION" not in job.said(), job.said()
    assert job.said().count("requeued after trial 1 (code 4)") == 2
    cluster.run("scancel", urgent)
    cluster.requeue_now(job.id, 90)
    assert [one.wait() for one in (whole, job)] == [0, 0], whole.said() + job.said()
    assert cluster.job(job.id)["Restarts"] == "2" and job.said().count("_1.log --resume") == 2
    assert "1 of 1 trials ended with success" in job.said()
    steps = [json.loads(line)["step"] for line in (job.trial() / "progress.jsonl").open() if '"step"' in line]
    assert max(steps) == 14 * 8
    ours, theirs = weights(job.trial()), weights(whole.trial())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_job_that_is_preempted_before_its_first_trial_starts_again(submit, cluster):
    job = submit(*WIDE, config=ONE_RANK, NUMEPOCHS=1)
    cluster.wait(job.id, 180, {"RUNNING"})  # it takes seconds to import torch and for its preflight
    urgent = preempt(cluster)
    said = job.said()
    pattern = "requeued before (the first trial|trial 1); the job goes on when it starts again: Slurm's preemption$"
    assert re.search(pattern, said, re.MULTILINE) and not any(job.logs.glob("*_1")), said
    cluster.run("scancel", urgent)
    cluster.requeue_now(job.id, 90)
    assert job.wait() == 0, job.said()
