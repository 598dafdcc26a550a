"""MLPerf Training log events, written by rank 0 through mlperf-logging's own logger.

Format, order and rules: MLCommons training_rules and the compliance checker of mlperf-logging (rulesets 5.0 and 5.1).
Epochs are counted from 1, and `epoch_num` of an evaluation is the number of completed epochs: the convergence checker
reads it as the epochs that the run took.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Any

from mlperf_logging.mllog import constants
from mlperf_logging.mllog.mllog import MLLogger

from detcore import UserError
from detcore.training.config import RunConfig

SUCCESS, ABORTED = constants.SUCCESS, constants.ABORTED
_ROOT = str(Path(__file__).resolve().parents[2])


class MLPerfLog:
    """The event log of one run. With path None (every rank but 0) it swallows all events.

    Lines go to the file, flushed one by one, and also to standard output where that is no terminal, so that a job's
    own log holds them too. `stop` writes RUN_STOP exactly once, whatever happens after.
    """

    def __init__(self, path: Path | None, *, append: bool = False):
        """Opens the file. Raises UserError if it can't be written. append: continue the log of a resumed run."""
        self._running = False
        self._logger = logging.getLogger(f"mllog.{id(self)}")
        self._logger.propagate = False
        self._logger.setLevel(logging.INFO)
        self._mllogger = MLLogger(logger=self._logger, default_stack_offset=2, root_dir=_ROOT)
        if path is None:
            self._logger.addHandler(logging.NullHandler())
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._logger.addHandler(logging.FileHandler(path, mode="a" if append else "w", encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"the MLPerf log {path} can't be written: {error.strerror}; choose another --output-dir"
            ) from error
        if not sys.stdout.isatty():
            self._logger.addHandler(logging.StreamHandler(sys.stdout))

    def event(self, key: str, value: Any = None, **metadata: Any) -> None:
        """A point in time; key: an event name of mlperf-logging, metadata: event-specific keys."""
        self._mllogger.event(key, value, metadata or None)

    def start(self, key: str, value: Any = None, **metadata: Any) -> None:
        """The start of an interval."""
        self._mllogger.start(key, value, metadata or None)

    def end(self, key: str, value: Any = None, **metadata: Any) -> None:
        """The end of an interval."""
        self._mllogger.end(key, value, metadata or None)

    def submission(self, benchmark: str, config: RunConfig) -> None:
        """The lines that say whose run this is; every run logs them before init_start."""
        self.event(constants.SUBMISSION_BENCHMARK, benchmark)
        self.event(constants.SUBMISSION_ORG, config.mlperf_org)
        self.event(constants.SUBMISSION_DIVISION, config.mlperf_division)
        self.event(constants.SUBMISSION_STATUS, config.mlperf_status)
        self.event(constants.SUBMISSION_PLATFORM, config.mlperf_platform)

    def cache_clear(self, config: RunConfig, *, drops: bool) -> None:
        """The lines that say that the page cache is empty. drops: whether this process drops it if the config says so.

        Raises UserError as `drop_file_cache` does.
        """
        if config.caches_cleared:
            self.event(constants.CACHE_CLEAR, True)
        if config.drop_file_cache and drops and drop_file_cache(config.data_paths()):
            self.event(constants.CACHE_CLEAR, True)

    def settings(self, config: RunConfig, seed: int, processes: int, epochs: int | None, weights: list[str]) -> None:
        """The lines that say what every run sets. epochs: None where they are not known yet. weights: their names."""
        self.event(constants.SEED, seed)
        self.event("local_batch_size", config.batch_size)
        self.event(constants.GLOBAL_BATCH_SIZE, config.batch_size * config.accumulate * processes)
        self.event(constants.GRADIENT_ACCUMULATION_STEPS, config.accumulate)
        if epochs is not None:
            self.event(constants.EPOCH_COUNT, epochs)
        self.event(constants.FIRST_EPOCH_NUM, 1)
        for name in weights:
            self.event(constants.WEIGHTS_INITIALIZATION, tensor=name)

    def run_start(self) -> None:
        """The clock starts; no training data may have been read before."""
        self.start(constants.RUN_START)
        self._running = True

    def run_stop(self, status: str) -> None:
        """The clock stops with status SUCCESS or ABORTED; a second call, or one before run_start, writes nothing."""
        if not self._running:
            return
        self._running = False
        self.end(constants.RUN_STOP, status=status)
        self.event(constants.STATUS, status)

    def close(self) -> None:
        """Closes the file."""
        for handler in list(self._logger.handlers):
            self._logger.removeHandler(handler)
            handler.close()


def succeeded(path: Path) -> bool:
    """Whether a log's last RUN_STOP says success. Lines that are no events are passed over."""
    status = None
    for line in path.read_text(encoding="latin-1").splitlines():
        _, token, text = line.rpartition(":::MLLOG ")
        if token and f'"key": "{constants.RUN_STOP}"' in text:
            status = f'"status": "{SUCCESS}"' in text
    return bool(status)


def drop_file_cache(folders: list[Path]) -> int:
    """Asks the kernel to drop the files below these folders from the page cache; needs no special right.

    Returns the number of files. For a machine of one's own; a launcher with the right to do it drops the whole cache
    instead. Only pages that are on disk already can be dropped, so everything is synced first.
    Raises UserError where the system has no such call.
    """
    if not hasattr(os, "posix_fadvise"):
        raise UserError("--drop-file-cache: this system has no posix_fadvise; leave the flag out")
    os.sync()
    count = 0
    for folder in folders:
        paths = (
            [folder] if folder.is_file() else [Path(top, name) for top, _, names in os.walk(folder) for name in names]
        )
        for path in paths:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
            count += 1
    return count
