"""The system description: facts from made-up nodes, the official checker, what a person may say."""

import importlib
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mlperf_logging.system_desc_checker.system_desc_checker import check_system_desc

from detcore import UserError

ROOT = Path(__file__).resolve().parents[2]
FILLED = {
    "submitter": "Org", "system_name": "2x node", "host_networking_topology": "one switch", "cooling": "air",
    "host_memory_configuration": "32x 64 GB", "host_processor_interconnect": "UPI",
    "accelerator_memory_configuration": "HBM3",
}  # fmt: skip
SMI = """#!/bin/bash
case "$*" in
*driver_version\\ *) echo 580.1; exit;;
*--query-gpu=name*) for i in 0 1; do echo "NVIDIA H100 80GB HBM3, 81559, 580.1, 1980, 5, [N/A]"; done ;;
*topo*) printf '\\t\\e[4mGPU0\\tGPU1\\tNIC0\\tCPU Affinity\\e[0m\\nGPU0\\t X \\t%s\\tPIX\\t0-9\\n' LINK
    printf 'GPU1\\t%s\\t X \\tSYS\\t0-9\\n' LINK
    printf 'NIC0\\tPIX\\tSYS\\t X \\n\\nLegend:\\n  X    = Self\\n' ;;
esac
"""


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT / "tools"))
    yield importlib.import_module("system_description")
    sys.path.remove(str(ROOT / "tools"))


