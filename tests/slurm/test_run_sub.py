"""run.sub on a real Slurm of two nodes: trials that succeed, and mistakes. Failures: test_faults.py, test_stops.py.

Every path has a space. The model is tiny and the data 64 scenes, so that an epoch of 2 x 2 ranks takes a second or two.
"""

import os
import re
import subprocess

import pytest
import torch

from tests.slurm.cluster import Cluster
from tests.slurm.configuration import NO_CGROUP
from tests.slurm.jobs import ROOT, SHARED, SUCCESS, weights

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm"), cpus=8) as running:
        yield running


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


def test_two_jobs_share_the_nodes_one_of_ssd300_and_one_that_may_not_drop_caches(submit):
    words = "--dataset custom --backbone resnet18 --no-pretrained --optimizer adam --max-boxes 32 --augmentation flip "
    config = "source configs/config_ssd300_cpu_demo.sh; export DGXNNODES=2 DGXNGPU=2"
    words += "--evaluation 0 --workers 1 --device cpu --target-map 0 "
    words += "--save {output}/checkpoints --json-summary {output}/summary.json"
    job = submit(*SHARED, config=config, EXTRA_PARAMS=words, BATCHSIZE=4, NUMEPOCHS=1)
    other = submit(*SHARED, DROPCACHE_CMD="false", NUMEPOCHS=1)
    job.until(lambda: job.cluster.job(other.id)["JobState"] == "RUNNING", "second job beside it")
    assert job.wait() == 0, job.said()
    assert other.wait() == 0, other.said()
    assert (job.trial() / "checkpoints/epoch_0.pt").is_file() and (job.trial() / "summary.json").is_file()
    values = {event["key"]: event["value"] for event in job.events()}
    assert values["submission_benchmark"] == "ssd300" and values["global_batch_size"] == 16
    assert values["opt_base_learning_rate"] == pytest.approx(0.004 * 16 / 32)
    assert job.status() == "success" and values["train_samples"] == 64 and values["eval_samples"] == 16
    assert re.search(r"^events of .*rules_ssd300.yaml .*: SUCCESS$", job.said(), re.MULTILINE), job.said()

    assert "warning: the page cache was not dropped" in other.said()
    assert "cache_clear" not in [event["key"] for event in other.events()]
    assert re.search(r"compliance .*cache_clear", other.said(), re.DOTALL)


def test_mask_rcnn_reaches_both_targets_on_two_nodes(submit):
    config = "source configs/config_maskrcnn_cpu_demo.sh; export DGXNNODES=2 DGXNGPU=2"
    words = (
        "--config-file maskrcnn/recipes/cpu_demo.yaml --dataset custom --no-pretrained --workers 0 --max-boxes 32 "
        "--device cpu MIN_BBOX_MAP 0 MIN_MASK_MAP 0 INPUT.MIN_SIZE_TRAIN 64 INPUT.MAX_SIZE_TRAIN 96 "
        "INPUT.MIN_SIZE_TEST 64 INPUT.MAX_SIZE_TEST 96 MODEL.BACKBONE.OUT_CHANNELS 16"
    )
    job = submit(config=config, EXTRA_PARAMS=words, BATCHSIZE=4, EVALBATCHSIZE=4)
    assert job.wait() == 0, job.said()
    values = {event["key"]: event["value"] for event in job.events()}
    assert values["submission_benchmark"] == "maskrcnn" and values["global_batch_size"] == 16
    assert values["eval_accuracy"].keys() == {"BBOX", "SEGM"} and job.status() == "success"
    assert (job.trial() / "log.txt").read_text().count(" iter: ") and (job.trial() / "last_checkpoint").is_file()
    assert re.search(r"1 +success .* BBOX 0\.\d+ SEGM 0\.\d+", job.said()), job.said()


def test_mistakes_are_said_before_anything_starts(submit, tmp_path):
    def refused(*words, **environ) -> str:
        job = submit(*words, **environ)
        assert job.wait() == 2, job.said()
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
                ["bash", "-euc", line, path], env=many.env(), cwd=ROOT, capture_output=True, text=True, timeout=240
            )
            assert done.returncode == 0 and "to start at" in done.stderr, (path, done.stderr)
