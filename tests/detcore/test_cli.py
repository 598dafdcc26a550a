"""Each way for a program to end has its exit code and its words; run in real processes where the process matters."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from detcore import UserError, cli

ROOT = Path(__file__).resolve().parents[2]


def raising(error):
    def main(argv):
        raise error

    return main


def test_main_gets_the_words_and_its_code_is_returned():
    seen = []
    assert cli.run_main(lambda argv: seen.append(argv) or cli.STOPPED, ["--a", "1"]) == cli.STOPPED == 4
    assert seen == [["--a", "1"]]


def test_codes_are_distinct_and_documented():
    codes = {name: value for name, value in vars(cli).items() if name.isupper() and isinstance(value, int)}
    assert len(set(codes.values())) == len(codes) == 9
    for name, value in codes.items():
        assert any(
            line.split("|")[1:3] == [f" {value:<4} ", f" {name:<18} "]
            for line in cli.__doc__.splitlines()
            if line.startswith("|")
        ), name


def test_user_error_is_one_line(capsys):
    assert cli.run_main(raising(UserError("file x: bad, do y")), []) == cli.BAD_INPUT == 2
    assert capsys.readouterr().err == "error: file x: bad, do y\n"


def test_control_characters_in_names_do_not_break_the_line(capsys):
    cli.run_main(raising(UserError("file a\nb\x1b[2J\u2028: bad")), [])
    assert capsys.readouterr().err == "error: file a\\nb\\x1b[2J\\u2028: bad\n"


def test_a_path_that_the_system_refuses_is_named_in_one_line(capsys, tmp_path):
    for path in (tmp_path / ("a" * 300), tmp_path / "file" / "below"):
        (tmp_path / "file").touch()
        assert cli.run_main(lambda argv, path=path: path.stat() and 0, []) == cli.BAD_INPUT
        err = capsys.readouterr().err
        assert err.startswith(f"error: {path}: ") and err.count("\n") == 1


def test_names_that_the_terminal_cannot_show_do_not_end_the_program():
    program = (
        "import sys\nfrom detcore.cli import run_main\n"
        "sys.exit(run_main(lambda argv: print('a \\udcff b \\u65e5 c') or 0))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, b"a \\udcff b \\u65e5 c\n", b"")


def test_keyboard_interrupt(capsys):
    assert cli.run_main(raising(KeyboardInterrupt()), []) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_system_exit_passes_through():
    with pytest.raises(SystemExit):
        cli.run_main(raising(SystemExit(3)), [])


@pytest.mark.parametrize(
    "error, word",
    [
        (ValueError("boom"), "report"),
        (MemoryError(), "--batch-size"),
        (RuntimeError("Device out of memory. Tried to allocate 2 GiB"), "--batch-size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "--batch-size"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "--workers"),
        (RuntimeError("Storage size calculation overflowed with sizes=[1000000000000000000]"), "--batch-size"),
        (OSError(errno.ENOSPC, "No space left on device"), "free space"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), "report"),
        (BrokenPipeError("of a helper, not of stdout"), "report"),
    ],
)
def test_crash_shows_traceback_and_what_to_do(capsys, error, word):
    assert cli.run_main(raising(error), []) == cli.CRASH == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and type(error).__name__ in err
    assert word in err.splitlines()[-1]


def test_user_error_of_a_loader_process_keeps_only_its_own_words(capsys):
    torch = pytest.importorskip("torch")

    class Bad(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise UserError("image 7.jpg: not a JPEG; remove it")

    loader = torch.utils.data.DataLoader(Bad(), num_workers=1)
    assert cli.run_main(lambda argv: list(loader) and 0, []) == cli.BAD_INPUT
    assert capsys.readouterr().err == "error: image 7.jpg: not a JPEG; remove it\n"


def test_closed_pipe_is_quiet():
    program = (
        "import sys\nfrom detcore.cli import run_main\n"
        "def main(argv):\n    for i in range(100000): print('line', i)\n    return 0\nsys.exit(run_main(main))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 141
