"""Logs, results and submission trees of runs that never took place, written without the program's own logger."""

import json
from pathlib import Path
from typing import Any

from tools.submission.system import FIELDS

START_MS = 1_760_000_000_000
CURVE = (0.24, 0.295, 0.333, 0.346, 0.35, 0.352, 0.353, 0.354)
RETINANET = {
    "opt_name": "adam", "opt_base_learning_rate": 8.5e-05, "opt_weight_decay": 0, "opt_learning_rate_warmup_epochs": 0,
    "opt_learning_rate_warmup_factor": 0.001,
}  # fmt: skip
MASKRCNN = {
    "opt_base_learning_rate": 0.12, "opt_learning_rate_warmup_steps": 625, "opt_learning_rate_warmup_factor": 1.92e-4,
    "num_image_candidates": 6000, "opt_learning_rate_decay_factor": 0.1,
    "opt_learning_rate_decay_steps": [12000, 16000], "min_image_size": 800, "max_image_size": 1333,
}  # fmt: skip


def events(
    *, seed: Any = 1, minutes: float = 34.0, epochs: int = 4, curve: Any = CURVE, status: str | None = "success",
    benchmark: str = "retinanet", org: str = "us", division: str = "closed", platform: str = "1xDGXH100_001x08x032",
    batch: int = 256, start: int = START_MS, init_s: float = 20.0, hyper: dict[str, Any] | None = None,
    samples: tuple[int, int] = (1170301, 24781), killed_after: int | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """The events of one run as dicts; its last evaluations end with the values of `curve`, the target reached."""
    found: list[dict[str, Any]] = []

    def event(time: float, key: str, value: Any = None, kind: str = "POINT_IN_TIME", **metadata: Any) -> None:
        place = {"file": "made.py", "lineno": 7 + len(found)} if key != "seed" else {"file": "made.py", "lineno": 5}
        found.append({
            "namespace": "", "time_ms": round(time), "event_type": kind, "key": key, "value": value,
            "metadata": {**place, **metadata},
        })  # fmt: skip

    for key, value in (
        ("cache_clear", True), ("submission_benchmark", benchmark), ("submission_org", org),
        ("submission_division", division), ("submission_status", "onprem"), ("submission_platform", platform),
    ):  # fmt: skip
        event(start, key, value)
    event(start, "init_start", kind="INTERVAL_START")
    for key, value in {
        "seed": seed, "local_batch_size": 32, "global_batch_size": batch, "gradient_accumulation_steps": 1,
        "epoch_count": 8, "weights_initialization": None, **(RETINANET if hyper is None else hyper),
    }.items():  # fmt: skip
        event(start, key, value)
    begin = start + init_s * 1000
    event(begin, "init_stop", kind="INTERVAL_END")
    event(begin, "run_start", kind="INTERVAL_START")
    event(begin, "train_samples", samples[0])
    event(begin, "eval_samples", samples[1])
    each = minutes * 60_000 / epochs
    for epoch in range(1, epochs + 1 if killed_after is None else killed_after + 1):
        at = begin + (epoch - 1) * each
        event(at, "epoch_start", epoch, "INTERVAL_START", epoch_num=epoch)
        event(at + 0.9 * each, "epoch_stop", epoch, "INTERVAL_END", epoch_num=epoch)
        event(at + 0.9 * each, "tracked_stats", {"throughput": 2500.0}, step=epoch)
        event(at + 0.9 * each, "eval_start", epoch, "INTERVAL_START", epoch_num=epoch)
        value = curve[4 - epochs + epoch - 1 if epochs < 4 else epoch - 1]
        event(at + 0.99 * each, "eval_accuracy", value, epoch_num=epoch)
        event(at + 0.99 * each, "eval_stop", epoch, "INTERVAL_END", epoch_num=epoch)
    if status and killed_after is None:
        event(begin + minutes * 60_000, "run_stop", None, "INTERVAL_END", status=status)
        event(begin + minutes * 60_000, "status", status)
    return found


def text(found: list[dict[str, Any]], prefix: str = "") -> str:
    return "".join(f"{prefix}:::MLLOG {json.dumps(one)}\n" for one in found)


def write_log(path: Path, prefix: str = "", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(events(**options), prefix))
    return path


def write_result(folder: Path, changes: dict[int, dict[str, Any]] | None = None, **options: Any) -> list[Path]:
    """Five runs after each other, run i with other options: changes[i]."""
    paths = []
    for i in range(5):
        own = {"seed": 1000 + 37 * i, "minutes": 34 + i / 10, "start": START_MS + i * 7_200_000}
        paths.append(write_log(folder / f"result_{i}.txt", **own | options | (changes or {}).get(i, {})))
    return paths


def description(**changes: Any) -> dict[str, Any]:
    """A complete system description; None among the changes removes a field."""
    fields = dict.fromkeys(FIELDS, "x") | {"submitter": "us", "division": "closed", "status": "Available on-premise"}
    fields |= {
        "system_name": "box",
        "number_of_nodes": "1",
        "accelerators_per_node": "8",
        "host_processors_per_node": "2",
    }
    fields |= {"other_software_stack": {"torch": "2"}, "accelerator_model_name": "NVIDIA H100"}
    return {name: value for name, value in (fields | changes).items() if value is not None}


def write_tree(
    place: Path, system: str = "box", benchmark: str = "retinanet", fields: dict[str, Any] | None = None, **options: Any
) -> list[Path]:
    """One result in the layout of MLCommons' repositories; the logs' paths."""
    (place / "systems").mkdir(parents=True, exist_ok=True)
    (place / "systems" / f"{system}.json").write_text(json.dumps(description(**(fields or {}))))
    return write_result(place / "results" / system / benchmark, benchmark=benchmark, **options)
