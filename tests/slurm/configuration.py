"""What the daemons and the nodes of cluster.py are configured with, and what they leave behind."""

import contextlib
import os
import random
import socket
import sys
from pathlib import Path

PORTS = range(20000, 32000)  # below those that the kernel gives to outgoing connections
FREEZER = Path("/sys/fs/cgroup/freezer")
NO_CGROUP = "" if (FREEZER / "release_agent").exists() else f"no cgroup v1 at {FREEZER}: proctrack/linuxproc instead"

# FirstJobId: clusters side by side share the tree of cgroups, in which job ids must differ.
CONFIGURATION = """\
ClusterName=local
SlurmctldHost=localhost
SlurmctldPort={port}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}/tmp-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
ProctrackType=proctrack/{proctrack}
FirstJobId={port}
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait={kill_wait}
MinJobAge=3600
MailProg=/bin/true
PlugStackConfig={folder}/plugstack.conf
"""

CGROUP = """\
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
IgnoreSystemd=yes
ConstrainCores=no
ConstrainDevices=no
ConstrainRAMSpace=no
ConstrainSwapSpace=no
"""


# In the new namespaces of one node: $1 its name, $2 the cluster's folder, $3 a folder that other users can't enter and
# that this Python ($4) lies in, if there is one. bash stays the first process because it reaps orphans, which slurmd
# would not, and lives on where slurmd alone is killed.
BOOT = """
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
if [[ $3 ]]; then
    kept=$(mktemp -d)
    mount --bind "$4" "$kept"
    mount -t tmpfs -o mode=755 tmpfs "$3"
    mkdir -p "$4"
    mount --move "$kept" "$4"
    rmdir "$kept"
fi
if [[ -d $2/containers ]]; then
    mount -t tmpfs -o mode=1777 tmpfs "$2/containers"
    mount -t overlay -o "lowerdir=$2/bin:/usr/local/bin" overlay /usr/local/bin
fi
slurmd -D -N "$1" || (($? != 137)) || sleep infinity
exit
"""


def closed_python() -> tuple[str, str]:
    """(folder that only its owner may enter, the installation of this Python in it), or two empty words."""
    prefix = Path(sys.base_prefix).resolve()
    closed = [folder for folder in reversed(prefix.parents) if not folder.stat().st_mode & 0o001]
    return (str(closed[0]), str(prefix)) if closed else ("", "")


def remove_cgroups(jobs: range) -> None:
    """The cgroups that killed daemons have left of these jobs."""
    for job in FREEZER.glob("slurm*/uid_*/job_*"):
        if int(job.name.removeprefix("job_")) in jobs:
            for folder, *_ in os.walk(job, topdown=False):
                with contextlib.suppress(OSError):  # a process in it is still dying
                    os.rmdir(folder)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at this moment."""
    found: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"no {count} free ports between {PORTS.start} and {PORTS.stop}")
