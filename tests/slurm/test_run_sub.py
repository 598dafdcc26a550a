"""run.sub on a real Slurm of two nodes: trials that succeed, and every failure that a cluster has, provoked.

Every path has a space. The model is tiny and the data 64 scenes, so that an epoch of 2 x 2 ranks takes a second or two.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.slurm.cluster import Cluster
from tests.slurm.configuration import NO_CGROUP
from tests.slurm.jobs import NEVER, ROOT, SUCCESS

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """KillWait is what a rank has to write its checkpoint when the job is cancelled; Slurm's default is 30 s."""
    with Cluster(tmp_path_factory.mktemp("slurm"), kill_wait=20) as running:
        yield running


def weights(folder: Path) -> dict:
    saved = torch.load(folder / "last.pt", weights_only=False)
    return saved["model"] | {f"ema {name}": value for name, value in saved["ema"].items()}


def test_two_trials_succeed_and_equal_torchrun(submit, cluster, data, tmp_path):
    job = submit(NEXP=2, SEED=11, NUMEPOCHS=3, EXTRA_PARAMS=SUCCESS.replace("-map 0", "-map none"))
    assert job.wait() == 0, job.said()
    for k in (1, 2):
        events = job.events(k)
        assert (events[0]["key"], events[0]["value"]) == ("cache_clear", True)
        assert [e["value"] for e in events if e["key"] == "seed"] == [10 + k]
        assert [e["value"] for e in events if e["key"] == "submission_platform"] == ["2xtest"]
        assert [e["value"] for e in events if e["key"] == "global_batch_size"] == [16]
        assert job.status(k) == "success"
        log = job.logs / f"{job.stem}_{k}.log"
        assert log.is_symlink() and not os.path.isabs(os.readlink(log))
        text = log.read_text()
        result = (job.trial(k) / f"result_{k - 1}.txt").read_text()
        assert [line for line in text.splitlines() if ":::MLLOG" in line] == result.splitlines()
        assert text.startswith(f":::DLPAL none {job.id} 2 n[1-2] unknown cpu_demo_002x02x004\n:::SYSJSON {{")
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        assert re.search(
            rf"^:::GITCOMMITID {commit or 'unknown'}(-dirty)? {commit or 'unknown'}(-dirty)?$", text, re.MULTILINE
        )
        assert (job.trial(k) / "exit_code").read_text() == "0\n"
    said = job.said()
    assert len(re.findall("^compliance .*: SUCCESS$", said, re.MULTILINE)) == 2 and "no score" in said
    assert "all-reduce" in said and "everything is in place" in said

    # The same on one machine: torchrun, four ranks.
    other = tmp_path / "torchrun"
    environ = cluster.env(
        DATASET_DIR=data, OUTPUT_DIR=other, SEED=11, NUMEPOCHS=3, LOG_INTERVAL=2, WARMUP_EPOCHS=0, EVALBATCHSIZE=4,
        BATCHSIZE=4, EXTRA_PARAMS=SUCCESS.replace("-map 0", "-map none"),
    )  # fmt: skip
    script = "source configs/config_cpu_demo_002x02x004.sh; DGXNNODES=1 DGXNGPU=4 exec ./run_and_time.sh"
    subprocess.run(["bash", "-euc", script], cwd=ROOT, env=environ, check=True, capture_output=True, timeout=240)
    ours, theirs = weights(job.trial(1)), weights(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_ssd300_on_two_nodes(submit):
    words = "--dataset custom --backbone resnet18 --no-pretrained --optimizer adam --max-boxes 32 --augmentation flip "
    config = "source configs/config_ssd300_cpu_demo.sh; export DGXNNODES=2 DGXNGPU=2"
    words += "--evaluation 0 --workers 1 --device cpu --target-map 0 "
    words += "--save {output}/checkpoints --json-summary {output}/summary.json"
    job = submit(config=config, EXTRA_PARAMS=words, BATCHSIZE=4, NUMEPOCHS=1)
    assert job.wait() == 0, job.said()
    assert (job.trial() / "checkpoints/epoch_0.pt").is_file() and (job.trial() / "summary.json").is_file()
    values = {event["key"]: event["value"] for event in job.events()}
    assert values["submission_benchmark"] == "ssd300" and values["global_batch_size"] == 16
    assert values["opt_base_learning_rate"] == pytest.approx(0.004 * 16 / 32)
    assert job.status() == "success" and values["train_samples"] == 64 and values["eval_samples"] == 16
    assert re.search(r"^events of .*rules_ssd300.yaml .*: SUCCESS$", job.said(), re.MULTILINE), job.said()


def test_a_failed_trial_does_not_stop_the_next(submit):
    job = submit(NEXP=2, EXTRA_PARAMS=NEVER, NUMEPOCHS=60)
    job.until_step()
    began = time.monotonic()
    os.kill(job.program(3), signal.SIGKILL)
    job.until(lambda: (job.trial() / "exit_code").exists(), "end of trial 1", 60)
    assert time.monotonic() - began < 60
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


def test_a_stopped_rank_ends_the_trial_and_shows_its_stacks(submit):
    job = submit(EXTRA_PARAMS=NEVER, NUMEPOCHS=500)
    job.until_step()
    began = time.monotonic()
    os.kill(job.program(1), signal.SIGSTOP)
    assert job.wait(75) != 0
    assert time.monotonic() - began < 65  # a minute, and the end of the job
    said = job.said()
    assert re.search(r"trial ended .*rank 1 .*n1.*no sign of life", said), said
    assert "SIGKILL" not in said and "run.sub killed the ranks that had not ended" in said
    assert len(re.findall(r"^  File .*, line \d+ in ", job.rank(1), re.MULTILINE)) > 10, "stacks of the stopped rank"
    assert job.status() == "aborted"


def test_a_hanging_rank_is_named_and_all_stacks_are_kept(submit, data, tmp_path):
    own = tmp_path / "hanging data"
    shutil.copytree(data, own)
    for image in sorted((own / "train").glob("*.jpg"))[:4]:
        image.unlink()
        os.mkfifo(image)  # a read that never returns, as on a dead file server
    job = submit(EXTRA_PARAMS=NEVER, NUMEPOCHS=500, DATADIR=own, HANG_MONITOR_TIMEOUT=15)
    assert job.wait(150) == 6
    said = job.said()
    assert "stood still for 15 s" in said and "waiting for data" in said, said
    for rank in range(4):
        assert "detcore/training/engine.py" in (job.trial() / f"stacks_rank{rank}.txt").read_text()
    assert job.status() == "aborted"


def ask_for_stacks(job) -> None:
    """As docs/cluster.md says. Under proctrack/cgroup the signal reaches run_and_time.sh alone, as on most clusters."""
    listed = job.cluster.run("squeue", "--noheader", "--steps", f"--jobs={job.id}", "--format=%i %j").stdout
    steps = dict(line.split() for line in listed.splitlines())
    training = next(step for step, name in steps.items() if name == "trial_1")
    job.cluster.run("scancel", "--signal=QUIT", training)
    job.until(lambda: all("most recent call first" in job.rank(rank) for rank in range(4)), "stacks of every rank", 30)
    steps = (job.trial() / "progress.jsonl").read_text().count('"kind": "step"')
    job.until_step(steps + 3)  # it goes on


def cut(cluster, node: str, declared: bool) -> None:
    """A power cut; `declared`: Slurm has found out, as it does after SlurmdTimeout (300 s)."""
    cluster.power_off(node)
    if declared:
        cluster.set_node(node, "down")


def bring_back(cluster, node: str, job) -> None:
    """The node starts again, and so does the job at once."""
    cluster.power_on(node)
    deadline = time.monotonic() + 90
    while not cluster.node_state(node).startswith("IDLE") and time.monotonic() < deadline:
        if cluster.node_state(node).startswith("DOWN"):  # else its slurmd has brought it back by itself
            cluster.run("scontrol", "update", f"NodeName={node}", "State=resume", check=False)
        time.sleep(0.5)
    cluster.requeue_now(job.id, 60)


def test_each_lost_node_ends_one_trial_and_the_next_start_makes_the_others(submit, cluster):
    job = submit(EXTRA_PARAMS=NEVER, NUMEPOCHS=500, NEXP=3)
    job.until_step()
    cut(cluster, "n1", declared=True)  # with the batch script
    bring_back(cluster, "n1", job)
    job.until_step(k=2)
    assert (job.trial(1) / "exit_code").read_text() == "143\n"
    assert "trial 1 ended with code 143 before this start of the job" in job.said()
    began = time.monotonic()
    cut(cluster, "n2", declared=False)
    job.until(lambda: "requeued after trial 2" in job.said(), "requeue", 120)
    assert time.monotonic() - began < 110
    said = job.said()
    assert (
        re.search(r"trial ended with exit code .*(n2|rank [23])", said) and "no answer from n2: a node is lost" in said
    )
    assert job.status(2) == "aborted"
    bring_back(cluster, "n2", job)
    job.until_step(k=3)
    assert "trial 2 ended with code" in job.said() and (job.trial(2) / "exit_code").read_text() not in ("0\n", "")


def test_with_requeue_the_trial_of_a_lost_node_is_resumed(submit, cluster):
    job = submit(EXTRA_PARAMS=NEVER, NUMEPOCHS=500, NEXP=3, REQUEUE=1)
    job.until(lambda: any(job.logs.glob("*_1/last.pt")), "checkpoint")
    for count, (node, declared) in enumerate([("n1", True), ("n2", False)], 1):
        cut(cluster, node, declared)
        job.until(lambda declared=declared: declared or "requeued after trial 1" in job.said(), "requeue", 120)
        bring_back(cluster, node, job)
        job.until(lambda count=count: job.said().count("_1.log --resume") == count, "resumed trial 1")
        steps = (job.trial() / "progress.jsonl").read_text().count('"kind": "step"')
        job.until_step(steps + 2)
    assert not (job.logs / f"{job.stem}_2").exists()


def test_stacks_of_a_running_job_and_scancel(submit):
    job = submit(EXTRA_PARAMS=NEVER, NUMEPOCHS=500, NEXP=2, REQUEUE=1)
    job.until_step()
    ask_for_stacks(job)
    job.cluster.run("scancel", job.id)
    job.wait(60)
    assert job.cluster.job(job.id)["JobState"] == "CANCELLED"
    assert job.status() == "aborted" and (job.trial() / "last.pt").exists()
    assert "Stopped by SIGTERM" in job.rank(0)
    assert "SIGTERM" in job.said() and "requeued" not in job.said()
    assert not (job.logs / f"{job.stem}_2").exists()


def test_time_limit(submit):
    job = submit("-t", "2", "--signal=B:USR1@60", EXTRA_PARAMS=NEVER, NUMEPOCHS=500, NEXP=2)
    assert job.wait(180) == 4, job.said()
    assert job.status() == "aborted" and (job.trial() / "last.pt").exists()
    assert "Stopped by SIGUSR1" in job.rank(0)
    assert not (job.logs / f"{job.stem}_2").exists()


def test_a_trial_over_its_time_does_not_stop_the_next(submit):
    job = submit(
        EXTRA_PARAMS=NEVER, NUMEPOCHS=500, NEXP=2, REQUEUE=1, config="true", BENCHMARK="single_stage_detector",
        DGXSYSTEM="x", DGXNNODES=2, DGXNGPU=2, WALLTIME_RUNANDTIME=1, BATCHSIZE=2,
    )  # fmt: skip
    job.until_step(k=2)
    assert (job.trial() / "exit_code").read_text() == "124\n"
    assert "took longer than WALLTIME_RUNANDTIME=1 minutes" in job.said() and "requeued" not in job.said()
    assert job.status() == "aborted"


def test_requeue_resumes_to_the_same_weights(submit):
    environ = {"EXTRA_PARAMS": SUCCESS.replace("-map 0", "-map none"), "NUMEPOCHS": 6, "SEED": 3}
    whole = submit(**environ)
    assert whole.wait() == 0, whole.said()
    job = submit(REQUEUE=1, **environ)
    job.until_step(steps=9)
    job.cluster.run("scancel", "--batch", "--signal=USR1", job.id)
    job.cluster.requeue_now(job.id, 90)
    assert job.wait() == 0, job.said()
    assert job.cluster.job(job.id)["Restarts"] == "1"
    text = job.rank(0)
    assert "Stopped by SIGUSR1" in text and "--resume" in job.said() and "requeued" in job.said()
    steps = [json.loads(line)["step"] for line in (job.trial() / "progress.jsonl").open() if '"step"' in line]
    assert max(steps) == 6 * 4
    ours, theirs = weights(job.trial()), weights(whole.trial())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_full_log_folder_is_said(submit_to, tmp_path):
    small = tmp_path / "small disk"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1100m", "tmpfs", small], check=True)
    try:
        with Cluster(tmp_path / "c") as cluster:  # its nodes see only mounts that were there before them
            submit = submit_to(cluster)
            job = submit(EXTRA_PARAMS=NEVER, NUMEPOCHS=500, LOGDIR=small)
            job.until_step(2)
            with contextlib.suppress(OSError), open(small / "other data", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**20))
            assert job.wait() != 0
            assert re.search(r"trial ended .*disk is full|No space left|disk.* full", job.said(), re.DOTALL), job.said()
            job = submit(LOGDIR=small / "next")
            assert job.wait() == 2
            assert re.search(r"small disk/next.*GiB", job.said()) and not list(small.glob("next/*_1")), job.said()
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_mistakes_are_said_before_anything_starts(submit, tmp_path):
    def refused(*words, **environ) -> str:
        job = submit(*words, **environ)
        assert job.wait(60) == 2, job.said()
        assert not any(job.logs.glob("*_1"))
        return job.said()

    said = refused("--export=NONE")
    assert "error: BENCHMARK DGXSYSTEM DGXNNODES DGXNGPU WALLTIME_RUNANDTIME missing: source configs" in said
    assert "error: CONT is missing" in said and "error: DATADIR is missing" in said
    assert "--export=NONE" in said and said.rstrip().endswith("nothing was started")
    assert "--lrr" in refused(EXTRA_PARAMS=f"{SUCCESS} --lrr 1") and "BATCHSIZE" in refused(BATCH_SIZE="4")
    assert "no such folder" in refused(DATADIR=tmp_path / "nowhere")
    assert "BACKBONE_DIR is missing" in refused(EXTRA_PARAMS=SUCCESS.replace("--no-pretrained", ""))
    assert "2 nodes" in refused(DGXNNODES=3, config="true", BENCHMARK="single_stage_detector", DGXSYSTEM="x", DGXNGPU=2,
                                WALLTIME_RUNANDTIME=5)  # fmt: skip
    assert "VERIFY_MOUNTS=all" in refused(VERIFY_MOUNTS="all")


