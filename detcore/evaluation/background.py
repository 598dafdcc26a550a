"""Scoring off the training thread: one process beside the training one, ground truth loaded once.

The process is a plain `python -m detcore.evaluation.background`, not a multiprocessing child: that would import the
training program again, and torch with it. Arrays go over as open files without a name (memory where the system
offers it), sent through a socket: nothing is pickled, nothing stays behind on a disk whatever dies, and a small
/dev/shm does not matter. Results come back as lines of JSON on the same socket.

The process has a low CPU priority (nice 10: at 19 a busy machine would starve it, and a late AP is a late stop),
offers itself to the kernel first when memory runs out, does not hear SIGINT, SIGTERM and SIGUSR1, which reach a whole
job although only the training process can tell whether a score is still wanted, and ends when its parent closes the
socket or is gone.
"""

import contextlib
import json
import math
import os
import queue
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from detcore import UserError
from detcore.evaluation.coco import GroundTruth, Scorer, check_ground_truth
from detcore.evaluation.rle import Rles
from detcore.evaluation.waymo import check_categories

REQUEST = struct.Struct("<qqq?")  # number of the submission, rows, letters of masks or -1, per_class; and a file
SECONDS_TO_LEAVE = 5.0
MASKS = "masks_"  # what the names of the masks' columns begin with
UNHEARD = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


class BackgroundEvaluator:
    """Scores submissions in their order, one at a time, in a process of its own.

    Starting blocks only for checking and writing the ground truth; loading happens over there. Raises UserError at
    once for a ground truth that cannot be scored (`check_ground_truth`). Usable as a context manager. Not
    thread-safe: one thread submits, polls and closes.
    """

    def __init__(
        self, ground_truth: GroundTruth, *, backend: str = "auto", waymo: bool = False, masks: Rles | None = None,
        proposals: bool = False,
    ) -> None:  # fmt: skip
        check_ground_truth(ground_truth)  # here and not after the first epoch
        if waymo:
            check_categories(ground_truth.category_ids)
        self._results: dict[int, dict] = {}
        self._received = bytearray()
        self._submitted = 0
        self._failure: str | None = None
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with theirs, _nameless_file() as file:
            of_masks = {f"{MASKS}{name}": column for name, column in masks._asdict().items()} if masks else {}
            np.savez(file, **ground_truth._asdict(), **of_masks)
            file.flush()
            words = (backend, int(waymo), int(proposals), os.getpid(), theirs.fileno(), file.fileno())
            # A new process inherits the mask, so that there is no moment at its start when the signals get through.
            heard = signal.pthread_sigmask(signal.SIG_BLOCK, UNHEARD)
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", __name__, *map(str, words)],
                    pass_fds=(theirs.fileno(), file.fileno()),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, heard)

    @property
    def pid(self) -> int:
        return self._process.pid

    def submit(self, detections: np.ndarray, per_class: bool = False, masks: Rles | None = None) -> "Pending":
        """Copy the detections over and return at once; the array may be changed afterwards.

        detections: float64 [D, 7] and masks, where the ground truth has some, as `detcore.evaluation.coco.evaluate`
        takes them. Raises ValueError for another
        shape and RuntimeError if the process has died or was closed; what is wrong with the numbers themselves
        is found over there and raised by the returned `Pending`.
        """
        detections = np.ascontiguousarray(detections, dtype=np.float64)
        if detections.ndim != 2 or detections.shape[1] != 7:
            raise ValueError(f"detections have shape {detections.shape}; [D, 7] is wanted, also for D = 0")
        self._receive(0.0)
        self._raise_failure()
        number = self._submitted
        with _nameless_file() as file:
            for part in (detections, masks.counts, masks.areas, masks.sizes, masks.text) if masks else (detections,):
                _write(file.fileno(), np.ascontiguousarray(part))
            request = REQUEST.pack(number, len(detections), len(masks.text) if masks else -1, per_class)
            try:
                socket.send_fds(self._socket, [request], [file.fileno()])
            except OSError:
                self._note_death()
                self._raise_failure()
        self._submitted += 1
        return Pending(self, number)

    def close(self) -> None:
        """End the process, whatever it is at; unfinished submissions then raise. May be called again."""
        if self._failure is None:
            self._receive(0.0)  # what has arrived can still be asked for
            self._failure = self._failure or "the evaluator was closed before this submission was scored"
        # Forked workers may hold a copy of the socket, so that closing alone would not reach the other end.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def __enter__(self) -> "BackgroundEvaluator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self, timeout: float | None) -> None:
        """Read what has arrived, waiting for it at most so many seconds (None: without end)."""
        if self._failure is not None or not _readable(self._socket, timeout):
            return
        try:
            data = self._socket.recv(1 << 20)
        except ConnectionError:
            data = b""
        if not data:
            self._note_death()
            return
        *lines, rest = (self._received + data).split(b"\n")
        self._received = rest
        for line in lines:
            answer = json.loads(line)
            self._results[answer["number"]] = answer

    def _note_death(self) -> None:
        try:
            code = self._process.wait(SECONDS_TO_LEAVE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if code == -signal.SIGKILL:
            why = "killed by SIGKILL, as the kernel does when memory runs out (see dmesg, or the job's memory limit)"
        elif code < 0:
            why = f"killed by signal {-code}, {signal.strsignal(-code)}"
        else:
            why = "see what it wrote to the standard error"
        self._failure = f"the evaluator process {self.pid} died with exit code {code}: {why}"

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RuntimeError(self._failure)


class Pending:
    """One submission's result, now or later. It may be asked for any number of times."""

    def __init__(self, evaluator: BackgroundEvaluator, number: int) -> None:
        self._evaluator = evaluator
        self._number = number
        self._answer: dict | None = None

    def poll(self) -> dict[str, Any] | None:
        """The result of `detcore.evaluation.coco.evaluate`, or None while there is none; never waits.

        Raises UserError for detections that cannot be scored, RuntimeError if the process died,
        with its exit code, or was closed before it got here.
        """
        return self._take(0.0)

    def wait(self, timeout: float | None = None) -> dict[str, Any]:
        """The result as from `poll`, waiting for it. Raises TimeoutError after `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if end is None else max(0.0, end - time.monotonic())
            result = self._take(left)
            if result is not None:
                return result
            if left == 0.0:
                raise TimeoutError(f"no evaluation result after {timeout:g} s")

    def _take(self, timeout: float | None) -> dict[str, Any] | None:
        evaluator = self._evaluator
        if self._answer is None and self._number not in evaluator._results:
            evaluator._receive(timeout)
        if self._answer is None:
            self._answer = evaluator._results.pop(self._number, None)
        if self._answer is None:
            evaluator._raise_failure()
            return None
        if "user_error" in self._answer:
            raise UserError(self._answer["user_error"])
        if "error" in self._answer:
            raise RuntimeError(f"the evaluator process failed:\n{self._answer['error']}")
        result = dict(self._answer["result"])
        for name in result.keys() & {"per_class", "per_class_by_iou"}:  # JSON has no numbers as keys
            result[name] = {int(category_id): ap for category_id, ap in result[name].items()}
        return result


def _nameless_file():
    """A file that is gone when its last user is: in memory, or where there is no memfd in the temporary folder."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("detections"), "w+b")
    return tempfile.TemporaryFile()


def _readable(end: socket.socket, timeout: float | None) -> bool:
    """Whether there is something to read (or an end to see) within so many seconds; None: wait for it."""
    poller = select.poll()  # select() itself fails above 1024 open files
    poller.register(end, select.POLLIN)
    return bool(poller.poll(None if timeout is None else math.ceil(timeout * 1000)))


def _write(descriptor: int, values: np.ndarray) -> None:
    view = memoryview(values.reshape(-1).view(np.uint8))
    while len(view):
        view = view[os.write(descriptor, view) :]


def _serve(backend: str, waymo: bool, proposals: bool, parent: int, ours: socket.socket, truth_file: int) -> None:
    """The other process. A thread takes the submissions in, so that it also sees the end while one is scored."""
    submissions: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(ours, parent, submissions), daemon=True).start()
    scorer, failure = None, {}
    try:
        with os.fdopen(truth_file, "rb") as file:
            file.seek(0)
            with np.load(file, allow_pickle=False) as columns:
                truth = GroundTruth(*(columns[name] for name in GroundTruth._fields))
                masks = [columns[f"{MASKS}{name}"] for name in Rles._fields if f"{MASKS}{name}" in columns]
            given = {"masks": Rles(*masks) if masks else None, "proposals": proposals}
            scorer = Scorer(truth, backend=backend, waymo=waymo, **given)
    except Exception as error:
        failure = _describe(error)
    while True:
        number, count, letters, per_class, descriptor = submissions.get()
        answer = failure or _score(scorer, descriptor, count, letters, per_class)
        try:
            ours.sendall(json.dumps({"number": number, **answer}).encode() + b"\n")
        except BrokenPipeError:  # the parent has hung up
            return


