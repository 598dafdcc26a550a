"""The compliance checker's complaints in words for somebody who never saw its rule files."""

import json
import math
import re

from .logs import TOKEN, Log, metrics, number
from .rulesets import facts

INIT_MINUTES = {"closed": 30, "open": 240}
_REQUIRED = re.compile(
    r"Required (EXACTLY_ONE|AT_LEAST_ONE|AT_LEAST\(\d+\)) occurrence of '(\w+)' but found (\d+)(.*)", re.S
)
_EITHER = re.compile(r"Required AT_LEAST_ONE occurrence of ('\w+'(?: or '\w+')+)$")
_CHECK = re.compile(r"CHECK for '(\w+)' failed in line \d+:\n(.*?)\nfailed test: (.*?)\ncurrent context", re.S)
_EXECUTING = re.compile(
    r"Failed executing (?:CHECK code|code \w+ code).*?triggered by line\s*:\n(.*?)(?:\ncurrent context|$)", re.S
)
_AT_LEAST_ONE = re.compile(r"Failed checks for (\w+) : (.*)", re.S)
_WHY = {
    "submission_division": "without it no rule of a division or benchmark was applied",
    "submission_org": "set MLPERF_SUBMISSION_ORG before the run",
    "submission_platform": "set MLPERF_SUBMISSION_PLATFORM before the run",
    "cache_clear": "the page cache was not dropped before the run: CLEAR_CACHES=1, or --drop-file-cache",
    "run_stop": "the run was killed or still goes on",
    "eval_accuracy": "nothing was evaluated",
}


def in_words(complaint: str, log: Log, ruleset: str) -> str:
    """One complaint of the checker in one line, for the reader of this log."""
    if match := _REQUIRED.match(complaint):
        return _occurrence(match, log)
    if match := _EITHER.match(complaint):
        return f"{match[1].replace(chr(39), '').replace(' or ', ' and ')} are missing, one of them is wanted"
    if match := _CHECK.match(complaint):
        return _failed(match[1], match[2], match[3].strip(), log)
    if match := _EXECUTING.search(complaint):
        event = _event(match[1])
        return f"{event.get('key', 'an event')} is {_short(event.get('value'))}, to which its rule can't be applied"
    if match := _AT_LEAST_ONE.match(complaint):
        return _best(match[1], log, ruleset) or f"no {match[1]} satisfies its rule: {match[2].strip()}"
    if complaint.startswith("Log lines had parsing errors"):
        lines = f"{log.bad} lines look" if log.bad > 1 else "a line looks"
        return f"{lines} like an event and can't be read: is it cut, or are two merged?"
    return " ".join(complaint.split())[:300]


def _occurrence(match: re.Match[str], log: Log) -> str:
    key, found, values = match[2], int(match[3]), match[4]
    why = f": {_WHY[key]}" if key in _WHY else ""
    if key == "run_stop" and log.values("run_start") == []:
        why = ": the run ended before its clock started"
    if found == 0:
        return f"{key} is missing{why}"
    return f"{key} stands there {found} times{values.replace(' with different values:', ', with different values')}"


def _failed(key: str, line: str, test: str, log: Log) -> str:
    event = _event(line)
    value, test = event.get("value"), " ".join(test.split())
    if "first_init_start" in test:
        start, stop = log.first("init_start"), log.first("init_stop")
        limit = INIT_MINUTES.get(log.name("submission_division"), 30)
        starts = [e.time_ms for e in log.events if e.key == "init_start"]
        minutes = (stop.time_ms - min(starts)) / 60000 if start and stop else math.nan
        return (
            f"{minutes:.0f} min of initialisation (from the first init_start to init_stop), less than {limit} allowed"
        )
    if re.match(r"(not )?\(?\s*s\['", test):
        state = re.search(r"'(\w+)'", test)[1].replace("_started", "_start").replace("_stopped", "_stop")
        order = "after" if test.startswith("not ") else "without, or before,"
        return f"{key} stands {order} {state}: the order is init_start, init_stop, run_start, run_stop"
    if match := re.search(r"v\['value'\] in (\[.*\])", test):
        return f"{key} is {_short(value)}, one of {match[1][1:-1]} is wanted"
    if re.search(r"v\['value'\] != ''", test):
        return f"{key} is empty"
    if match := re.fullmatch(r"\(?\s*v\['value'\] (==|>=|>|<=|<) ([\w.'-]+)\s*\)?", test):
        relation = {"==": "", ">=": "at least ", ">": "more than ", "<=": "at most ", "<": "less than "}[match[1]]
        return f"{key} is {_short(value)}, {relation}{match[2]} is wanted"
    if match := re.search(r"'(\w+)' in v\['metadata'\]", test):
        names = re.findall(r"'(\w+)' in v\['metadata'\]", test)
        return f"{key} {_short(value)} has no {' or '.join(names)} in its metadata"
    return f"{key} is {_short(value)}, which fails the test {test}"


def _best(key: str, log: Log, ruleset: str) -> str:
    """How far the run came towards its target."""
    about = facts(log.name("submission_benchmark"), ruleset)
    if key != "eval_accuracy" or about is None:
        return ""
    odd = [value for _, value in log.evaluations if not metrics(value)]
    if odd:
        return (
            f"eval_accuracy is {_short(odd[0])} in {len(odd)} of {len(log.evaluations)} evaluations, a number is wanted"
        )
    words = []
    for name, target in about.targets.items():
        found = [(metrics(value).get(name), epoch) for epoch, value in log.evaluations]
        found = [(value, epoch) for value, epoch in found if value is not None]
        if not found:
            return f"eval_accuracy has no {name}"
        value, epoch = max(found, key=lambda pair: pair[0])
        after = f" (after epoch {epoch:g})" if number(epoch) is not None else ""
        words.append(f"best {name} {value:.4f}{after}, the target is {target:.3f}")
        if value >= 1:
            words.append("a value must be below 1: is it in per cent?")
    return f"{'; '.join(words)}: {len(log.evaluations)} evaluations"


def _event(line: str) -> dict:
    try:
        event = json.loads(line.strip().rpartition(TOKEN)[2])
    except (ValueError, RecursionError):
        return {}
    return event if isinstance(event, dict) else {}


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
