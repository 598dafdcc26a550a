"""What a run of RetinaNet can choose, and how original command lines and data layouts are taken."""

import pytest

from detcore import UserError
from detcore.config import load
from single_stage_detector import train
from single_stage_detector.config import IGNORED_FLAGS, Config


def config(*words: str, **environ: str) -> Config:
    return load(Config, words, environ, IGNORED_FLAGS).config


def test_the_defaults_are_the_closed_benchmark():
    assert config().departures() == []
    assert config("--backbone", "resnet50", "--image-size", "640", "640").departures() == [
        "backbone resnet50",
        "image_size (640, 640)",
    ]


def test_an_option_string_of_the_original_program_runs():
    words = "--lr 0.000085 -b 32 -e 32 --print-freq 20 --data-path /d --image-size 800 800 --apex-adam --cuda-graphs "
    words += "--dali-prefetch-queue-depth 2 --frozen-bn-opt --cocoeval nvidia -j 8 --trainable-backbone-layers 3"
    loaded = load(Config, words.split(), {}, IGNORED_FLAGS)
    ours = loaded.config
    assert (ours.lr, ours.batch_size, ours.eval_batch_size, ours.workers) == (8.5e-5, 32, 32, 8)
    assert str(ours.dataset_path) == "/d" and len(loaded.notices) == 5


def test_every_flag_of_the_originals_is_known():
    """The names of spec section 5.1 that are no option of ours; each with its value where it takes one."""
    words = "--cuda-graphs --cuda-graphs-eval --cuda-graphs-syn --cls-head-pad --reg-head-pad --master-weights --jit "
    words += "--model-warmup-epochs 16 --cocoeval nvidia --coco-threads 8 --async-coco --async-coco-check-freq 20 "
    words += "--num-eval-ranks 4 --frozen-bn-opt --frozen-bn-fp16 --dali-matched-idxs --dali-eval --dali-eval-cache "
    words += "--dali-prefetch-queue-depth 2 --dali-cpu-decode --dali-pinned-memory-size 268435456 --dali-cmn 0 "
    words += "--dali-cmn-hint 0 --dali-decoder-hint-height 7360 --dali-decoder-hint-width 7360 --dali-sync "
    words += "--dali-decoder-hw-load .65 --dali-input-batch-multiplier 1 --dali-eval-cmn-hint 0 --dali-resize-first "
    words += "--dali-eval-decoder-hint-height 0 --dali-eval-decoder-hint-width 0 --dali-eval-decoder-hw-load .65 "
    words += "--dali-eval-input-batch-multiplier 1 --apex-adam --apex-focal-loss --apex-backbone-fusion --skip-eval "
    words += "--apex-head-fusion --disable-ddp-broadcast-buffers --fp16-allreduce --ddp-bucket-sz 25 --cudnn-bench "
    words += "--ddp-first-bucket-sz 1 --no-gradient-as-bucket-view --deterministic --not-graphed-prologues "
    words += "--metric-loss --syn-dataset 0 --sync-after-graph-replay --allreduce-barrier --cuda-profiler "
    words += "--cuda-profiler-eval --cuda-profiler-start -1 --cuda-profiler-stop -1 --power-benchmark "
    words += "--not-power-benchmark --power-sustain-time 600 --data-layout channels_last --start-epoch 0 "
    words += "--world-size 1 --dist-url env:// --eval-print-freq 20 --max-eval-iters-per-epoch 5"
    loaded = load(Config, words.split(), {}, IGNORED_FLAGS)
    assert loaded.config == Config() and len(loaded.notices) == sum(word.startswith("--") for word in words.split())


def test_flags_with_another_name_here_are_translated(capsys):
    arguments = ["--dali", "--no-amp", "--print-config"]
    assert train.main(arguments) == 0
    shown = dict(line.split(" = ") for line in capsys.readouterr().out.splitlines() if " = " in line)
    shown = {name.strip(): value.split()[0] for name, value in shown.items()}
    assert (shown["loader"], shown["precision"], shown["mode"]) == ("dali", "fp32", "train")


def test_a_closed_run_is_told_what_it_may_not_have():
    ours = config("--checkpoint", "x.pt", "--seed", "1", "--val-annotations-file", "easy.json")
    assert ours.departures() == ["seed 1", "checkpoint x.pt", "val_annotations_file easy.json"]


def test_the_launchers_variables_arrive():
    ours = config(BATCHSIZE="16", LR="1e-4", NUMEPOCHS="8", WARMUP_EPOCHS="0", DATASET_DIR="/data", SEED="7")
    assert (ours.batch_size, ours.lr, ours.epochs, ours.warmup_epochs, ours.seed) == (16, 1e-4, 8, 0.0, 7)
    with pytest.raises(UserError, match="BATCHSIZE"):
        config(BATCH_SIZE="16")


def test_a_data_set_may_lie_one_folder_deeper(tmp_path):
    inside = tmp_path / "open-images-v6"
    (inside / "train/data").mkdir(parents=True)
    ours = config("--dataset-path", str(tmp_path))
    assert ours.split("train") == (inside / "train/labels/openimages-mlperf.json", inside / "train/data")
    (tmp_path / "second/train/data").mkdir(parents=True)
    assert config("--dataset-path", str(tmp_path)).root() == tmp_path  # two candidates: none is guessed


def test_single_parts_of_a_layout_can_be_elsewhere():
    ours = config("--dataset", "coco", "--dataset-path", "/c", "--val-annotations-file", "/x.json")
    assert [str(p) for p in ours.split("val")] == ["/x.json", "/c/val2017"]
    assert str(ours.split("train")[0]) == "/c/annotations/instances_train2017.json"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--no-pretrained"], "frozen normalisation cannot learn"),
        (["--anchor-sizes", "16,32"], "five sizes"),
        (["--mode", "predict", "--checkpoint", "x"], "--images"),
        (["--mode", "evaluate"], "--checkpoint"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--image-size", "1000000", "1000000"], "image-size"),
        (["--max-boxes", "10000000000000"], "max-boxes"),
        (["--fpn-channels", "10000000"], "fpn-channels"),
        (["--lr", "1e300"], "lr"),
        (["--backbone", "resnet51"], "resnet50"),
        (["--bach-size", "2"], "--batch-size"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(words, message):
    with pytest.raises(UserError, match=message):
        config(*words)
