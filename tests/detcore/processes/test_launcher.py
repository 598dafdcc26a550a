"""The process' place from each launcher's variables, and what is said about variables that cannot be right."""

import pytest

from detcore import UserError
from detcore.processes.launcher import World, discover


def torchrun(rank=1, size=4, local=1, **more):
    values = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local, "MASTER_ADDR": "h0", "MASTER_PORT": 1234, **more}
    return {name: str(value) for name, value in values.items() if value is not None}


def slurm(rank=5, size=8, local=1, **more):
    values = {"SLURM_PROCID": rank, "SLURM_NTASKS": size, "SLURM_LOCALID": local, "SLURM_STEP_ID": 0,
              "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_NODEID": 1, "SLURM_NODELIST": "n[1-2]", **more}  # fmt: skip
    return {name: str(value) for name, value in values.items() if value is not None}


def ompi(rank=1, size=2, local=1, local_size=2):
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    return {f"OMPI_COMM_WORLD_{n}": str(v) for n, v in zip(names, (rank, size, local, local_size), strict=True)}


@pytest.mark.parametrize(
    "environ, expected",
    [
        ({}, (World(0, 1, 0, 1), 29500)),
        ({"SLURM_NTASKS": "8"}, (World(0, 1, 0, 1), 29500)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (World(0, 1, 0, 1), 29500)),
        (torchrun(0, 1, 0, MASTER_ADDR=None, MASTER_PORT=None), (World(0, 1, 0, 1), 29500)),
        (torchrun(LOCAL_WORLD_SIZE=2), (World(1, 4, 1, 2, "h0"), 1234)),
        (torchrun(), (World(1, 4, 1, 4, "h0"), 1234)),
        ({**slurm(SLURM_STEP_TASKS_PER_NODE="2(x2)"), **torchrun()}, (World(1, 4, 1, 2, "h0"), 1234)),
        (slurm(MASTER_ADDR="m", MASTER_PORT=7), (World(5, 8, 1, 4, "m"), 7)),
        (slurm(MASTER_ADDR="m"), (World(5, 8, 1, 4, "m"), 29500)),
        (slurm(SLURM_NODELIST="n1,n2"), (World(5, 8, 1, 4, "n1"), 29500)),
        (slurm(6, 7, 2, SLURM_STEP_TASKS_PER_NODE="4,3", MASTER_ADDR="m"), (World(6, 7, 2, 3, "m"), 29500)),
        (slurm(1, 2, 1, SLURM_STEP_TASKS_PER_NODE="2", SLURM_NODEID=0), (World(1, 2, 1, 2, "127.0.0.1"), 29500)),
        (slurm(0, 1, 0, SLURM_STEP_TASKS_PER_NODE="1", SLURM_NODEID=0), (World(0, 1, 0, 1), 29500)),
        (ompi(), (World(1, 2, 1, 2, "127.0.0.1"), 29500)),
        ({**ompi(3, 4), "MASTER_ADDR": "m"}, (World(3, 4, 1, 2, "m"), 29500)),
    ],
)
def test_place_from_the_launchers_variables(environ, expected):
    assert discover(environ) == expected


@pytest.mark.parametrize(
    "environ, words",
    [
        (torchrun(rank=None), ["RANK missing"]),
        (torchrun(size=None, local=None), ["WORLD_SIZE, LOCAL_RANK missing"]),
        (torchrun(MASTER_PORT=None), ["MASTER_PORT"]),
        (torchrun(MASTER_ADDR=None, LOCAL_WORLD_SIZE=2), ["MASTER_ADDR"]),
        (torchrun(rank=4), ["RANK=4", "WORLD_SIZE=4"]),
        (torchrun(local=2, LOCAL_WORLD_SIZE=2), ["LOCAL_RANK=2", "2 processes on this host"]),
        (torchrun(LOCAL_WORLD_SIZE=8), ["contradict"]),
        (torchrun(rank="x"), ["RANK='x'"]),
        (torchrun(rank=-1), ["RANK='-1'"]),
        (torchrun(MASTER_PORT="p"), ["MASTER_PORT='p'"]),
        (slurm(local=None), ["SLURM_LOCALID missing"]),
        (slurm(SLURM_STEP_ID=None), ["SLURM_STEP_ID", "without srun"]),
        (slurm(rank=9), ["SLURM_PROCID=9"]),
        (ompi(1, 2, 1, 1), ["OMPI_COMM_WORLD_LOCAL_RANK=1"]),
        (ompi(3, 4), ["MASTER_ADDR"]),
    ],
)
def test_missing_and_contradictory_variables_are_named(environ, words):
    with pytest.raises(UserError) as caught:
        discover(environ)
    for word in words:
        assert word in str(caught.value)


def test_first_host_from_scontrol(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="MASTER_ADDR"):
        monkeypatch.setenv("PATH", "")
        discover(slurm())
    command = tmp_path / "scontrol"
    command.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert discover(slurm())[0].master == "n1"
