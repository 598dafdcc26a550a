"""How a program of this repository ends: its exit codes, and what the person at the terminal reads.

| code | name               | meaning                                                                 |
|------|--------------------|-------------------------------------------------------------------------|
| 0    | OK                 | done; in training: the target was reached                               |
| 1    | CRASH              | an unexpected error; the traceback stands on stderr                     |
| 2    | BAD_INPUT          | a mistake in options, variables, files or data, or a path that cannot   |
|      |                    | be used: one line on stderr                                             |
| 3    | TARGET_NOT_REACHED | training ended after its last epoch below the target                    |
| 4    | STOPPED            | stopped by a signal; a checkpoint was saved, the run can be resumed     |
| 5    | NOT_FINITE         | the loss became NaN or infinite                                         |
| 6    | WATCHDOG           | a process died or hung; `detcore.processes.watchdog` ended the others             |
| 130  | INTERRUPTED        | Ctrl-C                                                                  |
| 141  | PIPE_CLOSED        | the reader of stdout went away (`... | head`)                           |
"""

import errno
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from detcore import UserError

OK = 0
CRASH = 1
BAD_INPUT = 2
TARGET_NOT_REACHED = 3
STOPPED = 4
NOT_FINITE = 5
WATCHDOG = 6
INTERRUPTED = 130
PIPE_CLOSED = 141

_UNUSABLE = (  # what can be wrong with a path, whatever the program does there
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENOSPC,
    errno.EDQUOT, errno.EEXIST, errno.EIO, errno.ESTALE,
)  # fmt: skip
_HINTS = (
    (r"no space left|quota exceeded", "the disk is full: free space, or choose another folder."),
    (
        r"storage size calculation overflowed|out of memory|can't allocate memory|not enough memory|MemoryError",
        "the memory did not suffice: is a size among the options too large by mistake? Else try a smaller --batch-size "
        "or --image-size, or fewer --workers.",
    ),
    (
        r"DataLoader worker .*(killed|exited)|bus error|shared memory|/dev/shm",
        "a loader process was killed: usually main or shared memory ran out. Use fewer --workers, or give the "
        "container more shared memory (docker run --shm-size=...).",
    ),
)
_DEFAULT_HINT = (
    "this is an error of the program, not of your input. The lines above say where; "
    "please report them with the command and the printed configuration."
)


def run_main(main: Callable[[list[str]], int], argv: Sequence[str] | None = None) -> int:
    """Call `main` with the command line's words and return the exit code: `sys.exit(run_main(main))`.

    `UserError`, and a path that the system refuses, become one line on stderr, everything unexpected a traceback and a
    line on what to do. `argv` defaults to `sys.argv[1:]`.
    """
    if hasattr(sys.stdout, "reconfigure"):  # file names of other encodings, class names on an ASCII terminal
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except UserError as error:
        _say(f"error: {_plain_message(error)}")
        return BAD_INPUT
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except BrokenPipeError as error:
        return PIPE_CLOSED if _stdout_is_closed() else _crash(error)
    except OSError as error:
        if error.errno not in _UNUSABLE or error.filename is None:
            return _crash(error)
        _say(f"error: {error.filename}: {error.strerror}; check the path, its permissions and the disk")
        return BAD_INPUT
    except Exception as error:
        return _crash(error)


class StopRequest:
    """SIGTERM, SIGUSR1 and SIGINT ask for a checkpoint and an orderly end; a second SIGINT interrupts at once.

    signal: the last one that this process got, or 0. agreed: the one that the processes of a run agreed to stop for,
    which this one may not have got yet.
    """

    def __init__(self) -> None:
        self.signal = self.agreed = 0

    def __enter__(self) -> "StopRequest":
        self._old = {n: signal.signal(n, self._on) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _on(self, number: int, _frame: object) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


def _crash(error: Exception) -> int:
    text = "".join(traceback.format_exception(error))
    summary = f"{type(error).__name__}: {error}"
    hint = next((words for pattern, words in _HINTS if re.search(pattern, summary, re.IGNORECASE)), _DEFAULT_HINT)
    _say(f"{text}hint: {hint}")
    return CRASH


def _say(text: str) -> None:
    """One write, so that the lines of several processes do not mix."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _plain_message(error: UserError) -> str:
    """The message alone, also where a DataLoader worker raised it: torch then puts the worker's traceback into it.

    Control characters, which a file or class name may hold, are written out, so that the message stays one line.
    """
    text = str(error).rsplit(f"{UserError.__module__}.{UserError.__qualname__}: ", 1)[-1].strip()
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: repr(match[0])[1:-1], text)


def _stdout_is_closed() -> bool:
    """Whether nobody reads stdout any more (a broken pipe to a helper process is another matter: a crash)."""
    poller = select.poll()
    poller.register(1, 0)
    if not any(event & select.POLLERR for _, event in poller.poll(0)):
        return False
    # The interpreter flushes stdout once more as it ends and would complain about the same pipe.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return True
