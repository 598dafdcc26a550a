"""What MLPerf's rulesets say of the detection benchmarks, beyond the rule files of mlperf-logging. Sources: MLCommons
training_rules and submission_rules; the rule files, file counts and benchmark lists of mlperf-logging."""

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from detcore import UserError

DEFAULT = "5.1.0"
ROUNDS = 5  # runs of a result, of each detection benchmark in every ruleset
ROOT = Path(__file__).resolve().parents[2]


class Facts(NamedTuple):
    """targets: metric and what it must reach. train, val: how many images count as the data set's. program: the folder
    of this repository whose benchmark it is."""

    model: str
    targets: dict[str, float]
    train: frozenset[int]
    val: frozenset[int]
    data: str
    program: str


RETINANET = Facts(
    "RetinaNet ResNeXt50-32x4d", {"mAP": 0.34}, frozenset({1170301}), frozenset({24781}), "OpenImages-MLPerf",
    "single_stage_detector",
)  # fmt: skip
SSD300 = Facts(
    "SSD300 ResNet34", {"mAP": 0.23}, frozenset({118287, 117266}), frozenset({5000, 4952}), "COCO 2017", "ssd300"
)
MASKRCNN = Facts(
    "Mask R-CNN R50-FPN", {"BBOX": 0.377, "SEGM": 0.339}, frozenset({118287, 117266}), frozenset({5000, 4952}),
    "COCO 2017", "maskrcnn",
)  # fmt: skip
EFFICIENTDET = Facts(
    "EfficientDet-D0", {"mAP": 0.34}, frozenset({118287, 117266}), frozenset({5000, 4952}), "COCO 2017", "efficientdet"
)


def facts(benchmark: str, ruleset: str) -> Facts | None:
    """What a detection benchmark is in a ruleset, by its name in logs; None for other benchmarks."""
    if benchmark == "ssd":
        return RETINANET if int(ruleset.split(".")[0]) >= 2 else SSD300
    known = {"retinanet": RETINANET, "maskrcnn": MASKRCNN}
    if benchmark == "efficientdet":  # of this project, in no ruleset
        return EFFICIENTDET
    if benchmark == "ssd300":  # likewise
        return SSD300._replace(model="SSD300 v1.1", targets={"mAP": 0.25})
    return known.get(benchmark)


@cache
def rulesets() -> dict[str, set[str]]:
    """Each training ruleset of the installed checker, with the names of its rule files such as closed_retinanet."""
    package = importlib.util.find_spec("mlperf_logging")
    if package is None:
        raise UserError(f"mlperf-logging is missing in {sys.executable}: pip install mlperf-logging")
    folder = Path(package.origin).parent / "compliance_checker"
    return {
        path.name.removeprefix("training_"): {rules.stem for rules in path.glob("*.yaml")}
        for path in sorted(folder.glob("training_*.*.*"))
        if re.fullmatch(r"training_\d+\.\d+\.\d+", path.name)
    }


def known(ruleset: str) -> str:
    """The ruleset itself. Raises UserError for one that mlperf-logging does not have."""
    if ruleset not in rulesets():
        raise UserError(f"ruleset {ruleset!r} is not known to mlperf-logging; choose one of {', '.join(rulesets())}")
    return ruleset


def no_rules(benchmark: str, division: str, ruleset: str) -> str:
    """Why a ruleset can't judge a benchmark, and which can; empty if it can."""
    if f"{division}_{benchmark}" in rulesets()[ruleset]:
        return ""
    have = [name for name, files in rulesets().items() if f"{division}_{benchmark}" in files]
    hint = (
        f"these have: {', '.join(have)}; choose one by --ruleset or MLPERF_RULESET"
        if have
        else "no other has them either"
    )
    words = f"ruleset {ruleset} has no rules for {benchmark} ({division} division); {hint}"
    if benchmark == "retinanet":
        words += "; rulesets 2.0 to 4.1 call it ssd"
        if int(ruleset.split(".")[0]) >= 6:
            words += "; MLPerf retired RetinaNet after 5.1, so a new result of it can't be submitted to this round"
    elif benchmark == "maskrcnn" and have:
        words += f"; MLPerf retired Mask R-CNN after {have[-1].rsplit('.', 1)[0]}"
    return words


def own_rules(benchmark: str, ruleset: str) -> Path | None:
    """This project's rule file (tools/rules_<benchmark>.yaml), where the ruleset has none for this benchmark."""
    if not re.fullmatch(r"\w+", benchmark) or f"closed_{benchmark}" in rulesets()[ruleset]:
        return None
    rules = ROOT / "tools" / f"rules_{benchmark}.yaml"
    return rules if rules.is_file() else None