def _score(scorer: Scorer, descriptor: int, count: int, letters: int, per_class: bool) -> dict[str, Any]:
    with os.fdopen(descriptor, "rb") as file:
        try:
            rows = np.memmap(file, np.float64, "r", shape=(count, 7)) if count else np.zeros((0, 7))
            masks = None
            if letters >= 0:
                file.seek(rows.nbytes)
                counts, areas, sizes = (np.fromfile(file, np.int64, n) for n in (count, count, 2 * count))
                masks = Rles(np.fromfile(file, np.uint8, letters), counts, sizes.reshape(count, 2), areas)
            return {"result": scorer(rows, per_class=per_class, masks=masks)}
        except Exception as error:
            return _describe(error)


def _describe(error: Exception) -> dict[str, str]:
    if isinstance(error, UserError):
        return {"user_error": str(error)}
    return {"error": "".join(traceback.format_exception(error))}


def _listen(ours: socket.socket, parent: int, submissions: queue.SimpleQueue) -> None:
    """Queue the submissions until the parent hangs up. Other children of a killed parent may keep the socket open:
    hence the look at the parent's id, once a second."""
    while os.getppid() == parent:
        if not _readable(ours, 1.0):
            continue
        try:
            data, descriptors, _, _ = socket.recv_fds(ours, REQUEST.size, 1)
        except ConnectionError:
            break
        if not data:
            break
        submissions.put((*REQUEST.unpack(data), descriptors[0]))
    os._exit(0)


def _main(backend: str, waymo: str, proposals: str, parent: str, ours: str, truth_file: str) -> None:
    os.nice(10)
    with contextlib.suppress(OSError):  # not on every system
        Path("/proc/self/oom_score_adj").write_text("1000")
    kind = waymo == "1", proposals == "1"
    _serve(backend, *kind, int(parent), socket.socket(fileno=int(ours)), int(truth_file))


if __name__ == "__main__":
    _main(*sys.argv[1:])
