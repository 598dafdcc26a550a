"""dllogger's lines: values in use, an epoch's own time, and files that can't be written are refused at the start."""

import json
from pathlib import Path

import pytest
import torch

from detcore import UserError
from detcore.device import select
from detcore.evaluation.coco import METRICS
from detcore.training.records import JsonSummary
from ssd300 import train
from ssd300.config import Config
from ssd300.records import Records


def lines(path: Path) -> list[dict]:
    return [json.loads(line.removeprefix("DLLL ")) for line in path.read_text().splitlines()]


def coco_names(folder: Path) -> Path:
    """A folder with the names of COCO 2017, and nothing in them: what is looked at before a program begins."""
    (folder / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (folder / split).mkdir()
        (folder / f"annotations/instances_{split}.json").touch()
    return folder


def summary(config: Config, best: float | None = None) -> list[dict]:
    """Data of the lines of a run that ends after its only evaluation."""
    records = Records(config, JsonSummary(config.json_summary))
    records("start", {"config": {"seed": 77}})
    records("end", {"time_s": 1.0, "best": best})
    return [line["data"] for line in lines(config.json_summary)]


@pytest.mark.parametrize(("precision", "amp", "used"), [("auto", False, "fp32"), ("bf16", True, "bf16"),
                                                        ("tf32", False, "tf32")])  # fmt: skip
def test_settings_are_those_in_use(tmp_path, precision, amp, used):
    config = Config(json_summary=tmp_path / "s.json", device="cpu", precision=precision, legacy=True)
    said = summary(config)[0]
    assert said["seed"] == 77 and said["AMP"] is amp and said["no cuda"] is True and said["precision"] == used
    assert said["lr decay epochs"] == [42, 53] and said["eval batch size"] == 32


@pytest.mark.parametrize(
    ("device", "given", "said"), [("cuda", 0, "auto"), ("cuda", 8, 8), ("tpu", 0, 32), ("tpu", 8, 8)]
)
def test_the_batch_of_evaluations_is_the_gpus_to_find(tmp_path, monkeypatch, device, given, said):
    monkeypatch.setattr(select, "resolve", lambda *_: (device, "bf16"))
    data = summary(Config(json_summary=tmp_path / "s.json", eval_batch_size=given))[0]
    assert data["eval batch size"] == said and data["no cuda"] is (device == "tpu") and data["AMP"] is True


@pytest.mark.parametrize("best", [0.25, -1.0, None])
def test_the_best_is_that_of_the_whole_run(tmp_path, best):
    assert summary(Config(json_summary=tmp_path / "s.json", device="cpu"), best)[-1]["mAP"] == best


def test_an_earlier_summary_stays_until_the_first_line(tmp_path):
    path = tmp_path / "new/s.json"
    JsonSummary(path).log((), {"run": 1})
    JsonSummary(path)
    assert [line["data"] for line in lines(path)] == [{"run": 1}]
    both = JsonSummary(path)
    both.log((), {"run": 2})
    both.log((), {"run": 3})
    JsonSummary(path, append=True).log((), {"run": 4})
    assert [line["data"]["run"] for line in lines(path)] == [2, 3, 4]


@pytest.mark.parametrize("path", ["/dev/null", "/dev/full"])
def test_the_summary_may_be_a_device(path):
    if path == "/dev/null":
        JsonSummary(Path(path)).log((), {"run": 1})
        return
    with pytest.raises(UserError, match=r"--json-summary /dev/full can't be written: No space left"):
        JsonSummary(Path(path)).log((), {"run": 1})


@pytest.mark.parametrize(
    ("mode", "option"), [(mode, option) for mode in ("training", "evaluation", "benchmark-inference")
                         for option in ("--save", "--json-summary") if mode == "training" or option != "--save"],
)  # fmt: skip
@pytest.mark.parametrize("where", ["/proc", "/proc/nope", "file/below", "taken"])
def test_what_can_not_be_written_is_refused_at_the_start(tmp_path, monkeypatch, mode, option, where):
    """taken: where --save lies a file, where the summary is to be a folder."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("taken").touch() if option == "--save" else Path("taken").mkdir()
    torch.save({"weight": torch.zeros(1)}, "w.pt")
    for module, name in ((train.engine, "train"), (train.inference, "evaluate"), (train, "benchmark")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("began"))
    with pytest.raises(UserError, match=rf"^{option} {where} can't be written: [A-Z].*Give another path"):
        train.main(
            [
                "--data",
                str(coco_names(tmp_path / "coco")),
                "--mode",
                mode,
                "--checkpoint",
                "w.pt",
                "--no-cuda",
                option,
                where,
            ]
        )


def test_other_ranks_leave_the_files_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(train.engine, "train", lambda *_: train.engine.Outcome(0, 1, None, None, 1.0))
    data = coco_names(tmp_path / "coco")
    assert train.main(["--data", str(data), "--no-cuda", "--save", "models", "--json-summary", "s.json"]) == 0
    assert list(tmp_path.iterdir()) == [data]


def test_evaluation_opens_its_summary_at_the_start(tmp_path, monkeypatch):
    summary, output = tmp_path / "s.json", tmp_path / "out"
    torch.save({"weight": torch.zeros(1)}, tmp_path / "w.pt")

    def evaluate(config, *_):
        assert lines(summary)[0]["step"] == "PARAMETER"
        output.mkdir()
        values = dict.fromkeys(METRICS, 0.5)
        (output / "evaluation.json").write_text(json.dumps(values))
        return 0

    monkeypatch.setattr(train.inference, "evaluate", evaluate)
    words = ["--mode", "evaluation", "--checkpoint", str(tmp_path / "w.pt"), "--no-cuda", "--output-dir", str(output)]
    data = coco_names(tmp_path / "coco")
    assert train.main([*words, "--data", str(data), "--json-summary", str(summary)]) == 0
    assert lines(summary)[-1]["data"] == {"mAP": 0.5}


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_is_what_the_gpu_computes_in(monkeypatch, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    assert select.resolve("auto", "auto") == ("cuda", expected)
    assert select.resolve("cuda", "tf32") == ("cuda", "tf32")
    assert select.resolve("cpu", "auto") == ("cpu", "fp32")
