"""What the tests of several tools share: the tools as modules, and logs of runs that never took place."""

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
from mlperf_logging.mllog import constants as keys
from mlperf_logging.mllog import mllog

from detcore.training.config import RunConfig
from detcore.training.mlperf import ABORTED, MLPerfLog

TOOLS = Path(__file__).resolve().parents[2] / "tools"
START_MS = 1_760_000_000_000


@pytest.fixture(scope="session")
def load_tool():
    """load_tool("trials"): tools/trials.py as a module."""

    def load(name: str):
        sys.path.insert(0, str(TOOLS))
        try:
            spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
            module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(TOOLS))
        return module

    return load


@pytest.fixture
def write_log(monkeypatch):
    """Writes a log as the training loop does, through its own MLPerfLog, in made-up time.

    write(path, seed=, minutes=, ...): `minutes` from RUN_START to RUN_STOP; `leave_out`: keys that are not written;
    status None: the run was killed before RUN_STOP.
    """

    def write(
        path, *, seed=1, minutes=30.0, epochs=4, metric=0.345, status="success", benchmark="retinanet", gbs=256,
        division="closed", platform="1xDGXH100", org="us", leave_out=(), append=False,
    ):  # fmt: skip
        clock = itertools.count(START_MS)
        monkeypatch.setattr(mllog, "_current_time_ms", lambda: next(clock))
        log = MLPerfLog(path, append=append)
        event = log.event
        monkeypatch.setattr(log, "event", lambda key, *rest, **about: key in leave_out or event(key, *rest, **about))
        log.event(keys.CACHE_CLEAR, True)
        log.submission(benchmark, RunConfig(mlperf_org=org, mlperf_division=division, mlperf_platform=platform))
        log.start(keys.INIT_START)
        hyper = {keys.OPT_NAME: "adam", keys.OPT_BASE_LR: 1e-4, keys.OPT_WEIGHT_DECAY: 0}
        hyper |= {keys.OPT_LR_WARMUP_EPOCHS: 1, keys.OPT_LR_WARMUP_FACTOR: 0.001, keys.SEED: seed}
        hyper |= {keys.GLOBAL_BATCH_SIZE: gbs, keys.GRADIENT_ACCUMULATION_STEPS: 1, keys.EPOCH_COUNT: 26}
        for key, value in hyper.items():
            log.event(key, value)
        log.end(keys.INIT_STOP)
        clock = itertools.count(START_MS + 60_000)
        log.run_start()
        log.event(keys.TRAIN_SAMPLES, 1170301)
        log.event(keys.EVAL_SAMPLES, 24781)
        for epoch in range(1, epochs + 1):
            log.start(keys.EPOCH_START, epoch, epoch_num=epoch)
            log.end(keys.EPOCH_STOP, epoch, epoch_num=epoch)
            log.start(keys.EVAL_START, epoch, epoch_num=epoch)
            value = metric if isinstance(metric, dict) else metric - (epochs - epoch) * 0.05
            log.event(keys.EVAL_ACCURACY, value, epoch_num=epoch)
            log.end(keys.EVAL_STOP, epoch, epoch_num=epoch)
        clock = itertools.count(START_MS + 60_000 + round(minutes * 60_000))
        if status:
            log.run_stop(status if keys.RUN_STOP not in leave_out else ABORTED)
        log.close()
        return path

    return write
