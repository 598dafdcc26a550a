"""What `tools.preflight` looks at on one rank or node: GPU, folders, free space, the all-reduce."""

import os
import platform
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from detcore import UserError
from detcore.data import manifest
from tools.preflight.team import Team, first_line, ranks

GIB = 2**30
SHM = Path("/dev/shm")
_SHM_GIB = 1.0  # loader processes hand their batches over there, and die of "bus error" where it is too small
_DIFFERENCES_SHOWN = 5
_SHARED_PATIENCE_S = 10.0  # a network file system may show another node's new file a little later


@dataclass
class Report:
    """What one rank found: problems and warnings in words, facts by name."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Progress:
    """For `manifest`: more files seen is progress of this rank; the same number again, in a stuck mount, is not."""

    def __init__(self, team: Team) -> None:
        self._team, self._files = team, -1

    def __call__(self, files: int) -> None:
        if files > self._files:
            self._files = files
            self._team.tick()


def check_device(report: Report, team: Team, device: str) -> None:
    """Find this rank's GPU and compute on it; on the CPU there is nothing to find."""
    nccl = torch.cuda.nccl.version() if device != "cpu" and torch.cuda.is_available() else ()
    report.facts["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "NCCL": ".".join(map(str, nccl)) or "not used",
    }
    if device == "cpu":
        return
    team.begin("looking for its GPU")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = 0 if count == 1 else team.world.local_rank  # with one to see, the launcher gave each rank its own
    if index >= count:
        report.problems.append(
            f"torch {torch.__version__} sees {count} GPU{'s' * (count != 1)} for {team.world.local_size} ranks on this "
            "node. Look at nvidia-smi, CUDA_VISIBLE_DEVICES and the GPUs that job and container were given; to do "
            "without GPUs: --device cpu"
        )
        return
    try:
        torch.cuda.set_device(index)
        about = torch.cuda.get_device_properties(index)
        report.facts["gpu"] = {"name": about.name, "id": str(getattr(about, "uuid", "")), "visible": count}
        total = int(torch.ones(1000, dtype=torch.int64, device="cuda").sum())
    except RuntimeError as error:
        report.problems.append(f"GPU {index} fails: {first_line(error)}. Look at nvidia-smi and dmesg on this node")
        return
    if total != 1000:
        report.problems.append(f"GPU {index} ({about.name}) adds 1000 ones to {total}: take this node out of service")


def check_data(
    report: Report, team: Team, data: list[Path], backbone: Path | None, verify: str, path: Path | None
) -> None:
    """On one rank of each node: the folders to read from, and whether they hold what their manifest says."""
    folders = report.facts.setdefault("folders", {})
    if backbone:
        team.begin(f"reading --backbone {backbone}")
        if _check_readable(report, f"--backbone {backbone}", backbone):
            folders["backbone"] = f"{backbone}: readable on every node"
    for i, folder in enumerate(data, 1):
        name = f"data {i}" if len(data) > 1 else "data"
        team.begin(f"reading --data {folder}")
        if not _check_readable(report, f"--data {folder}", folder):
            continue
        folders[name] = f"{folder}: readable on every node"
        if verify == "no":
            continue
        team.begin(f"counting the files of --data {folder}")
        expected = path or folder / manifest.NAME
        try:
            differences = manifest.check(folder, expected, full=verify == "full", progress=Progress(team))
            folders[name] += f", {'files and bytes' if verify == 'full' else 'numbers of files'} as {expected} says"
        except UserError as error:
            report.problems.append(f"--verify {verify}: {error}")
            continue
        hint = "copy it again, or, where the data is right, write the manifest anew"
        report.problems += [f"--data {folder}, {text}; {hint}" for text in differences[:_DIFFERENCES_SHOWN]]
        if (more := len(differences) - _DIFFERENCES_SHOWN) > 0:
            report.problems.append(f"--data {folder}: {more:,} more folders are not as {expected} says; {hint}")


