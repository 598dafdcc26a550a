"""The background scorer: the same numbers, in order, and a clear end in every way that a process can end."""

import os
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from detcore import UserError
from detcore.evaluation.background import BackgroundEvaluator
from detcore.evaluation.coco import GroundTruth, evaluate

ROOT = Path(__file__).resolve().parents[3]
PATIENCE = 300.0  # seconds after which a test that waits for a process gives up; it may be a busy machine


def sample(seed=0, images=20, count=60, found=400):
    rng = np.random.default_rng(seed)
    box = rng.uniform(0, 100, (count, 4))
    truth = GroundTruth(
        np.arange(1, images + 1) * 3,
        np.array([2, 5, 90]),
        rng.integers(1, images + 1, count) * 3,
        rng.choice([2, 5, 90], count),
        box,
        box[:, 2] * box[:, 3],
        (rng.random(count) < 0.1).astype(np.uint8),
    )
    source = rng.integers(0, count, found)
    near = box[source] * rng.uniform(0.9, 1.1, (found, 4))
    score, category = rng.random(found), truth.ann_category_id[source]
    return truth, np.column_stack([truth.ann_image_id[source], near, score, category]).astype(np.float64)


@pytest.fixture(scope="module")
def case():
    return sample()


@pytest.fixture
def evaluator(case):
    with BackgroundEvaluator(case[0]) as evaluator:
        yield evaluator


