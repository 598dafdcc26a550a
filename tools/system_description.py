"""Describes this machine for an MLPerf submission: the 33 fields of a system description, as JSON.

    python tools/system_description.py --values my_system.json --out system.json

What a program can't find out says "FILL IN: " and what is wanted; such fields belong into the file of --values, a JSON
object, whose fields win over what is found. `tools/preflight.py --system-json` does the same for all nodes of a job.
Variables: MLPERF_SUBMISSION_ORG, MLPERF_SYSTEM_NAME (else DGXSYSTEM), MLPERF_DIVISION, MLPERF_STATUS.
"""

import argparse
import difflib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from detcore import UserError
from detcore.cli import OK, run_main
from tools.submission.system import DIVISIONS, FIELDS, PLACEHOLDER, STATUS

_UNSET = ("", "unset", "unknown")
_VIRTUAL_DISKS = ("loop", "ram", "zram", "dm-", "md", "sr", "fd", "nbd")
_GPU_QUERY = ("name", "memory.total", "driver_version", "clocks.max.sm", "pcie.link.gen.max", "pcie.link.width.max")


def collect(root: Path = Path("/")) -> dict[str, Any]:
    """What this node tells about itself: facts by name, without those that can't be read. `root`: of /proc and /sys."""
    facts: dict[str, Any] = {"host": socket.gethostname()}
    facts |= _processors(root) | _memory(root) | _disks(root) | _network(root) | _gpus() | _software(root)
    return facts


def merge(
    nodes: list[dict[str, Any]],
    values: Mapping[str, Any],
    *,
    gpus_seen: int = 0,
    environ: Mapping[str, str] = os.environ,
) -> tuple[dict[str, Any], list[str]]:
    """The 33 fields for `nodes`, what `collect` said on each, the first one being described; and how others differ.

    `values` (see `read_values`) win. `gpus_seen`: GPUs a node that the ranks of a job use, in case that a job sees more
    than nvidia-smi does in one rank's share. What is not known is PLACEHOLDER and what is wanted.
    """
    facts = nodes[0]
    differences = [
        f"{other['host']} differs from {facts['host']}: {key} is {other.get(key)}, there {facts.get(key)}"
        for other in nodes[1:]
        for key in sorted((facts.keys() | other.keys()) - {"host"})
        if other.get(key) != facts.get(key)
    ]
    known = _from_environment(environ) | _host_fields(facts) | _accelerator_fields(facts, gpus_seen)
    known |= {
        "number_of_nodes": str(len(nodes)),
        "hw_notes": "; ".join(differences),
        "framework": f"PyTorch {facts['versions']['torch']}",
        "other_software_stack": {name: text for name, text in facts["versions"].items() if name != "torch"},
        "sw_notes": "",
    }
    if "os" in facts:
        known["operating_system"] = facts["os"]
    known |= values
    return {name: known.get(name, PLACEHOLDER + wanted) for name, wanted in FIELDS.items()} | {
        name: text for name, text in known.items() if name not in FIELDS
    }, differences


def read_values(path: Path) -> dict[str, Any]:
    """The fields that a person gives, numbers made strings. Raises `UserError` for what can't be one of FIELDS."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}; it should hold system description fields") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} should hold one JSON object of system description fields")
    allowed = {"division": DIVISIONS, "status": tuple(STATUS.values())}
    for name, value in found.items():
        if name not in (*FIELDS, "framework_name"):
            near = difflib.get_close_matches(name, FIELDS, 1)
            raise UserError(f"{path}: there is no field {name!r}{f', did you mean {near[0]!r}?' if near else ''}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = str(value)
        elif not (isinstance(value, str) or (name == "other_software_stack" and isinstance(value, dict))):
            raise UserError(f"{path}: {name} is {json.dumps(value)}, expected a string")
        if name in allowed and value not in allowed[name]:
            raise UserError(f"{path}: {name} is {value!r}, expected one of: {'; '.join(allowed[name])}")
    return found


def write(path: Path, description: Mapping[str, Any]) -> None:
    """Write the JSON, whole or not at all. Raises `UserError` where that fails."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        if part.exists():
            part.unlink()
        raise UserError(f"{path} can't be written: {error.strerror}; check the folder and its free space") from error


def _from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    status = environ.get("MLPERF_STATUS", "onprem")
    division = environ.get("MLPERF_DIVISION", "closed")
    found = {
        "submitter": environ.get("MLPERF_SUBMISSION_ORG", ""),
        "system_name": environ.get("MLPERF_SYSTEM_NAME", "unknown"),
        "division": division if division in DIVISIONS else "",
        "status": STATUS.get(status, ""),
    }
    if found["system_name"] in _UNSET:
        found["system_name"] = environ.get("DGXSYSTEM", "")
    return {name: text for name, text in found.items() if text not in _UNSET and "PLACEHOLDER" not in text}