@pytest.fixture
def node(tmp_path) -> Path:
    """/proc, /sys and /etc of a machine of two sockets of two cores of two threads."""
    files = {
        "proc/cpuinfo": "processor : 0\nmodel name\t: Some CPU @ 2.00GHz\n",
        "proc/meminfo": "MemTotal:       2113000000 kB\n",
        "etc/os-release": 'NAME=Ubuntu\nPRETTY_NAME="Ubuntu 24.04"\n',
        "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "3800000",
        "sys/block/nvme0n1/size": "7501476528", "sys/block/nvme0n1/queue/rotational": "0",
        "sys/block/nvme1n1/size": "7501476528", "sys/block/nvme1n1/queue/rotational": "0",
        "sys/block/sda/size": "1000000000", "sys/block/sda/queue/rotational": "1",
        "sys/block/loop0/size": "99", "sys/block/sdb/size": "0",
        "sys/class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE",
        "sys/class/infiniband/mlx5_0/ports/1/rate": "400 Gb/sec (4X NDR)",
        "sys/class/infiniband/mlx5_0/ports/1/link_layer": "InfiniBand",
        "sys/class/infiniband/mlx5_1/ports/1/state": "1: DOWN",
        "sys/class/net/lo/operstate": "unknown",
        "sys/class/net/eth0/operstate": "up", "sys/class/net/eth0/speed": "100000", "sys/class/net/eth0/type": "1",
        "sys/class/net/ib0/operstate": "up", "sys/class/net/ib0/type": "32",
    }  # fmt: skip
    for i, (kind, level, size) in enumerate([("Data", 1, "48K"), ("Instruction", 1, "32K"), ("Unified", 2, "2M")]):
        base = f"sys/devices/system/cpu/cpu0/cache/index{i}"
        files |= {f"{base}/type": kind, f"{base}/level": str(level), f"{base}/size": size}
    for cpu in range(8):
        base = f"sys/devices/system/cpu/cpu{cpu}/topology"
        files |= {f"{base}/physical_package_id": str(cpu // 2 % 2), f"{base}/core_id": str(cpu % 2)}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "drivers/mlx5_core").mkdir(parents=True)
    for name in ("eth0", "ib0"):
        (tmp_path / f"sys/class/net/{name}/device").mkdir()
        (tmp_path / f"sys/class/net/{name}/device/driver").symlink_to(tmp_path / "drivers/mlx5_core")
    return tmp_path


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts an nvidia-smi with two GPUs, linked as given, onto the PATH."""

    def install(link: str) -> None:
        program = tmp_path / "bin/nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(SMI.replace("LINK", link))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    return install


def check(path: Path) -> bool:
    return check_system_desc(str(path), "training", "5.1.0")[0]


def test_a_node_described(tool, node, smi):
    smi("NV18")
    description, differences = tool.merge([tool.collect(node)] * 2, {}, environ={"MLPERF_SUBMISSION_ORG": "Org"})
    assert differences == []
    expected = {
        "submitter": "Org", "division": "closed", "status": "Available on-premise", "number_of_nodes": "2",
        "host_processors_per_node": "2", "host_processor_core_count": "2", "host_processor_vcpu_count": "4",
        "host_processor_model_name": "Some CPU @ 2.00GHz", "host_processor_frequency": "3800 MHz",
        "host_processor_caches": "L1d 48K, L1i 32K, L2 2M", "host_memory_capacity": "2015 GiB",
        "host_storage_type": "NVMe SSD, hard disk",
        "host_storage_capacity": "2x 3841 GB NVMe SSD, 1x 512 GB hard disk",
        "host_networking": "1x InfiniBand RDMA 400 Gb/sec (4X NDR), 1x Ethernet 100 Gb/s (mlx5_core)",
        "accelerators_per_node": "2", "accelerator_model_name": "NVIDIA H100 80GB HBM3",
        "accelerator_memory_capacity": "80 GiB", "accelerator_memory_configuration": "HBM3",
        "accelerator_frequency": "1980 MHz", "accelerator_interconnect": "NVLink, 18 links a GPU",
        "accelerator_interconnect_topology": "all to all (NV18)", "operating_system": "Ubuntu 24.04",
    }  # fmt: skip
    assert {name: description[name] for name in expected} == expected
    assert description["other_software_stack"]["driver"] == "580.1"
    unknown = {name for name, text in description.items() if str(text).startswith(tool.PLACEHOLDER)}
    assert unknown >= {"system_name", "cooling", "host_processor_interconnect", "accelerator_host_interconnect"}


def test_gpus_behind_pcie(tool, node, smi):
    smi("SYS")
    facts = tool.collect(node)
    assert facts["gpu_links"] == ["PCIe", "mixed: SYS (names of nvidia-smi topo -m)"]
    # Where a rank's share of the node shows one GPU, the ranks together know better.
    facts["gpus"] = facts["gpus"][:1]
    assert tool.merge([facts], {}, gpus_seen=8, environ={})[0]["accelerators_per_node"] == "8"


def test_nothing_can_be_read(tool, tmp_path):
    description, _ = tool.merge([tool.collect(tmp_path / "nowhere")], {}, environ={})
    assert list(description) == list(tool.FIELDS) and len(description) == 33
    for name in (
        "host_processor_core_count",
        "host_memory_capacity",
        "host_networking",
        "operating_system",
        "submitter",
    ):
        assert description[name] == tool.PLACEHOLDER + tool.FIELDS[name]


def test_the_official_checker_accepts_it_filled(tool, node, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    (tmp_path / "values.json").write_text(json.dumps({**FILLED, "host_processors_per_node": 2}))
    values = tool.read_values(tmp_path / "values.json")
    assert values["host_processors_per_node"] == "2"
    description, _ = tool.merge([tool.collect(node)], values, environ={})
    tool.write(tmp_path / "system.json", description)
    assert check(tmp_path / "system.json"), caplog.text
    assert not any(str(text).startswith(tool.PLACEHOLDER) for text in description.values())
    for name in tool.FIELDS:  # each one is needed
        (tmp_path / "less.json").write_text(json.dumps({k: v for k, v in description.items() if k != name}))
        assert not check(tmp_path / "less.json")
    # A status that nobody gave is a placeholder, which the official checker refuses as well.
    description, _ = tool.merge([tool.collect(node)], FILLED, environ={"MLPERF_STATUS": "?"})
    tool.write(tmp_path / "system.json", description)
    assert description["status"].startswith(tool.PLACEHOLDER) and not check(tmp_path / "system.json")


def test_names_from_the_environment(tool, node):
    def named(**environ: str) -> list[str]:
        return [
            tool.merge([tool.collect(node)], {}, environ=environ)[0][k] for k in ("submitter", "system_name", "status")
        ]

    wanted = [tool.PLACEHOLDER + tool.FIELDS[name] for name in ("submitter", "system_name")]
    assert named(MLPERF_SUBMISSION_ORG="unset", MLPERF_SYSTEM_NAME="unknown") == [*wanted, "Available on-premise"]
    assert named(MLPERF_SUBMISSION_ORG="SUBMISSION_ORG_PLACEHOLDER")[0] == wanted[0]
    assert named(DGXSYSTEM="DGXA100_001x08x032", MLPERF_STATUS="cloud")[1:] == ["DGXA100_001x08x032", "Available cloud"]
    assert named(DGXSYSTEM="a", MLPERF_SYSTEM_NAME="b")[1] == "b"


def test_nodes_that_differ(tool, node):
    first = {**tool.collect(node), "host": "n1"}
    second = {**first, "host": "n2", "memory": "1 GiB"}
    description, differences = tool.merge([first, second], {}, environ={})
    assert differences == ["n2 differs from n1: memory is 1 GiB, there 2015 GiB"]
    assert description["hw_notes"] == differences[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"colling": "air"}', "no field 'colling', did you mean 'cooling'"),
        ('{"status": "onprem"}', "status is 'onprem', expected one of: Available on-premise; "),
        ('{"division": "Closed"}', "division is 'Closed', expected one of: closed; open"),
        ('{"cooling": ["air"]}', r'cooling is \["air"\], expected a string'),
        ('{"cooling": true}', "cooling is true"),
        ("[1]", "one JSON object"),
        ("{", "is not JSON"),
    ],
)
def test_values_that_are_wrong(tool, tmp_path, text, message):
    (tmp_path / "v.json").write_text(text)
    with pytest.raises(UserError, match=f"v.json.* {message}"):
        tool.read_values(tmp_path / "v.json")
    with pytest.raises(UserError, match="can't be read"):
        tool.read_values(tmp_path / "nowhere.json")


def test_the_program(tool, tmp_path):
    (tmp_path / "v.json").write_text('{"cooling": "liquid"}')
    environ = {**os.environ, "SYSTEM_DESCRIPTION": str(tmp_path / "v.json")}
    command = [sys.executable, str(ROOT / "tools/system_description.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=120)
    assert done.returncode == 0
    description = json.loads(done.stdout)
    assert description["cooling"] == "liquid" and description["framework"].startswith("PyTorch 2.")
    assert re.search(r"^note: to be filled in with --values: .*host_networking_topology", done.stderr, re.MULTILINE)
    done = subprocess.run([*command, "--out", str(tmp_path / "no/s.json")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "can't be written" in done.stderr and "Traceback" not in done.stderr