def gone(pid):
    """No such process, or one that only waits for its parent to notice its end."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


def wait_until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "gave up waiting"
        time.sleep(0.02)


def test_wait_right_after_submit_equals_evaluate(case, evaluator):
    truth, detections = case
    wanted = evaluate(truth, detections, per_class=True)
    assert 0.1 < wanted["AP"] < 0.95
    pending = evaluator.submit(detections, per_class=True)
    assert pending.wait(PATIENCE) == wanted
    assert pending.wait() == pending.poll() == wanted
    assert "per_class" not in evaluator.submit(detections).wait(PATIENCE)


def test_poll_becomes_the_result(case, evaluator):
    truth, detections = case
    os.kill(evaluator.pid, signal.SIGSTOP)
    pending = evaluator.submit(detections)
    assert pending.poll() is None
    with pytest.raises(TimeoutError, match=r"0\.05 s"):
        pending.wait(timeout=0.05)
    os.kill(evaluator.pid, signal.SIGCONT)
    wait_until(lambda: pending.poll() is not None)
    assert pending.poll() == evaluate(truth, detections)


def test_several_submissions_asked_for_in_another_order(case, evaluator):
    truth, detections = case
    parts = [detections[:n] for n in (400, 0, 7, 133)]
    pendings = [evaluator.submit(part) for part in parts]
    assert [p.wait(PATIENCE) for p in reversed(pendings)] == [evaluate(truth, part) for part in reversed(parts)]


def test_a_changed_result_does_not_change_the_next(case, evaluator):
    pending = evaluator.submit(case[1])
    first = pending.wait(PATIENCE)
    ap = first.pop("AP")
    assert pending.wait()["AP"] == ap


def test_the_array_may_be_changed_after_submit(case, evaluator):
    truth, detections = case
    os.kill(evaluator.pid, signal.SIGSTOP)
    mine = np.asfortranarray(detections)
    pending = evaluator.submit(mine)
    mine[:] = np.nan
    os.kill(evaluator.pid, signal.SIGCONT)
    assert pending.wait(PATIENCE) == evaluate(truth, detections)


def test_submit_does_not_wait_for_a_busy_process(case, evaluator):
    # More than any pipe or socket holds, while nobody reads: a blocking hand-over would never return.
    truth, detections = case
    big = np.tile(detections, (100, 1))
    os.kill(evaluator.pid, signal.SIGSTOP)
    pendings = [evaluator.submit(big) for _ in range(4)]
    os.kill(evaluator.pid, signal.SIGCONT)
    results = [pending.wait(PATIENCE) for pending in pendings]
    assert results == [evaluate(truth, big)] * 4


def test_bad_detections_raise_for_their_submission_only(case, evaluator):
    truth, detections = case
    unknown = detections.copy()
    unknown[3, 0] = 1
    bad, good = evaluator.submit(unknown), evaluator.submit(detections)
    with pytest.raises(UserError, match="row 3 has image_id 1"):
        bad.wait(PATIENCE)
    with pytest.raises(UserError, match="row 3 has image_id 1"):
        bad.poll()
    assert good.wait(PATIENCE) == evaluate(truth, detections)
    with pytest.raises(ValueError, match=r"shape \(400, 6\)"):
        evaluator.submit(detections[:, :6])


def test_bad_ground_truth_raises_at_once(case):
    with pytest.raises(UserError, match="image_ids holds -4"):
        BackgroundEvaluator(case[0]._replace(image_ids=np.array([-4])))


def test_the_fallback_can_be_asked_for(case):
    truth, detections = case
    with BackgroundEvaluator(truth, backend="pycocotools") as evaluator:
        got = evaluator.submit(detections).wait(PATIENCE)
    assert got == pytest.approx(evaluate(truth, detections, backend="hotcoco"), abs=1e-9)


def test_an_unexpected_error_arrives_with_its_traceback(case):
    with (
        BackgroundEvaluator(case[0], backend="nonsense") as evaluator,
        pytest.raises(RuntimeError, match="ValueError: evaluation backend 'nonsense'"),
    ):
        evaluator.submit(case[1]).wait(PATIENCE)


@pytest.mark.parametrize(("number", "words"), [(signal.SIGKILL, "memory runs out"), (signal.SIGSEGV, "signal 11")])
def test_a_killed_process_is_reported(case, evaluator, number, words):
    done = evaluator.submit(case[1])
    result = done.wait(PATIENCE)
    os.kill(evaluator.pid, signal.SIGSTOP)
    lost = evaluator.submit(case[1])
    os.kill(evaluator.pid, number)
    os.kill(evaluator.pid, signal.SIGCONT)
    with pytest.raises(RuntimeError, match=f"died with exit code -{int(number)}: .*{words}"):
        lost.wait(PATIENCE)
    with pytest.raises(RuntimeError, match="died with exit code"):
        lost.poll()
    with pytest.raises(RuntimeError, match="died with exit code"):
        evaluator.submit(case[1])
    assert done.poll() == result
    evaluator.close()


def test_poll_alone_notices_a_death(case, evaluator):
    os.kill(evaluator.pid, signal.SIGSTOP)
    pending = evaluator.submit(case[1])
    os.kill(evaluator.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="exit code -9"):
        wait_until(lambda: pending.poll() is not None)


def test_submit_alone_notices_a_death(case, evaluator):
    os.kill(evaluator.pid, signal.SIGKILL)
    wait_until(lambda: gone(evaluator.pid))
    with pytest.raises(RuntimeError, match="exit code -9"):
        evaluator.submit(case[1])


def test_sigint_and_sigterm_do_not_reach_it(case):
    truth, detections = case
    with BackgroundEvaluator(truth) as evaluator:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # at its very start
            os.kill(evaluator.pid, number)
        first = evaluator.submit(detections).wait(PATIENCE)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(evaluator.pid, number)
        assert first == evaluator.submit(detections).wait(PATIENCE) == evaluate(truth, detections)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert not mask & {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


def test_close_ends_the_process_and_may_be_repeated(case):
    open_files = len(os.listdir("/proc/self/fd"))
    evaluator = BackgroundEvaluator(case[0])
    done = evaluator.submit(case[1])
    result = done.wait(PATIENCE)
    os.kill(evaluator.pid, signal.SIGSTOP)
    lost = evaluator.submit(case[1])
    for _ in range(2):
        evaluator.close()
        assert not Path(f"/proc/{evaluator.pid}").exists()
    assert done.poll() == result
    with pytest.raises(RuntimeError, match="closed"):
        lost.poll()
    with pytest.raises(RuntimeError, match="closed"):
        lost.wait()
    with pytest.raises(RuntimeError, match="closed"):
        evaluator.submit(case[1])
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_results_that_have_arrived_survive_close(case):
    evaluator = BackgroundEvaluator(case[0])
    pending = evaluator.submit(case[1])
    assert select.select([evaluator._socket], [], [], PATIENCE)[0]
    evaluator.close()
    assert pending.poll() == evaluate(*case)


def test_more_open_files_than_select_can_look_at(case):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip("no more than a thousand files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1050)]
    try:
        with BackgroundEvaluator(case[0]) as evaluator:
            assert evaluator.submit(case[1]).wait(PATIENCE) == evaluate(*case)
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


PARENT = """
import os, signal, sys, time
sys.path[:0] = [{root!r}, {here!r}]
import torch
from test_background import sample
from detcore.evaluation.background import BackgroundEvaluator

truth, detections = sample()
evaluator = BackgroundEvaluator(truth)
evaluator.submit(detections).wait()
print(evaluator.pid, "libtorch" in open(f"/proc/{{evaluator.pid}}/maps").read(), flush=True)
print(os.getpriority(os.PRIO_PROCESS, evaluator.pid), flush=True)
{end}
"""
SIBLING = """
sibling = os.fork()
if sibling == 0:
    os.close(1)
    time.sleep(1000)
print(sibling, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    "end", ["", "sys.exit(3)", "os.kill(os.getpid(), signal.SIGKILL)", SIBLING], ids=["end", "exit", "kill", "sibling"]
)
def test_it_ends_with_its_parent_and_never_loads_torch(end):
    script = PARENT.format(root=str(ROOT), here=str(Path(__file__).parent), end=end)
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=PATIENCE)
    pid, has_torch, priority, *sibling = done.stdout.split()
    try:
        wait_until(lambda: gone(int(pid)))
        assert (has_torch, priority) == ("False", "10")
    finally:
        for other in sibling:
            os.kill(int(other), signal.SIGKILL)
