import importlib
import sys

from detcore.cli import run_main

COMMANDS = {
    "lint": "logs against MLPerf's rules, in words",
    "rcp": "convergence against the reference, also while a job goes on",
    "score": "the olympic mean, scaled",
    "package": "logs, system description, code and READMEs into a submission's folders",
    "verify": "every official checker on a submission tree",
    "report": "one page about one run",
    "compare": "several runs, systems or rounds side by side",
    "published": "a folder of published results, packaged and verified: where do the verdicts differ",
}


def main(argv: list[str]) -> int:
    if argv and argv[0] in COMMANDS:
        return importlib.import_module(f"tools.submission.{argv[0]}").main(argv[1:])
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {words}" for name, words in COMMANDS.items()]
    asked = argv[:1] in (["--help"], ["-h"])
    text = "\n".join(["usage: python -m tools.submission COMMAND [--help] ...", "", *lines])
    print(text if asked else f"{text}\n\nerror: {argv[0]!r} is no command" if argv else text,
          file=sys.stdout if asked else sys.stderr)  # fmt: skip
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(run_main(main))
