"""Which Python runs a command: this one or, where packages are missing, that of the checkout's own .venv.

Imports nothing that has to be installed, so that it works before anything else does.
"""

import importlib.util
import os
import sys
from pathlib import Path

from detcore.cli import BAD_INPUT

CHECKOUT = Path(__file__).resolve().parents[1]
VENV = CHECKOUT / ".venv"


def with_packages(module: str, *names: str) -> None:
    """Start the command `module` again with the repository's own .venv if packages are missing here.

    Prints one line and exits with BAD_INPUT where there is no .venv, or where they are missing there too.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if not missing:
        return
    python = VENV / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != VENV.resolve():
        sys.stdout.flush()
        os.execve(python, command(module, *sys.argv[1:], python=python), environment())
    advice = f"make {VENV} (make setup) or activate the environment that has them"
    if python.exists():
        advice = f"install them there: {python} -m pip install -r requirements.lock"
    print(f"error: {sys.executable} has no {', '.join(missing)}; {advice}", file=sys.stderr)
    sys.exit(BAD_INPUT)


def command(module: str, *arguments: object, python: str | Path = sys.executable) -> list[str]:
    """The command line that, in `environment()`, runs a module of this checkout from any folder."""
    return [str(python), "-P", "-m", module, *map(str, arguments)]


def environment() -> dict[str, str]:
    """This process's variables, with the checkout first on Python's path."""
    path = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": f"{CHECKOUT}{os.pathsep}{path}" if path else str(CHECKOUT)}
