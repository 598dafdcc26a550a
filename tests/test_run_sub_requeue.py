"""run.sub with stand-ins for Slurm: which ends of a start ask for another (lost nodes, time limits, preemptions).

With a real Slurm: tests/slurm.
"""

import os
import re
import subprocess

import pytest

from tests.test_run_sub import ROOT
from tests.test_run_sub_slurm import make_slurm

NOT_PREEMPTED = "   JobState=RUNNING Reason=None\n   PreemptTime=None\n"
PREEMPTED = NOT_PREEMPTED.replace("PreemptTime=None", "PreemptTime=2025-01-01T00:00:00")
PREEMPT = f"printf '%s' '{PREEMPTED}' >$NOTES/job;"


@pytest.fixture
def slurm(tmp_path):
    return make_slurm(tmp_path)


def test_a_lost_node_ends_one_trial_and_the_job_goes_on_with_others(slurm):
    code, said = slurm.run(NEXP="3", CODES="6 0 0", DURING="echo n2 >$NOTES/lost")
    assert code == 6 and "requeued after trial 1 (code 6)" in said and "no answer from n2: a node is lost" in said
    assert (slurm.notes / "requeued").read_text() == "7\n" and (slurm.logs / "S_1/exit_code").read_text() == "6\n"
    assert "no further trial" not in said and not (slurm.logs / "S_2").exists()
    (slurm.notes / "lost").unlink()
    code, said = slurm.run(NEXP="3", CODES="6 0 0", SLURM_RESTART_COUNT="1")
    assert code == 6 and "trial 1 ended with code 6 before" in said
    assert [(slurm.logs / f"S_{k}/exit_code").read_text() for k in (1, 2, 3)] == ["6\n", "0\n", "0\n"]


def test_where_all_nodes_are_silent_they_are_asked_once_more(slurm):
    """Also the first, on which run.sub runs: then it was Slurm that did not answer."""
    sleep = slurm.notes.parent / "bin/sleep"
    sleep.write_text('#!/bin/bash\n[[ $1 != 10 ]] || rm "$NOTES/lost"\nexec /bin/sleep 0.1\n')
    sleep.chmod(0o755)
    code, said = slurm.run(NEXP="2", CODES="6 0", DURING="[[ $RESULT_INDEX == 1 ]] || echo all >$NOTES/lost")
    assert code == 6 and "no answer from" not in said and not (slurm.notes / "lost").exists(), said
    assert (slurm.logs / "S_2/exit_code").read_text() == "0\n" and not (slurm.notes / "requeued").exists()


@pytest.mark.parametrize("more, kept", [({}, "6\n"), ({"REQUEUE": "1"}, "4\n")])
def test_where_slurm_does_not_requeue_the_way_to_go_on_is_said(slurm, more, kept):
    (slurm.notes / "refuses").touch()
    code, said = slurm.run(NEXP="3", CODES="6 0 0", DURING="echo n2 >$NOTES/lost", **more)
    assert code == 6 and "requeued after" not in said and "this site does not requeue" in said
    assert "no further trial: no answer from n2" in said and "go on with: RESUME=1 DATESTAMP=S ... sbatch" in said
    assert (slurm.logs / "S_1/exit_code").read_text() == kept, "4: RESUME=1 makes the rest of it"


@pytest.mark.parametrize("trials, code, requeued", [("1", 0, False), ("2", 0, True), ("1", 4, True)])
def test_a_time_limit_requeues_only_what_is_left(slurm, trials, code, requeued):
    """USR1 comes while the last trial succeeds, while one succeeds before another, and before one has its target."""
    stops = 'kill -USR1 "$(ps -o ppid= -p "$PPID" | tr -d " ")"; read -rt 2 <> <(:)'
    ended, said = slurm.run(NEXP=trials, CODES=f"{code} 0", DURING=stops, REQUEUE="1")
    assert ended == code and (slurm.notes / "requeued").exists() == requeued, said
    assert (slurm.logs / "S_1/exit_code").read_text() == f"{code}\n"
    assert ("requeued after trial 1" in said) == requeued and "no further trial" not in said


def test_after_the_last_trial_no_node_is_missed(slurm):
    code, said = slurm.run(CODES="6", DURING="echo n2 >$NOTES/lost")
    assert code == 6 and "no answer from n2" in said and not (slurm.notes / "requeued").exists()


def test_a_trial_that_slurm_has_interrupted_is_resumed_or_counted(slurm):
    assert slurm.run(NEXP="2", CODES="0 0")[0] == 0
    (slurm.logs / "S_2/exit_code").unlink()
    (slurm.logs / "S_2/last.pt").touch()
    (slurm.logs / "S_2/srun.log").write_text("srun: error: Node failure on n1\n")
    code, said = slurm.run(NEXP="2", SLURM_RESTART_COUNT="1", REQUEUE="1")
    assert code == 0 and "S_2.log --resume" in said
    (slurm.logs / "S_2/exit_code").unlink()
    code, said = slurm.run(NEXP="2", SLURM_RESTART_COUNT="1")
    assert (
        code == 143
        and "code 143 before this start of the job: interrupted by Slurm (srun: error: Node failure on n1)" in said
    )
    assert "sacct -D -j 7" in (slurm.logs / "S_2/interrupted.txt").read_text()


def test_no_trial_starts_after_a_signal(slurm):
    """It comes while the caches are dropped."""
    drop = slurm.notes.parent / "bin/drop"
    drop.write_text("#!/bin/bash\n[[ ! -e $LOGDIR/S_1 ]] || kill -USR1 $PPID\n")
    drop.chmod(0o755)
    code, said = slurm.run(DROPCACHE_CMD="drop", NEXP="2")
    assert code == 4 and "no further trial: stopped by SIGUSR1" in said and not (slurm.notes / "env_0").exists(), said
    assert (slurm.logs / "S_1/exit_code").read_text() == "4\n" and "--job-name" not in (
        slurm.notes / "srun"
    ).read_text()


