"""Command lines of the original train.py and validate.py, and of YAML files for their --config, as this program's."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from detcore import UserError
from detcore.config import Words, refuse_word, spellings
from efficientdet.config import IGNORED_FLAGS, OPTIMIZERS, Config

_SAME = {
    "--freeze-layer": "--freeze-layers", "--worker": "--workers", "--data-folder": "--dataset-path",
}  # fmt: skip
"""What the original's texts and scripts call flags of another name."""

_REFUSED = {  # flag: (values that change nothing, why there are no others); None instead: a switch
    "--mixup": (("0", "0.0"), "the original parses it and never mixes images; leave it out"),
    "--mixup-off-epoch": (("0",), "the original parses it and never mixes images; leave it out"),
    "--drop": (("0", "0.0"), "the original builds every network without dropout; leave it out"),
    "--dist-group-size": (("0",), "the original never forms groups; --sync-bn takes all processes"),
    "--lr-noise-std": (("1", "1.0"), "the original never uses it; --lr-noise-pct limits the noise"),
    "--eval-metric": (("map",), "the primary metric is AP, with --waymo L2_ALL_NS"),
    "--dist-bn": (("", "broadcast"), "evaluation takes the statistics of the first process for all; --sync-bn has "
                  "them of all"),
    "--anno": (("val2017",), "say what to evaluate on with --val-annotations-file FILE --val-data-path FOLDER"),
    "--start-epoch": ((), "--resume goes on with the epoch where the run was, to the same bits"),
    "--no-resume-opt": (None, "to train on from weights alone, begin a run with --initial-checkpoint FILE"),
}  # fmt: skip

_EMPTY = ("--interpolation", "--initial-checkpoint", "--checkpoint", "--pretrained-backbone-path", "--results")
"""Flags whose value in the originals is empty where nothing is said."""


def translate_flags(argv: Sequence[str]) -> Words:
    """A command line for the original programs with the flags of this one; one for this program stays as it is.

    Underscores in flags become dashes, a word that belongs to no flag is the data folder, lists are joined. What YAML
    files of `-c FILE` say, under the names of flags, stands apart. Raises UserError for a file that is none, and for
    values that nothing here does.
    """
    found = list(_parts(argv))
    files = [values[0] for flag, values in found if flag in ("-c", "--config") and values]
    of_files = [part for file in files for part in _file_parts(Path(file))]
    of_argv = [(flag, values) for flag, values in found if flag not in ("-c", "--config")]
    folders = [*dict.fromkeys(values[0] for flag, values in of_files + of_argv if flag == "--data-folder")]
    if len(folders) > 1:
        raise UserError(f"{' and '.join(folders)}: only the data folder may stand without a flag before it")
    every = of_files + of_argv
    said = [values for flag, values in every if flag == "--model-ema-decay"]
    decay = said[-1] if said else ["0.9998"]
    return Words(_meant(every) + _words(of_argv, decay), _words(of_files, decay), ", ".join(files))


def _meant(parts: Sequence[tuple[str, list[str]]]) -> list[str]:
    """What flags of the originals mean beside themselves, where nothing else says it: validate.py only evaluates."""
    flags, words = {flag for flag, _ in parts}, []
    if flags & {"--inference", "--anno", "--results"} and not flags & {"--mode", "--benchmark"}:
        words += ["--mode", "evaluate"]
    if "--inference" in flags and "--results" not in flags:
        words += ["--results", "results.json"]
    return words


def _words(parts: Sequence[tuple[str, list[str]]], decay: list[str]) -> list[str]:
    """In this program's words, where an average of the weights has the decay `decay`."""
    words: list[str] = []
    for flag, values in parts:
        _refuse(flag, values)
        if flag == "--model-ema":
            words += ["--ema-decay", *decay]
        elif flag != "--model-ema-decay" and flag not in _REFUSED:
            words += _own(flag, values)
    return words


def _parts(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with its values; "--data-folder" with a word that belongs to none."""
    known = spellings(Config)
    known |= {flag: count for flag, (count, _) in IGNORED_FLAGS.items()}
    known |= {flag: 0 if inert is None else 1 for flag, (inert, _) in _REFUSED.items()}
    known |= {"-c": 1, "--config": 1, "--amp": 0, "--no-amp": 0, "--model-ema": 0, "--model-ema-decay": 1}
    known |= {"--benchmark": 0, "--benchmark-steps": 1}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            yield "--data-folder", [word]
            continue
        flag, equals, attached = word.partition("=")
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        flag = _SAME.get(flag, flag)
        if not flag.startswith("--") and flag not in known:  # -b8
            flag, equals, attached = flag[:2], "=", word[2:]
        if flag not in known:
            refuse_word(word, flag, known)
        if equals:
            yield flag, [attached]
            continue
        count, values = known.get(flag, 0), []
        while words and (count is None or len(values) < count) and not words[0].startswith("--"):
            if words[0] in known:
                break
            values.append(words.pop(0))
        yield flag, values


def _file_parts(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The same from a YAML file: true is a flag, false, null and empty text are none."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: can't be read as YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: a YAML file of `flag: value` lines is needed")
    for key, value in content.items():
        flag = f"--{key}".replace("_", "-")
        flag = {"--data": "--data-folder", **_SAME}.get(flag, flag)
        if value is None or value is False or value == "" or key in ("config", "local_rank"):  # 0 says something
            continue
        if isinstance(value, list):
            yield from [(flag, [str(part) for part in value])] if value else []
        else:
            yield flag, [] if value is True else [str(value)]


def _refuse(flag: str, values: list[str]) -> None:
    """Raises UserError for what the original has, or claims to have, and this program has not."""
    if flag in _REFUSED:
        inert, why = _REFUSED[flag]
        if inert is None or " ".join(values) not in inert:
            raise UserError(f"{' '.join([flag, *values])}: {why}")
    if flag == "--sched" and values == ["plateau"]:
        raise UserError("--sched plateau: the original's fails at its first epoch; choose cosine or step")
    if flag == "--opt" and values and values[0] not in OPTIMIZERS:
        raise UserError(
            f"--opt {values[0]}: torch has no such optimizer that this program offers; choose one of "
            f"{', '.join(OPTIMIZERS)}"
        )


def _own(flag: str, values: list[str]) -> list[str]:
    """One flag in this program's words."""
    match flag:
        case "--amp":
            return ["--precision", "auto"]
        case "--no-amp":
            return ["--precision", "tf32"]
        case "--benchmark":
            return ["--mode", "benchmark-training"]
        case "--benchmark-steps":
            return ["--benchmark-iterations", *values] if values != ["0"] else []
        case "--data-folder":
            return ["--dataset-path", *values]
        case _ if flag in _EMPTY and values == [""]:
            return []
    if len(values) > 1:
        return [f"{flag}={','.join(values)}"]
    return [f"{flag}={values[0]}"] if values and values[0].startswith("-") else [flag, *values]