def _host_fields(facts: dict[str, Any]) -> dict[str, str]:
    found = {
        "host_processor_model_name": facts.get("processor"),
        "host_processor_frequency": facts.get("processor_clock"),
        "host_processor_caches": facts.get("caches"),
        "host_memory_capacity": facts.get("memory"),
        "host_storage_type": facts.get("storage"),
        "host_storage_capacity": facts.get("storage_capacity"),
        "host_networking": facts.get("network"),
    }
    if sockets := facts.get("sockets"):
        found["host_processors_per_node"] = str(sockets)
        found["host_processor_core_count"] = str(facts["cores"] // sockets)
        found["host_processor_vcpu_count"] = str(facts["threads"] // sockets)
        if sockets == 1:
            found["host_processor_interconnect"] = "N/A, one processor"
    return {name: text for name, text in found.items() if text}


def _accelerator_fields(facts: dict[str, Any], gpus_seen: int) -> dict[str, str]:
    gpus = facts.get("gpus", [])
    count = max(len(gpus), gpus_seen)
    found = {"accelerators_per_node": str(count)}
    if count == 0:
        return found | {name: "N/A, no accelerator" for name in FIELDS if name.startswith("accelerator_")}
    if count == 1:
        found |= dict.fromkeys(("accelerator_interconnect", "accelerator_interconnect_topology"), "N/A, one a node")
    if gpus:
        gpu = gpus[0]
        kind = re.search(r"HBM\w*|GDDR\w*", gpu.get("name", ""))
        found |= {
            "accelerator_model_name": gpu.get("name"),
            "accelerator_memory_capacity": f"{int(gpu['memory.total']) / 1024:.0f} GiB"
            if "memory.total" in gpu
            else None,
            "accelerator_memory_configuration": kind[0] if kind else None,
            "accelerator_frequency": f"{gpu['clocks.max.sm']} MHz" if "clocks.max.sm" in gpu else None,
        }
        if "pcie.link.gen.max" in gpu and "pcie.link.width.max" in gpu:
            found["accelerator_host_interconnect"] = f"PCIe {gpu['pcie.link.gen.max']}.0 x{gpu['pcie.link.width.max']}"
    if "gpu_l2" in facts:
        found["accelerator_on-chip_memories"] = f"L2 {facts['gpu_l2']}"
    if links := facts.get("gpu_links"):
        found["accelerator_interconnect"], found["accelerator_interconnect_topology"] = links
    return {name: text for name, text in found.items() if text}


def _processors(root: Path) -> dict[str, Any]:
    """Model, sockets, cores and hardware threads of the node, clock, caches."""
    found: dict[str, Any] = {}
    model = re.search(r"^(?:model name|Model|cpu model)\s*:\s*(.+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    if model:
        found["processor"] = model[1].strip()
    cpus = root / "sys/devices/system/cpu"
    places = []
    for topology in cpus.glob("cpu[0-9]*/topology"):
        place = _text(topology / "physical_package_id"), _text(topology / "core_id")
        if all(place):
            places.append(place)
    if places:
        found |= {"sockets": len({socket for socket, _ in places}), "cores": len(set(places)), "threads": len(places)}
    clock = _text(cpus / "cpu0/cpufreq/cpuinfo_max_freq")
    if clock.isdecimal():
        found["processor_clock"] = f"{int(clock) // 1000} MHz"
    caches = []
    for index in sorted((cpus / "cpu0/cache").glob("index[0-9]*")):
        kind = {"Data": "d", "Instruction": "i"}.get(_text(index / "type"), "")
        if size := _text(index / "size"):
            caches.append(f"L{_text(index / 'level')}{kind} {size}")
    if caches:
        found["caches"] = ", ".join(caches)
    return found


def _memory(root: Path) -> dict[str, str]:
    total = re.search(r"^MemTotal:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    return {"memory": f"{int(total[1]) / 2**20:.0f} GiB"} if total else {}


def _disks(root: Path) -> dict[str, str]:
    """The node's own disks: kinds, and sizes in decimal units as they are sold."""
    disks: Counter[tuple[str, int]] = Counter()
    for disk in sorted((root / "sys/block").glob("*")):
        sectors = _text(disk / "size")  # of 512 bytes, whatever the disk's own are
        if disk.name.startswith(_VIRTUAL_DISKS) or not sectors.isdecimal() or int(sectors) == 0:
            continue
        spins = _text(disk / "queue/rotational") == "1"
        kind = "NVMe SSD" if disk.name.startswith("nvme") else "virtual disk" if disk.name.startswith("vd") else None
        disks[kind or ("hard disk" if spins else "SSD"), int(sectors) * 512] += 1
    if not disks:
        return {}
    return {
        "storage": ", ".join(sorted({kind for kind, _ in disks})),
        "storage_capacity": ", ".join(f"{n}x {size / 1e9:.0f} GB {kind}" for (kind, size), n in sorted(disks.items())),
    }


def _network(root: Path) -> dict[str, str]:
    """InfiniBand ports that are up, and other devices with hardware behind them, with their speeds."""
    found: Counter[str] = Counter()
    for port in sorted((root / "sys/class/infiniband").glob("*/ports/*")):
        if "ACTIVE" in _text(port / "state"):
            found[f"{_text(port / 'link_layer') or 'InfiniBand'} RDMA {_text(port / 'rate')}".strip()] += 1
    for device in sorted((root / "sys/class/net").glob("*")):
        if not (device / "device").exists() or _text(device / "operstate") == "down":
            continue
        infiniband = _text(device / "type") == "32"  # IP over the ports that are listed above
        speed = _text(device / "speed")  # Mb/s; -1: not known, as for virtual devices
        rate = f" {int(speed) / 1000:g} Gb/s" if speed.isdecimal() else ""
        driver = os.path.basename(os.path.realpath(device / "device/driver"))
        if not infiniband:
            found[f"Ethernet{rate} ({driver})"] += 1
    return {"network": ", ".join(f"{n}x {name}" for name, n in found.items())} if found else {}


def _gpus() -> dict[str, Any]:
    """What nvidia-smi says, if there is one: a dict for each GPU, and how they are linked."""
    found: dict[str, Any] = {}
    lines = _run("nvidia-smi", f"--query-gpu={','.join(_GPU_QUERY)}", "--format=csv,noheader,nounits").splitlines()
    cells = [[cell.strip() for cell in line.split(",")] for line in lines if line.count(",") == len(_GPU_QUERY) - 1]
    if cells:
        found["gpus"] = [{k: v for k, v in zip(_GPU_QUERY, row) if v and not v.startswith("[")} for row in cells]
    if torch.cuda.is_available():
        found.setdefault("gpus", [{"name": torch.cuda.get_device_name(i)} for i in range(torch.cuda.device_count())])
        found["gpu_l2"] = f"{torch.cuda.get_device_properties(0).L2_cache_size / 2**20:.0f} MiB"
    table = re.sub(r"\x1b\[[0-9;]*m", "", _run("nvidia-smi", "topo", "-m"))
    rows = [line.split() for line in table.splitlines() if re.match(r"GPU\d+\s+(X|[A-Z]+\d*)\s", line.strip())]
    rows = [row for row in rows if "X" in row[1 : len(rows) + 1]]
    kinds = sorted({cell for row in rows for cell in row[1 : len(rows) + 1]} - {"X"})
    if len(kinds) == 1 and kinds[0].startswith("NV"):
        found["gpu_links"] = [f"NVLink, {kinds[0][2:]} links a GPU", f"all to all ({kinds[0]})"]
    elif kinds:
        names = "NVLink and PCIe" if any(kind.startswith("NV") for kind in kinds) else "PCIe"
        found["gpu_links"] = [names, f"mixed: {', '.join(kinds)} (names of nvidia-smi topo -m)"]
    return found


def _software(root: Path) -> dict[str, Any]:
    versions = {"torch": torch.__version__, "python": platform.python_version(), "kernel": platform.release()}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    if torch.backends.cudnn.is_available():
        versions["cudnn"] = str(torch.backends.cudnn.version())
    if torch.cuda.is_available():
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    driver = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    if driver:
        versions["driver"] = driver[0].strip()
    name = re.search(r'^PRETTY_NAME="?([^"\n]+)', _text(root / "etc/os-release"), re.MULTILINE)
    return {"versions": versions} | ({"os": name[1]} if name else {})


def _text(path: Path) -> str:
    """What a small file of the kernel says; nothing where it does not exist or has no answer."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _run(program: str, *arguments: str) -> str:
    """The output of a program; nothing where it is missing, fails or does not come back."""
    if not shutil.which(program):
        return ""
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=Path, metavar="FILE", default=os.environ.get("SYSTEM_DESCRIPTION") or None,
        help="JSON with fields that you know better (variable SYSTEM_DESCRIPTION)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write to (default: stdout)")
    args = parser.parse_args(argv)
    description, _ = merge([collect()], read_values(args.values) if args.values else {})
    open_fields = [name for name, text in description.items() if isinstance(text, str) and text.startswith(PLACEHOLDER)]
    if args.out:
        write(args.out, description)
    else:
        print(json.dumps(description, indent=2, ensure_ascii=False))
    if open_fields:
        print(f"note: to be filled in with --values: {', '.join(open_fields)}", file=sys.stderr)
    return OK


if __name__ == "__main__":
    sys.exit(run_main(main))