@pytest.mark.parametrize("preempted", [True, False])
def test_a_preemption_with_grace_time_is_a_stop_to_be_resumed(slurm, preempted):
    """TERM reaches a job that runs on, because of a preemption or because somebody signals its steps."""
    (slurm.notes / "job").write_text(NOT_PREEMPTED)
    stops = 'kill -TERM "$(ps -o ppid= -p "$PPID" | tr -d " ")"; read -rt 2 <> <(:)'
    stops = PREEMPT + stops if preempted else stops
    code, said = slurm.run(NEXP="2", CODES="4 0", DURING=stops)
    assert code == 4 and (slurm.notes / "requeued").exists() == preempted, said
    assert ("Slurm's preemption: every rank writes a checkpoint" in said) == preempted
    assert ("requeued after trial 1 (code 4)" if preempted else "no further trial: stopped by SIGTERM") in said


@pytest.mark.parametrize(
    "trials, more, preempted, requeued",
    [
        ("1", {"REQUEUE": "1"}, True, True),  # the last trial is to be resumed
        ("1", {"REQUEUE": "1"}, False, True),  # somebody has signalled the step
        ("2", {}, True, True),  # others are left
        ("2", {}, False, False),
        ("1", {}, True, False),
    ],
)
def test_where_the_ranks_alone_are_asked_to_stop(slurm, trials, more, preempted, requeued):
    """As a real preemption with GraceTime does: the ranks end with code 4 and run.sub gets no signal."""
    (slurm.notes / "job").write_text(NOT_PREEMPTED)
    code, said = slurm.run(NEXP=trials, CODES="4 0", DURING=PREEMPT if preempted else "", **more)
    assert code == 4 and (slurm.notes / "requeued").exists() == requeued, said
    assert ("requeued after trial 1 (code 4); the job goes on when it starts again" in said) == requeued
    why = "stopped by Slurm's preemption" if preempted else "the ranks were asked to stop"
    assert (f"no further trial: {why}" in said) == (not requeued) and "SIG" not in said


@pytest.mark.parametrize("refuses", [False, True])
def test_a_preemption_before_the_first_trial(slurm, refuses):
    """Its signal ends the step of the preflight; nothing is lost, so that the job starts again, whatever REQUEUE is."""
    (slurm.notes / "job").write_text(PREEMPTED)
    if refuses:
        (slurm.notes / "refuses").touch()
    code, said = slurm.run(PREFLIGHT="143")
    assert code == 2 and (slurm.notes / "requeued").read_text() == "7\n" and not (slurm.logs / "S_1").exists()
    if refuses:
        assert "site does not requeue" in said and "stopped by Slurm's preemption, so the preflight found" in said, said
    else:
        assert "requeued before the first trial; the job goes on when it starts again: Slurm's preemption" in said, said
        assert "error" not in said


@pytest.mark.parametrize("refuses", [False, True])
def test_a_preemption_while_no_step_runs(slurm, refuses):
    """It comes between two trials, where its signal finds nobody."""
    (slurm.notes / "job").write_text(NOT_PREEMPTED)
    if refuses:
        (slurm.notes / "refuses").touch()
    code, said = slurm.run(NEXP="2", DURING=PREEMPT)
    assert code == (1 if refuses else 4) and (slurm.logs / "S_1/exit_code").read_text() == "0\n", said
    assert not (slurm.logs / "S_2").exists() and (slurm.notes / "requeued").read_text() == "7\n"
    assert ("requeued before trial 2; the job goes on" in said) != refuses
    assert ("no further trial: stopped by Slurm's preemption" in said and "RESUME=1" in said) == refuses


def test_a_job_that_is_cancelled_while_a_lost_node_is_looked_for_is_not_requeued(slurm):
    during = 'ps -o ppid= -p "$PPID" >$NOTES/late; echo n2 >$NOTES/lost'
    code, said = slurm.run(NEXP="3", CODES="6 0 0", DURING=during)
    assert code == 4 and not (slurm.notes / "requeued").exists(), said
    assert "no further trial: stopped by SIGTERM" in said


def test_containers_stay_in_the_grace_time_of_a_preemption(slurm):
    text = (ROOT / "configs/steps.sh").read_text()
    remover = re.search(r"^remover='(.*?)'$", text, re.MULTILINE | re.DOTALL)[1].replace("read -rt 3", "read -rt 0.1")
    squeue = """#!/bin/bash
    echo "$*" >>"$NOTES/squeue"
    [[ $(wc -l <"$NOTES/squeue") -gt 3 ]] || echo RUNNING
    [[ ! -e $NOTES/enroot ]] || echo early >>"$NOTES/squeue"
    """
    (slurm.notes.parent / "bin/squeue").write_text(squeue.replace("    ", ""))
    remover = remover.replace("\nread -r\n", "\nkill -TERM $$\nread -r\n")
    read, write = os.pipe()
    environ = slurm.environ | {"SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "-c", remover, "pyxis_x", "1"], stdin=read, env=environ, timeout=30)
    os.close(read)
    os.close(write)
    assert done.returncode == 0 and (slurm.notes / "squeue").read_text() == "-ho %T -j 7\n" * 4
    assert (slurm.notes / "enroot").read_text() == "remove -f pyxis_x \n"


def test_losing_the_first_node_is_left_to_slurm():
    options = [line.split()[1] for line in (ROOT / "run.sub").read_text().splitlines() if line.startswith("#SBATCH")]
    assert "--no-kill" not in options and "--requeue" in options
