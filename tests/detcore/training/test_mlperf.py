"""The event log as the official parser reads it."""

import json
import mmap
from ctypes import CDLL, addressof, c_char, c_size_t, c_ubyte, c_void_p, get_errno

import pytest
from mlperf_logging.compliance_checker.mlp_parser import parse_file

from detcore import UserError
from detcore.training.config import RunConfig
from detcore.training.mlperf import ABORTED, SUCCESS, MLPerfLog, drop_file_cache


def test_the_official_parser_reads_every_line(tmp_path):
    path = tmp_path / "result_0.txt"
    log = MLPerfLog(path)
    log.submission("retinanet", RunConfig(mlperf_org="us", mlperf_division="open"))
    log.event("eval_accuracy", 0.25, epoch_num=3)
    log.run_start()
    log.run_stop(SUCCESS)
    log.run_stop(ABORTED)
    log.close()
    lines, failed = parse_file(str(path), ruleset="5.1.0")
    assert not failed
    assert [line.key for line in lines[-3:]] == ["run_start", "run_stop", "status"]
    assert {line.key: line.value["value"] for line in lines}["submission_org"] == "us"
    accuracy = json.loads(path.read_text().splitlines()[5].removeprefix(":::MLLOG "))
    assert accuracy["metadata"]["epoch_num"] == 3 and accuracy["metadata"]["file"].endswith("test_mlperf.py")


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path):
    for append in (False, True):
        log = MLPerfLog(tmp_path / "r.txt", append=append)
        log.event("seed", 1)
        log.close()
    assert len((tmp_path / "r.txt").read_text().splitlines()) == 2


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = MLPerfLog(None)
    log.event("seed", 1)
    log.run_start()
    log.run_stop(SUCCESS)
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output-dir"):
        MLPerfLog(tmp_path / "file/result_0.txt")


def resident_pages(path) -> int:
    """How many of a file's pages are in the page cache, by mincore(2)."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        pages = -(-len(memory) // mmap.PAGESIZE)
        flags = (c_ubyte * pages)()
        start = (c_char * len(memory)).from_buffer(memory)
        mincore = CDLL(None, use_errno=True).mincore
        mincore.argtypes = (c_void_p, c_size_t, c_void_p)
        assert mincore(addressof(start), len(memory), flags) == 0, get_errno()
        del start
        return sum(flag & 1 for flag in flags)


def test_dropping_the_file_cache_really_drops_it(tmp_path):
    path = tmp_path / "sub" / "image.jpg"
    path.parent.mkdir()
    path.write_bytes(b"x" * mmap.PAGESIZE * 8)
    if resident_pages(path) != 8:
        pytest.skip("this file system does not keep written files in the page cache")
    assert drop_file_cache([tmp_path]) == 1
    assert resident_pages(path) == 0
