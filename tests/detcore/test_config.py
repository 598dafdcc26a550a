"""Settings from defaults, environment and command line: precedence, kinds, refusals, and round trips of random ones."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detcore import UserError
from detcore.config import Words, above, at_least, between, describe, format_config, from_dict, load, option, to_dict


@dataclasses.dataclass(frozen=True)
class Config:
    batch_size: int = option(2, "images a process and step", env="BATCHSIZE", flags=("-b",), check=at_least(1))
    epochs: int = option(26, "last epoch", env="NUMEPOCHS", group="Schedule")
    lr: float = option(1e-4, "learning rate", env="LR", check=above(0), group="Schedule")
    warmup_factor: float = option(1e-3, "first factor", check=between(0, 1), group="Schedule")
    seed: int | None = option(None, "seed of the run; none draws one", env="SEED", flags=("-s",))
    dataset: str = option("openimages-mlperf", "layout", choices=("coco", "openimages", "openimages-mlperf"))
    dataset_path: Path = option(Path("/datasets"), "root", env="DATASET_DIR", flags=("--data-path",))
    output_dir: Path | None = option(None, "where results go")
    amp: bool = option(True, "mixed precision", env="AMP", flags=("--mixed",))
    note: str = option("", "free text", env="NOTE")
    image_size: tuple[int, int] = option((800, 800), "height width", env="IMAGE_SIZE", check=at_least(32))
    anchor_sizes: tuple[int, ...] = option((32, 64), "sizes")
    weights: tuple[float, ...] | None = option(None, "loss weights")
    colours: tuple[str, ...] = option((), "to paint with", env="COLOURS", choices=("red", "green", "blue"))

    def __post_init__(self):
        if self.epochs > 100 and self.batch_size == 1:
            raise UserError("epochs and batch_size do not fit")


IGNORED = {
    "--dali-cmn": (1, "there is no such cache"),
    "--cuda-graphs-syn": (0, "not needed"),
    "-q": (1, "nothing is asked"),
    "--two": (2, "a pair"),
}


def config(*argv, **environ):
    return load(Config, argv, environ, IGNORED).config


def test_defaults_then_environment_then_command_line():
    loaded = load(Config, ["-b", "8", "--no-amp"], {"BATCHSIZE": "4", "LR": "0.5", "PATH": "/bin", "NOTE": " "})
    assert loaded.config == dataclasses.replace(Config(), batch_size=8, lr=0.5, amp=False)
    assert loaded.sources["batch_size"] == "command line -b"
    assert loaded.sources["lr"] == "environment LR"
    assert loaded.sources["epochs"] == loaded.sources["note"] == "default"
    assert loaded.notices == []


@pytest.mark.parametrize(
    "argv, expected",
    [
        ("-b 3", {"batch_size": 3}),
        ("-b3", {"batch_size": 3}),
        ("-b=3", {"batch_size": 3}),
        ("--batch-size=3 --batch-size 5", {"batch_size": 5}),
        ("--data-path /x", {"dataset_path": Path("/x")}),
        ("--image-size 480 640", {"image_size": (480, 640)}),
        ("--image-size 480,640 --lr 1", {"image_size": (480, 640), "lr": 1.0}),
        ("--image-size=480,640", {"image_size": (480, 640)}),
        ("--anchor-sizes 1 2 3 --lr 1e-2", {"anchor_sizes": (1, 2, 3), "lr": 0.01}),
        ("--anchor-sizes -1 -2", {"anchor_sizes": (-1, -2)}),
        ("--anchor-sizes=", {"anchor_sizes": ()}),
        ("--seed 5 --seed none", {"seed": None}),
        ("--weights 1 .5 --weights none --amp", {"weights": None}),
        ("--weights 1 .5", {"weights": (1.0, 0.5)}),
        ("--colours red,blue --lr 1", {"colours": ("red", "blue"), "lr": 1.0}),
        ("--colours=", {"colours": ()}),
        ("--output-dir none --epochs -3", {"output_dir": None, "epochs": -3}),
        ("--no-mixed", {"amp": False}),
        ("--note=--strange", {"note": "--strange"}),
    ],
)
def test_command_line_forms(argv, expected):
    assert config(*argv.split()) == dataclasses.replace(Config(), **expected)


@pytest.mark.parametrize("text, value", [("1", True), ("true", True), ("TRUE", True), ("0", False), ("False", False)])
def test_booleans_in_the_environment(text, value):
    assert config(AMP=text).amp is value


@pytest.mark.parametrize("text", ["480,640", "480 640", "[480, 640]"])
def test_pairs_in_the_environment(text):
    assert config(IMAGE_SIZE=text).image_size == (480, 640)


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--batch_size 3", ["--batch_size", "did you mean --batch-size"]),
        ("--bach-size 3", ["did you mean --batch-size"]),
        ("--batch 3", ["unknown flag --batch", "--batch-size"]),
        ("--no-lr", ["unknown flag --no-lr"]),
        ("--dali-cm 3", ["did you mean --dali-cmn"]),
        ("-x", ["unknown flag -x"]),
        ("--batch-size abc", ["--batch-size", "'abc'", "whole number"]),
        ("--colours red,gren", ["--colours", "'red,gren'", "any of red, green, blue", "did you mean green"]),
        ("--batch-size 1.5", ["'1.5'", "whole number"]),
        ("--batch-size 0", ["--batch-size", "'0'", "1 or more"]),
        ("--batch-size 99999999999999999999999", ["whole number"]),
        ("--batch-size", ["--batch-size", "needs a value"]),
        ("--batch-size --lr 3", ["--batch-size", "needs a value"]),
        ("--note --lrr 3", ["--note", "needs a value"]),
        ("--batch-size none", ["'none'", "whole number"]),
        ("--lr nan", ["--lr", "finite number"]),
        ("--lr 1e999", ["finite number"]),
        ("--lr 0", ["more than 0"]),
        ("--warmup-factor 2", ["between 0 and 1"]),
        ("--seed x", ["whole number or none"]),
        ("--dataset openimage", ["--dataset", "one of coco, openimages", "did you mean openimages?"]),
        ("--image-size 800", ["--image-size", "'800'", "2 whole numbers"]),
        ("--image-size 8,9,10", ["2 whole numbers"]),
        ("--image-size 800 16", ["32 or more"]),
        ("--image-size 800 800 800", ["unexpected word '800'"]),
        ("--image-size 800 x", ["'800'", "2 whole numbers"]),
        ("--anchor-sizes a", ["--anchor-sizes", "whole numbers"]),
        ("--amp=1", ["--amp takes no value"]),
        ("stray", ["unexpected word 'stray'"]),
        ("--data-path=", ["--data-path", "a path"]),
        ("--note \udcff", ["--note"]),
        ("--epochs 101 -b 1", ["do not fit"]),
    ],
)
def test_refusals_name_flag_value_and_what_was_expected(argv, words):
    with pytest.raises(UserError) as caught:
        config(*argv.split())
    for word in words:
        assert word in str(caught.value)


def test_bad_variable_is_named():
    with pytest.raises(
        UserError, match=r"environment variable BATCHSIZE: 'many' is not valid, expected a whole number"
    ):
        config(BATCHSIZE="many")


@pytest.mark.parametrize(
    "name, meant",
    [
        ("BATCH_SIZE", "BATCHSIZE"),
        ("batchsize", "BATCHSIZE"),
        ("NUM_EPOCHS", "NUMEPOCHS"),
        ("NUM_EPOCH", "NUMEPOCHS"),
        ("DATASETDIR", "DATASET_DIR"),
        ("IMAGESIZE", "IMAGE_SIZE"),
        ("Seed", "SEED"),
    ],
)
def test_misspelt_variable_is_refused(name, meant):
    with pytest.raises(UserError, match=rf"{name}='7' is not known: did you mean {meant}\?"):
        config(**{name: "7"})


def test_other_variables_raise_no_alarm():
    common = (
        "PATH HOME USER LOGNAME SHELL PWD OLDPWD LANG TERM TMPDIR HOSTNAME SPEED SEEDS LS L SSH_TTY DISPLAY "
        "EDITOR DATADIR LOGDIR BACKBONE_DIR TORCH_HOME WARMUP_EPOCHS EVALBATCHSIZE WORLD_SIZE RANK LOCAL_RANK "
        "MASTER_ADDR MASTER_PORT OMP_NUM_THREADS NCCL_DEBUG SLURM_PROCID SLURM_NTASKS DGXSYSTEM DGXNGPU WALLTIME "
        "NEXP CONT NODE NOTES AMPS LOG_INTERVAL EPOCHS DATASET IMAGE BATCH PYTHONPATH VIRTUAL_ENV CONDA_PREFIX "
        "LD_LIBRARY_PATH MLPERF_SUBMISSION_ORG "
    )
    assert config(**dict.fromkeys(common.split(), "7")) == Config()


def test_ignored_flags_take_their_values_and_are_noticed_once():
    argv = "--dali-cmn 0 --lr 1 --cuda-graphs-syn --dali-cmn=3 -q 7 --two 1 2 -b 4 --dali-cmn"
    loaded = load(Config, argv.split(), {}, IGNORED)
    assert loaded.config == dataclasses.replace(Config(), lr=1.0, batch_size=4)
    assert len(loaded.notices) == 4
    assert loaded.notices[0] == "--dali-cmn has no effect here: there is no such cache"


def test_a_file_stands_below_the_environment_and_is_named_in_its_mistakes():
    words = Words(["--epochs", "3"], ["--epochs", "5", "--lr", "7", "--batch-size", "9"], "own.yaml")
    loaded = load(Config, words, {"LR": "8"})
    assert (loaded.config.epochs, loaded.config.lr, loaded.config.batch_size) == (3, 8.0, 9)
    sources = [loaded.sources[name] for name in ("epochs", "lr", "batch_size", "seed")]
    assert sources == ["command line --epochs", "environment LR", "file --batch-size", "default"]
    with pytest.raises(UserError, match=r"^own.yaml: --lr: 'fast' is not valid"):
        load(Config, Words([], ["--lr", "fast"], "own.yaml"), {})


def test_an_empty_list_reads_none():
    assert "; default none; variable COLOURS)" in re.sub(r"\s+", " ", describe(Config, "train", "Trains."))
    assert re.search(r"^colours +=  *none  *\(default\)$", format_config(Config(), load(Config, [], {}).sources), re.M)


def test_help_names_flag_default_variable_and_meaning_of_every_field():
    text = describe(Config, "train", "Trains.")
    blocks = re.split(r"\n  (?=-)", text)
    for field in dataclasses.fields(Config):
        meta = field.metadata["detcore.option"]
        flag = "--" + field.name.replace("_", "-")
        (block,) = [b for b in blocks if flag in re.split("[ ,/]+", b.split("\n")[0])]
        assert meta["help"] in block
        assert meta["env"] is None or f"variable {meta['env']}" in block
        assert all(flag.lstrip("-") in block for flag in meta["flags"])
        assert "default " in block
    assert text.index("Options:") < text.index("-b, --batch-size") < text.index("Schedule:") < text.index("  --lr")
    assert "--amp/--no-amp" in text and "one of coco, openimages, openimages-mlperf" in text and "--help" in text
    assert max(map(len, text.splitlines())) <= 100


def test_printed_configuration_is_aligned_and_names_sources():
    loaded = load(Config, ["--image-size", "64", "96"], {"LR": "2"})
    lines = format_config(loaded.config, loaded.sources).splitlines()
    assert len(lines) == len(dataclasses.fields(Config))
    assert len({line.index("=") for line in lines}) == len({line.rindex("  (") for line in lines}) == 1
    assert any(line.split() == ["image_size", "=", "64,96", "(command", "line", "--image-size)"] for line in lines)
    assert any(line.split() == ["lr", "=", "2.0", "(environment", "LR)"] for line in lines)


@pytest.mark.parametrize(
    "stored, words",
    [
        ({"batchsize": 3}, ["unknown key 'batchsize'", "did you mean batch_size"]),
        ({"batch_size": "3"}, ["batch_size", "'3'", "whole number"]),
        ({"batch_size": True}, ["whole number"]),
        ({"batch_size": 0}, ["1 or more"]),
        ({"amp": 1}, ["amp"]),
        ({"lr": float("nan")}, ["finite number"]),
        ({"lr": None}, ["lr", "None"]),
        ({"image_size": [1]}, ["2 whole numbers"]),
        ({"image_size": 800}, ["2 whole numbers"]),
        ({"anchor_sizes": [1, "a"]}, ["whole numbers"]),
        ({"dataset": "x"}, ["one of"]),
    ],
)
def test_stored_configuration_is_checked(stored, words):
    with pytest.raises(UserError) as caught:
        from_dict(Config, stored)
    for word in words:
        assert word in str(caught.value)


def test_mistakes_in_the_dataclass_are_the_programmers():
    @dataclasses.dataclass(frozen=True)
    class Twice:
        a: int = option(1, "", env="X")
        b: int = option(1, "", env="X")

    @dataclasses.dataclass(frozen=True)
    class Strange:
        a: dict = option(None, "")

    @dataclasses.dataclass(frozen=True)
    class Plain:
        a: int = 1

    for cls in (Twice, Strange, Plain):
        with pytest.raises(TypeError):
            load(cls, [], {})


whole = st.integers(-(2**62), 2**62)
text = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12)
finite = st.floats(allow_nan=False, allow_infinity=False)
configs = st.builds(
    Config,
    batch_size=st.integers(2, 2**40),
    epochs=whole,
    lr=st.floats(1e-12, 1e12),
    warmup_factor=st.floats(0, 1),
    seed=st.none() | whole,
    dataset=st.sampled_from(["coco", "openimages"]),
    dataset_path=text.map(lambda t: Path("/") / t.replace("/", "")),
    output_dir=st.none() | text.map(lambda t: Path("out-" + t.replace("/", ""))),
    amp=st.booleans(),
    note=text,
    image_size=st.tuples(st.integers(32, 9999), st.integers(32, 9999)),
    anchor_sizes=st.lists(whole, max_size=4).map(tuple),
    weights=st.none() | st.lists(finite, min_size=1, max_size=4).map(tuple),
)


def spoken(value):
    return ",".join(map(repr, value)) if isinstance(value, tuple) else str(value)


@given(configs)
def test_any_configuration_survives_the_command_line(cfg):
    argv = [f"--{k.replace('_', '-')}={spoken(v)}" for k, v in vars(cfg).items() if k != "amp"]
    argv.append("--amp" if cfg.amp else "--no-amp")
    assert load(Config, argv, {}).config == cfg


@given(configs)
def test_any_configuration_survives_json(cfg):
    assert from_dict(Config, json.loads(json.dumps(to_dict(cfg)))) == cfg


words = st.sampled_from(
    ["--lr", "--image-size", "--no-amp", "-b", "none", "3", "-1", "0.5", "x,", "--two", "-b7", "=", "-"]
)


@given(st.lists(words | text, max_size=8), st.dictionaries(st.sampled_from(["LR", "AMP", "IMAGE_SIZE"]), words | text))
def test_any_words_give_settings_or_a_user_error(argv, environ):
    try:
        loaded = load(Config, argv, environ, IGNORED)
    except UserError as error:
        assert str(error)
    else:
        assert from_dict(Config, to_dict(loaded.config)) == loaded.config
