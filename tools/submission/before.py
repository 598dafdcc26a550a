"""Why the runs of a job can't become a result of the closed division: said before the clock starts, all at once."""

import os
import re
from collections.abc import Mapping

from .lint import is_placeholder
from .rcp import reference
from .rulesets import DEFAULT, ROUNDS, rulesets

BENCHMARKS = {"single_stage_detector": "retinanet", "maskrcnn": "maskrcnn"}  # programs: names in the newest rulesets
_DATA = {"single_stage_detector": "openimages-mlperf", "maskrcnn": "coco"}  # programs: --dataset of the benchmark
_LEFT_OUT = {
    "--synthetic": "random images are no data set (--synthetic)",
    "--no-pretrained": "the reference begins with weights of ImageNet (--no-pretrained)",
    "--resume": "a resumed run has a log in parts (--resume)",
}


def obstacles(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Each reason in words, from the variables of a job (README.md lists them); empty if there is none."""
    found = []
    options = re.sub(r"[=_]", lambda m: " " if m[0] == "=" else "-", environ.get("EXTRA_PARAMS", "")).split()
    given = {word: options[i + 1] if i + 1 < len(options) else "" for i, word in enumerate(options)}
    org = environ.get("MLPERF_SUBMISSION_ORG", "unset")
    if is_placeholder(org):
        found.append("MLPERF_SUBMISSION_ORG was never set, so that the logs will not say whose they are")
    division = given.get("--mlperf-division") or given.get("--division") or environ.get("MLPERF_DIVISION") or "closed"
    if division != "closed":
        found.append(f"it is for the {division} division (MLPERF_DIVISION)")
    if environ.get("SEED") or "--seed" in given:
        found.append("seeds are fixed (SEED): the closed division wants them drawn by each run")
    if environ.get("CLEAR_CACHES", "1") == "0":
        found.append("caches are not dropped (CLEAR_CACHES=0), so the logs will lack cache_clear")
    if environ.get("RESUME", "0") == "1":
        found.append("a trial that is resumed (RESUME=1) has a log in parts, which is no result")
    if environ.get("USE_SYNTHETIC_DATA", "0") == "1":
        found.append("random images are no data set (USE_SYNTHETIC_DATA)")
    if environ.get("NEXP", "1") != str(ROUNDS):
        found.append(f"NEXP is {environ.get('NEXP', '1')}, a result has exactly {ROUNDS} runs")
    data, own = given.get("--dataset"), _DATA.get(environ.get("BENCHMARK", ""))
    if data and own and data != own:
        found.append(f"it trains on another data set (--dataset {data})")
    found += [words for flag, words in _LEFT_OUT.items() if flag in given]
    return found + _rules(environ, given)


def _rules(environ: Mapping[str, str], given: Mapping[str, str]) -> list[str]:
    """What the ruleset says of the benchmark and its batch."""
    program, ruleset = environ.get("BENCHMARK", ""), environ.get("MLPERF_RULESET") or DEFAULT
    name = BENCHMARKS.get(program)
    if ruleset not in rulesets():
        return [f"mlperf-logging knows no ruleset {ruleset} (MLPERF_RULESET)"]
    if name == "retinanet" and f"closed_{name}" not in rulesets()[ruleset]:
        return [f"ruleset {ruleset} has no rules for logs of {name}: 5.0.0 and 5.1.0 have (MLPERF_RULESET)"]
    if name is None or f"closed_{name}" not in rulesets()[ruleset]:
        return [f"ruleset {ruleset} has no benchmark {name or program}"] if program else []
    texts = [environ.get(key) or "1" for key in ("DGXNNODES", "DGXNGPU")]
    texts += [
        given.get("--batch-size") or environ.get("BATCHSIZE") or "",
        given.get("--accumulate") or given.get("--gradient-accumulation-steps") or "1",
    ]
    if not all(re.fullmatch(r"[1-9][0-9]{0,6}", text) for text in texts):
        return []
    batch = 1
    for text in texts:
        batch *= int(text)
    point, words = reference(name, batch, ruleset)
    return [] if point is not None else [words]
