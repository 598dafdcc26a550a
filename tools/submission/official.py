"""mlperf-logging's own checkers, called in this process so that a crash is never read as an answer.

Each function returns a Said: whether the checker came to its end, its verdict, and its words. What the checkers do
wrong is put right here and nowhere else: a rule left in the queue by a crash, return values that are always False, a
table of flags that is read only without its newline, rule files named by the log itself, and results changed in
place.
"""

import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TextIO

_NAME = re.compile(r"\w{1,40}", re.ASCII)


class Said(NamedTuple):
    """ran: the checker came to its end; without that, ok is False and `words` say what stopped it."""

    ran: bool
    ok: bool
    words: str
    value: Any = None

    @property
    def errors(self) -> str:
        """Its errors in one line; if it has none, its last line."""
        blocks = re.split(r"^(?:ERROR|INFO|WARNING) - ", self.words, flags=re.MULTILINE)
        kinds = re.findall(r"^(ERROR|INFO|WARNING) - ", self.words, flags=re.MULTILINE)
        errors = [" ".join(text.split()) for kind, text in zip(kinds, blocks[1:]) if kind == "ERROR"]
        lines = [line.strip() for line in self.words.splitlines() if line.strip()]
        return "; ".join(errors) or (lines[-1] if lines else "it said nothing")


def _call(function: Callable[[], tuple[bool, Any]]) -> Said:
    """Runs a checker; function returns (accepted, value)."""
    with _listening() as said:
        try:
            ok, value = function()
        except (Exception, SystemExit) as error:
            return Said(False, False, f"{said.getvalue()}the checker broke down: {type(error).__name__}: {error}")
    return Said(True, bool(ok), said.getvalue(), value)


@contextmanager
def _listening() -> Iterator[io.StringIO]:
    """Gathers all that the body logs, prints and warns of, in the form of the official commands."""
    said, root = io.StringIO(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    handler = logging.StreamHandler(said)
    handler.setFormatter(logging.Formatter("%(levelname)s - %(message)s"))
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(record=True) as caught, redirect_stdout(said), redirect_stderr(said):
            warnings.simplefilter("always")
            yield said
            said.write("".join(f"WARNING - {one.message}\n" for one in caught))
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def harmful(values: list[Any]) -> str:
    """Why logs with these divisions and benchmarks must not reach a checker: it loads the rule file that they name."""
    for value in values:
        if not isinstance(value, str) or not _NAME.fullmatch(value):
            return f"not called: a log names its division or benchmark {str(value)[:60]!r}, which would become a path"
    return ""


class RuleFiles:
    """Stands for yaml in the compliance checker, which parses the same rule files anew for every log: here once."""

    BaseLoader = None

    @staticmethod
    def load(file: TextIO, Loader: Any) -> Any:
        return _rules(file.name)


@cache
def _rules(path: str) -> Any:
    import yaml

    with open(path, encoding="utf-8") as file:
        return yaml.load(file, Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))


def _checker() -> Any:
    """The compliance checker's module, without the rules that a check which broke down left for the next one."""
    from mlperf_logging.compliance_checker import mlp_compliance

    mlp_compliance.yaml = RuleFiles
    mlp_compliance.enqueued_configs.clear()
    return mlp_compliance


class Compliance(NamedTuple):
    """The compliance checker's complaints, as it worded them: what made it refuse the log, and warnings."""

    errors: list[str]
    warnings: list[str]


def compliance(path: Path, ruleset: str, config: Path | None = None) -> Said:
    """One log against the rules; value: Compliance. config: other rules than those of the ruleset."""

    def check() -> tuple[bool, Compliance]:
        mlp_compliance = _checker()
        checker = mlp_compliance.make_checker("training", ruleset, quiet=False, werror=False)
        valid, *_ = mlp_compliance.main(str(path), str(config or f"training_{ruleset}/common.yaml"), checker)
        logging.log(logging.INFO if valid else logging.ERROR, "SUCCESS" if valid else "FAILED")
        errors = [*checker.overwritable.values(), *checker.not_overwritable]
        return valid, Compliance(errors, list(checker.warnings.values()))

    return _call(check)


def system_description(path: Path, ruleset: str) -> Said:
    """The JSON of a system."""

    def check() -> tuple[bool, None]:
        from mlperf_logging.system_desc_checker.system_desc_checker import check_system_desc

        return check_system_desc(str(path), "training", ruleset)[0], None

    return _call(check)


def convergence(folder: Path, ruleset: str, bypass: bool = False) -> Said:
    """The result_*.txt of a folder against the reference points; value: (message, scaling factor). Writes nothing."""

    def check() -> tuple[bool, tuple[str, float]]:
        from mlperf_logging.rcp_checker.rcp_checker import check_directory

        passed, words, factor = check_directory(
            str(folder), "training", ruleset, False, False, rcp_pass="pruned_rcps", rcp_bypass=bypass
        )
        if not passed:
            logging.error("RCP test failed: %s", words)
        return passed, (words, float(factor))

    return _call(check)


def package(folder: Path, ruleset: str, rcp_bypass: bool = False, seed_bypass: bool = False) -> Said:
    """An organisation's folder: counts, logs, seeds, convergence, systems. Writes or removes scaling.json in it."""

    def check() -> tuple[bool, None]:
        from mlperf_logging.package_checker import package_checker

        _checker()
        # The command prints its verdict and returns nothing; these are the two calls it consists of.
        systems = package_checker.check_systems(str(folder), "training", ruleset)
        results = package_checker.check_training_result_files(
            str(folder), "training", ruleset, False, False, rcp_bypass, False, seed_bypass
        )
        return systems and results, None

    return _call(check)


def repository(folder: Path) -> Said:
    """Names, sizes and links below a folder. Links that are sound, but relative, it takes for broken ones: not here."""

    def check() -> tuple[bool, None]:
        from mlperf_logging.repo_checker import repo_checker

        files = repo_checker.list_files_recursively(str(folder))
        folders = repo_checker.list_dirs_recursively(str(folder))
        for name in (*files, *folders):
            name.encode()  # a name that is no text ends the official command as well
        # The command itself returns False in any case; these are its checks.
        links = [file for file in files if Path(file).is_symlink()]
        broken = [file for file in links if not Path(file).exists()]
        if broken:
            logging.error("broken symbolic links: %s", ", ".join(broken))
        good = [file for file in files if file not in set(broken)]
        return (
            repo_checker._check_bad_filenames(files, folders) and repo_checker._check_file_sizes(good) and not broken
        ), None

    return _call(check)


def summary(folder: Path, benchmark: str, ruleset: str) -> Said:
    """The score of an organisation that has a single result; value: minutes as in the table of results, or None."""

    def check() -> tuple[bool, float | None]:
        from mlperf_logging.result_summarizer.result_summarizer import summarize_results

        _checker()
        table, *_ = summarize_results(str(folder), "training", ruleset)
        score = table[benchmark].iloc[0] if len(table) else None
        score = None if score is None or math.isnan(score) else float(score)
        return score is not None, score

    return _call(check)