def _check_readable(report: Report, name: str, folder: Path) -> bool:
    """Whether some file in `folder`, not a hidden one, can be opened and read."""
    waiting, visited = [str(folder)], set()
    try:
        while waiting:
            path = waiting.pop()
            about = os.stat(path)
            if (about.st_dev, about.st_ino) in visited:
                continue
            visited.add((about.st_dev, about.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name == manifest.NAME:
                        continue
                    if entry.is_dir():
                        waiting.append(entry.path)
                    elif entry.is_file():
                        with open(entry.path, "rb") as file:
                            file.read(1)
                        return True
    except OSError as error:
        where = f" ({error.filename})" if error.filename not in (None, str(folder)) else ""
        report.problems.append(f"{name}: {error.strerror}{where}; check the path, its mount and permissions")
        return False
    report.problems.append(f"{name} holds no files; is the data mounted there?")
    return False


def write_manifests(report: Report, team: Team, data: list[Path], path: Path | None) -> None:
    """On rank 0, before anybody compares."""
    for folder in data:
        team.begin(f"writing the manifest of --data {folder}")
        try:
            manifest.write(folder, path, progress=Progress(team))
        except UserError as error:
            report.problems.append(f"--write-manifest: {error}")


def check_output(report: Report, team: Team, folder: Path, own: str, of_rank0: str | None) -> bool:
    """On one rank of each node: write the file `own` in `folder` and see rank 0's, if that could write one.

    Rank 0's file stays for the others; they remove theirs. Returns whether this rank could write.
    """
    team.begin(f"writing to --output {folder}")
    try:
        with open(folder / own, "wb") as file:
            file.write(bytes(2**16))  # on a full disk an empty file can still be made
            file.flush()
            os.fsync(file.fileno())
        if team.world.rank:
            (folder / own).unlink()
    except OSError as error:
        with suppress(OSError):  # what was written of it
            (folder / own).unlink()
        hint = "free space there, or choose another folder" if folder.is_dir() else "create it where all nodes see it"
        report.problems.append(f"--output {folder} can't be written: {error.strerror}; {hint}")
        return False
    deadline = time.monotonic() + min(_SHARED_PATIENCE_S, team.timeout_s / 2)
    while of_rank0 and not (folder / of_rank0).exists():
        if time.monotonic() > deadline:
            report.problems.append(
                f"--output {folder} is not the one of {team.hosts[0]}: a file that rank 0 wrote there does "
                "not show up here. Choose a folder that all nodes share (LOGDIR)"
            )
            break
        time.sleep(0.2)
    return True


def check_space(report: Report, output: Path | None, min_free_gib: float, min_shm_gib: float) -> None:
    """Free space: of /dev/shm on one rank of each node, of the output folder, which they share, on rank 0."""
    wanted = [(SHM, "/dev/shm", min_shm_gib, "--min-shm-gib", "give the container more: --shm-size")]
    if output:
        hint = "free space there, or choose another folder"
        wanted.append((output, f"--output {output}", min_free_gib, "--min-free-gib", hint))
    for path, name, least, option, hint in wanted:
        try:
            free = shutil.disk_usage(path).free / GIB
        except OSError as error:
            if path == output:  # that it can't be written has been said
                continue
            report.warnings.append(f"{name}: {error.strerror}; loader processes will not work")
            continue
        report.facts["free_shm_gib" if path == SHM else "free_output_gib"] = free
        if free < least:
            report.problems.append(f"{name} has {free:.2f} GiB free, {option} wants {least:g}: {hint}")
        elif path == SHM and free < _SHM_GIB:
            report.warnings.append(f"{name} has {free:.2f} GiB free, loaders of large images need more: {hint}")


def all_reduce(team: Team, device: str, mib: float) -> dict[str, Any]:
    """Sum `mib` MiB over all ranks, check the sum, time it.

    fp16 over NCCL on GPUs, else fp32 over gloo. Every place of the tensor gets its value from one rank and zeros from
    the others, so that the sum is exact for any number of ranks and a wrong place names the rank whose part was lost.
    Returns {"bytes", "backend", "dtype", "seconds"} and, where the sum was wrong, "wrong": words. Seconds: mean of one
    all-reduce. Raises RuntimeError where the ranks can't reach each other or one does not answer in time.
    """
    on_gpu = device != "cpu"
    backend, dtype, rounds = ("nccl", torch.float16, 20) if on_gpu else ("gloo", torch.float32, 5)
    size, rank = team.world.size, team.world.rank
    where = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    index = torch.arange(max(round(mib * 2**20) // dtype.itemsize, 1), device=where)
    expected = (index // size % 31 + 1).to(dtype)
    mine = torch.where(index % size == rank, expected, 0)
    limit = 0.7 * team.timeout_s  # before anybody gives this rank up
    if size > 1:
        # NCCL's own limit would abort the process instead of raising.
        patience = timedelta(seconds=10 * team.timeout_s if on_gpu else limit)
        store = dist.PrefixStore("all-reduce", team.store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    result = {"bytes": mine.numel() * dtype.itemsize, "backend": backend, "dtype": str(dtype).removeprefix("torch.")}
    wrong = torch.zeros_like(expected, dtype=torch.bool)
    for _ in range(3):  # also warms up
        total = mine.clone()
        _sum(total, on_gpu, limit)
        team.tick()
        wrong |= total != expected
    scratch = torch.zeros_like(mine)
    _sum(torch.zeros(1, device=where), on_gpu, limit)  # everybody starts together
    start = time.perf_counter()
    for _ in range(rounds):
        _sum(scratch, on_gpu, limit)
    result["seconds"] = (time.perf_counter() - start) / rounds
    if bad := int(wrong.sum()):
        lost = sorted(set((index[wrong] % size).tolist()))
        result["wrong"] = (
            f"the all-reduce over {backend} gave a wrong sum in {bad:,} of {mine.numel():,} places, which lack what "
            f"{ranks(lost)} sent. Look at network and GPU links of these nodes; NCCL_DEBUG=INFO tells the way taken"
        )
    return result


def _sum(tensor: torch.Tensor, on_gpu: bool, limit_s: float) -> None:
    """All-reduce in place, waiting no longer than `limit_s`. One process alone: nothing to do."""
    if not dist.is_initialized():
        return
    dist.all_reduce(tensor)
    if not on_gpu:
        return
    done = torch.cuda.Event()
    done.record()
    deadline = time.monotonic() + limit_s
    while not done.query():
        if time.monotonic() > deadline:
            raise RuntimeError(f"no result after {limit_s:.0f} s")
