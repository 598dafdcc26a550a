"""The table of a check."""

from tools.gpu_check import columns, table


def full_state() -> dict:
    """What a check on a large GPU could leave, with numbers as wide as they get."""
    times = {"ms": 12345.678, "p10_ms": 1.0, "p90_ms": 99999.9, "n": 100}
    speed = times | {"images_per_s": 12345.6, "images_per_s_p10": 12345.6, "images_per_s_p90": 12345.6}
    speed |= {"peak_gib": 139.9, "x_published": 12.34, "percent_of_flop_floor": 123.4}
    op = times | {"reference_ms": 99999.999, "speedup": 1234.5, "mb": 123456.7, "difference": 1e-300}
    group = {"passed": 1234, "failed": 12, "skipped_tests": 3, "not_run": 7}
    tests = group | {"groups": {"detcore": group}, "error": "12 failed: " + "tests.test_x::test_y, " * 20}
    families = {
        "batchnorm/elementwise": {"ms": 1234.56, "share": 0.5, "floor_ms": 0.0},
        "other": {"ms": 1, "share": 0.1, "floor_ms": None},
    }
    parts = {
        "tests": {"status": "failed", "seconds": 80.0, "rows": {"ops": tests}},
        "floor": {"status": "passed", "rows": {"copy": times | {"gb_s": 4300.0}, "bf16": times | {"tflop_s": 790.1}}},
        "ops": {"status": "passed", "rows": {"a very long name of an operation": op | {"percent_of_floor": 99.9}}},
        "train": {"status": "passed", "rows": {"bf16 b32 compiled+graph reference": speed}},
        "peers": {"status": "stopped", "reason": "out of time", "rows": {"torchvision bf16 b32 compiled parts": speed}},
        "inference": {"status": "passed", "rows": {"forward+postprocess bf16 b128 eager reference": speed}},
        "ssd300": {"status": "passed", "rows": {"training bf16 b128 compiled+graph reference": speed}},
        "efficientdet": {"status": "passed", "rows": {"inference bf16 b64 eager reference": speed}},
        "profile": {"status": "passed", "rows": {"x": {"ms": 1.0, "families": families, "next": ["a" * 200]}}},
        "losses": {"status": "passed", "rows": {"x": {"largest": 1e-9, "steps": 200, "tolerance": 0.02}}},
        "bccd": {"status": "passed", "rows": {"graph native": {
            "AP": 0.48, "AP50": 0.84, "epochs": 18, "seconds": 12345.6, "seconds_to_AP_0.4": 123.4,
            "median_images_per_s": 12345.6}}},
    }  # fmt: skip
    clock = {"when": "start", "driver": "580.159.03", "sm_mhz": "1980", "memory_mhz": "3201", "temperature_c": "55"}
    machine = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0+cu130", "cuda": "13.0", "python": "3.12.3"}
    return {"version": 1, "machine": machine, "commit": "0123456789ab+changes", "clocks": [clock], "parts": parts}


def test_the_table_fits_and_tells_published_from_measured():
    text = table.table(full_state())
    assert max(map(len, text.splitlines())) <= 100
    assert "291.2 images/s a H100, of 8 (published MLPerf result, not measured here)" in text
    assert "our target on one H100: 400 images/s, bf16, batch 32 (a target, not measured)" in text
    assert "our targets on one H100, images/s: training 2500, inference 6000 (targets, not measured)" in text
    assert "published for one A100, images/s: training 724, inference 970 (not measured here)" in text
    assert "FAILED ops: 12 failed" in text and "out of time" in text
    assert "ops detcore: 1234 of 1246 passed, 3 skipped, 7 not run" in text
    assert "bf16 790 TFLOP/s" in text and "copy 4,300 GB/s" in text


def test_a_row_that_is_not_as_it_should_be_does_not_end_a_check():
    saved = full_state()
    del saved["parts"]["train"]["rows"]["bf16 b32 compiled+graph reference"]["images_per_s_p10"]
    text = table.table(saved)
    assert "speed: a row is not as it should be (KeyError: 'images_per_s_p10'); see the JSON" in text
    assert "SSD300" in text and "copy 4,300 GB/s" in text


def test_rows_of_another_commit_have_a_mark_however_long_their_keys_are():
    saved = full_state()
    for part in saved["parts"].values():
        for row in part["rows"].values():
            row["commit"] = "old"
    text = table.table(saved)
    assert "not as it should be" not in text and max(map(len, text.splitlines())) <= 100
    assert "copy* 4,300 GB/s" in text and "forward+postprocess bf16 b128 eager reference*" in text
    assert "bf16 b32 compiled+graph reference*" in text and "graph native*" in text
    assert columns.cut("x" * 50 + "*", 34) == "x" * 33 + "*" and columns.cut("x" * 50, 34) == "x" * 34
