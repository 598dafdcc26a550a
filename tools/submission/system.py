"""MLPerf's system description: its 33 fields, and whether a file of them is complete and is that of these logs."""

import re
from pathlib import Path
from typing import Any

from . import official
from .logs import Log
from .output import read_json

PLACEHOLDER = "FILL IN: "
DIVISIONS = ("closed", "open")
STATUS = {  # in the log: in the description
    "onprem": "Available on-premise",
    "cloud": "Available cloud",
    "preview": "Preview",
    "research": "Research, Development, or Internal (RDI)",
}
FIELDS = {  # in the order of the rules, with what is wanted where nothing can be found
    "submitter": "the organisation that submits",
    "division": "closed or open",
    "status": "one of " + "; ".join(STATUS.values()),
    "system_name": "the name of the system",
    "number_of_nodes": "how many nodes ran the training",
    "host_processors_per_node": "how many processors (sockets) a node has",
    "host_processor_model_name": "maker and model of the processors",
    "host_processor_core_count": "cores of one processor",
    "host_processor_vcpu_count": "hardware threads of one processor",
    "host_processor_frequency": "highest clock of the processors",
    "host_processor_caches": "sizes of the processor's caches",
    "host_processor_interconnect": "what connects the processors of a node, such as UPI",
    "host_memory_capacity": "memory of a node",
    "host_storage_type": "kind of the storage that holds the data",
    "host_storage_capacity": "size of that storage",
    "host_networking": "network devices of a node",
    "host_networking_topology": "how the nodes are connected, such as fat tree",
    "host_memory_configuration": "memory modules of a node, such as 32x 64 GB DDR5-4800",
    "accelerators_per_node": "how many accelerators a node has",
    "accelerator_model_name": "maker and model of the accelerators",
    "accelerator_host_interconnect": "what connects accelerators and processors, such as PCIe 5.0 x16",
    "accelerator_frequency": "highest clock of the accelerators",
    "accelerator_on-chip_memories": "sizes of the accelerator's caches and registers",
    "accelerator_memory_configuration": "kind of the accelerator's memory, such as HBM3",
    "accelerator_memory_capacity": "memory of one accelerator",
    "accelerator_interconnect": "what connects the accelerators of a node, such as NVLink",
    "accelerator_interconnect_topology": "how the accelerators of a node are connected",
    "cooling": "air, liquid or other",
    "hw_notes": "anything else about the hardware, or nothing",
    "framework": "name and version of the framework",
    "other_software_stack": "versions of driver and libraries",
    "operating_system": "name and version of the operating system",
    "sw_notes": "anything else about the software, or nothing",
}
TABLE_FIELDS = ("host_processor_core_count", "accelerators_per_node")  # what the checker joins into a line of text
_NUMBERED = re.compile(r"(\d+)\s*x")


def read_description(path: Path) -> dict[str, Any]:
    """Raises UserError for what is no JSON object."""
    return read_json(path, "a system description; run.sub leaves one, <stamp>_system.json")


def check_description(path: Path, ruleset: str) -> tuple[list[str], official.Said]:
    """(what is wrong with a system description, what the official checker says). Raises UserError for no JSON."""
    fields = read_description(path)
    problems = [f"{path}: {name} is missing: {wanted}" for name, wanted in FIELDS.items() if name not in fields]
    for name, value in fields.items():
        for text in _texts(value):
            if text.startswith(PLACEHOLDER.strip()):
                problems.append(f"{path}: {name} is still to fill in: {text.removeprefix(PLACEHOLDER.strip()).strip()}")
        if name in TABLE_FIELDS and not isinstance(value, str):
            problems.append(f'{path}: {name} is {value!r}; the official checker wants text: "{value}"')
    said = official.system_description(path, ruleset)
    if said.ran and not said.ok and not problems:
        problems.append(f"{path}: the official system description checker refuses it: {said.errors}")
    return problems, said


def against_logs(fields: dict[str, Any], logs: list[Log]) -> list[tuple[str, str]]:
    """(level, words) of what the description and the logs say differently; nothing of it do official checkers see."""
    found: list[tuple[str, str]] = []
    if not logs:
        return found
    log = logs[0]
    division = log.last("submission_division")
    if "division" in fields and division is not None and fields["division"] != division:
        # In another spelling the official checker takes it for open, and compares neither seeds nor convergence.
        level = "doubt" if str(fields["division"]).lower() == division else "error"
        found.append((level, f"the system description's division is {fields['division']!r}, the logs' {division!r}"))
    status = STATUS.get(str(log.last("submission_status")))
    if status is not None and fields.get("status", status) != status:
        found.append(("note", f"the system description's status is {fields['status']!r}, {status!r} by the logs"))
    org = log.last("submission_org")
    if org is not None and fields.get("submitter", org) != org:
        found.append(("note", f"the system description's submitter is {fields['submitter']!r}, the logs' org {org!r}"))
    nodes, each = (_count(fields.get(name)) for name in ("number_of_nodes", "accelerators_per_node"))
    match = _NUMBERED.match(str(log.last("submission_platform")))
    if match and nodes and int(match[1]) not in (nodes, nodes * (each or 1)):
        platform = log.last("submission_platform")
        found.append(("doubt", f"submission_platform is {platform!r}, the system description has {nodes} nodes"))
    model = fields.get("accelerator_model_name")
    if (each or 0) > 0 and isinstance(model, str) and model.strip() in ("", "-", "N/A", "None"):
        found.append(
            ("doubt", f"the system description has {each} accelerators a node, and accelerator_model_name is {model!r}")
        )
    batch, local = log.last("global_batch_size"), log.last("local_batch_size")
    if nodes and each and all(type(n) is int and n > 0 for n in (batch, local)) and batch % (local * nodes * each):
        words = f"global_batch_size {batch} is no multiple of local_batch_size {local} times {nodes} nodes times {each}"
        found.append(("note", f"{words} accelerators of the system description"))
    return found


def _count(value: Any) -> int | None:
    text = str(value).strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None


def _texts(value: Any) -> list[str]:
    """All texts in a JSON value, however deep."""
    if isinstance(value, dict | list):
        return [text for part in (value.values() if isinstance(value, dict) else value) for text in _texts(part)]
    return [value] if isinstance(value, str) else []