def test_two_jobs_share_the_nodes(submit):
    words = ("--oversubscribe", "--mem=3000", "--ntasks-per-node=2")
    jobs = [submit(*words, NEXP=1) for _ in range(2)]
    jobs[1].until_step()
    jobs[0].until_step()
    assert [job.wait() for job in jobs] == [0, 0]


def test_no_permission_to_drop_caches_is_said_and_no_event_is_made_up(submit):
    job = submit(DROPCACHE_CMD="false", NUMEPOCHS=1)
    assert job.wait() == 0
    assert "warning: the page cache was not dropped" in job.said()
    assert "cache_clear" not in [event["key"] for event in job.events()]
    assert re.search(r"compliance .*cache_clear", job.said(), re.DOTALL)


def test_processes_are_tracked_by_cgroup(cluster):
    if NO_CGROUP:
        pytest.skip(NO_CGROUP)
    assert "proctrack/cgroup" in cluster.run("scontrol", "show", "config").stdout
    groups = cluster.run("srun", "-n1", "cat", "/proc/self/cgroup").stdout
    assert re.search(r":freezer:/slurm_n1/uid_\d+/job_\d+/step_\d+", groups), groups


def test_slurm_accepts_every_config(tmp_path):
    configs = sorted((ROOT / "configs").glob("config_*_*.sh"))
    exports = 'set -eu; source "$0"; echo $DGXNNODES $DGXNGPU'
    sizes = {path: subprocess.check_output(["bash", "-c", exports, path], text=True).split() for path in configs}
    count, gpus = (max(int(size[i]) for size in sizes.values()) for i in (0, 1))
    assert len(sizes) > 30
    with Cluster(tmp_path / "c", nodes=[f"n{i}" for i in range(1, count + 1)], gpus=gpus) as many:
        line = 'source "$0" && sbatch --test-only -N $DGXNNODES -t $WALLTIME --gpus-per-node=$DGXNGPU run.sub'
        for path in sizes:
            done = subprocess.run(
                ["bash", "-euc", line, path], env=many.env(), cwd=ROOT, capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0 and "to start at" in done.stderr, (path, done.stderr)
