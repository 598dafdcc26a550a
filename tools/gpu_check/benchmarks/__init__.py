"""What each benchmark brings to a check: a package here of its name, whose BENCHMARK says it without importing torch.

A new benchmark adds its package; nothing else changes.
"""

import pkgutil
from functools import cache
from importlib import import_module

from tools.gpu_check.parts import Benchmark


@cache
def benchmarks() -> dict[str, Benchmark]:
    """Those that are here, by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: import_module(f"{__name__}.{name}").BENCHMARK for name in names}
