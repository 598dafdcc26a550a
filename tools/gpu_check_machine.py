"""What tools/gpu_check.py says of the machine and the checkout: clocks, commit."""

import hashlib
import os
import subprocess

from gpu_check_core import ROOT, Row, words


def clocks(when: str) -> Row:
    """Clocks, temperature, power and used memory of the first GPU as nvidia-smi tells them; {} where it does not."""
    fields = {"card": "name", "driver": "driver_version", "sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem",
              "temperature_c": "temperature.gpu", "power_w": "power.draw", "used_mib": "memory.used"}  # fmt: skip
    query = ["nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"when": when, "missing": words(error)}
    return {
        "when": when,
        **dict(zip(fields, (value.strip() for value in said.splitlines()[0].split(",")), strict=False)),
    }


def commit() -> str:
    """The checkout's commit, with +changes and a hash of them if tracked files differ from it; unknown without git."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        changes = subprocess.run(
            [*git, "diff", "HEAD"], capture_output=True, text=True, errors="replace", check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT", "unknown")
    return head.strip() + (f"+changes-{hashlib.sha256(changes.encode()).hexdigest()[:6]}" if changes else "")
