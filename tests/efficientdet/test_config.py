"""The flags of the original programs, by their own names, and what they mean here."""

import re

import pytest
import torch

from detcore import UserError
from detcore.config import load, to_dict
from detcore.nn import optim
from detcore.nn.layerwise import Lamb, NovoGrad
from efficientdet import train
from efficientdet.architectures import architecture
from efficientdet.config import ADOPTED, IGNORED_FLAGS, OPTIMIZERS, Config
from efficientdet.flags import translate_flags


def read(line: str, **environ: str):
    return load(Config, translate_flags(line.split()), environ, IGNORED_FLAGS)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("/coco", "dataset_path", "/coco"), ("--model efficientdet_d1 /coco", "dataset_path", "/coco"),
        ("--amp /coco --lr 1", "dataset_path", "/coco"), ("--lr-noise 0.4 0.9 --amp /coco", "lr_noise", [0.4, 0.9]),
        ("--model efficientdet_d1", "model", "efficientdet_d1"), ("-m efficientdet_w0", "model", "efficientdet_w0"),
        ("", "model", "efficientdet_d0"), ("--redundant-bias", "redundant_bias", True),
        ("--no-redundant-bias", "redundant_bias", False), ("", "redundant_bias", None),
        ("--pretrained", "pretrained", True), ("--pretrained-backbone-path b.pth", "weights", "b.pth"),
        ("--initial-checkpoint a.pth.tar", "checkpoint", "a.pth.tar"), ("--checkpoint a.pth", "checkpoint", "a.pth"),
        ("--resume", "resume", True), ("--fill-color mean", "fill_color", "mean"),
        ("--fill-color 0", "fill_color", "0"),
        ("-b 150", "batch_size", 150), ("-b150", "batch_size", 150), ("--batch-size 8", "batch_size", 8),
        ("", "batch_size", 32), ("-vb 2", "validation_batch_size_multiplier", 2),
        ("--validation-batch-size-multiplier 3", "validation_batch_size_multiplier", 3),
        ("--input_size 640", "input_size", 640), ("--input-size 640", "input_size", 640),
        ("--clip-grad 5", "clip_norm", 5.0), ("", "clip_norm", 10.0), ("--opt fusedadam", "opt", "fusedadam"),
        ("--opt fusedlamb", "opt", "fusedlamb"),
        ("--opt fusednovograd", "opt", "fusednovograd"),
        ("", "opt", "momentum"), ("--opt-eps 1e-8", "opt_eps", 1e-8), ("--momentum 0.8", "momentum", 0.8),
        ("--weight-decay 1e-4", "weight_decay", 1e-4), ("", "weight_decay", 4e-5), ("--sched step", "sched", "step"),
        ("--lr 1.63", "lr", 1.63), ("", "lr", 0.01), ("--lr-noise 0.5", "lr_noise", [0.5]),
        ("--lr-noise-pct 0.5", "lr_noise_pct", 0.5), ("--lr-cycle-mul 2", "lr_cycle_mul", 2.0),
        ("--lr-cycle-limit 3", "lr_cycle_limit", 3), ("--warmup-lr 1e-5", "warmup_lr", 1e-5),
        ("--min-lr 1e-6", "min_lr", 1e-6), ("--epochs 5", "epochs", 5), ("", "epochs", 300),
        ("--decay-epochs 9", "decay_epochs", 9), ("--decay-rate 0.5", "decay_rate", 0.5),
        ("--dr 0.5", "decay_rate", 0.5),
        ("--warmup-epochs 9", "warmup_epochs", 9), ("", "warmup_epochs", 5),
        ("--cooldown-epochs 3", "cooldown_epochs", 3),
        ("--smoothing 0.1", "smoothing", 0.1), ("--sync-bn", "sync_bn", True), ("--model-ema", "ema_decay", 0.9998),
        ("--model-ema --model-ema-decay 0.999", "ema_decay", 0.999),
        ("--model-ema-decay 0.99 --model-ema", "ema_decay", 0.99), ("--model-ema-decay 0.999", "ema_decay", 0.0),
        ("--seed 1", "seed", 1), ("--log-interval 9", "log_interval", 9), ("", "log_interval", 50),
        ("--log-freq 9", "log_interval", 9), ("--eval-after 200", "eval_after", 200),
        ("--benchmark", "mode", "benchmark-training"), ("--benchmark-steps 500", "benchmark_iterations", 500),
        ("--benchmark-steps 0", "benchmark_iterations", 20), ("--dllogger-file l.json", "dllogger_file", "l.json"),
        ("--save-checkpoint-interval 1", "save_checkpoint_interval", 1), ("-j 12", "workers", 12),
        ("--workers 12", "workers", 12), ("--worker 12", "workers", 12), ("", "workers", 4),
        ("--amp", "precision", "auto"),
        ("", "precision", "tf32"), ("--output /model", "output_dir", "/model"), ("--num_classes 3", "num_classes", 3),
        ("--num-classes 3", "num_classes", 3), ("--waymo", "waymo", True),
        ("--waymo --dataset custom", "dataset", "custom"),
        ("--remove-weights class_net box_net anchor", "remove_weights", ["class_net", "box_net", "anchor"]),
        ("--freeze-layers backbone", "freeze_layers", ["backbone"]),
        ("--freeze_layer backbone fpn", "freeze_layers", ["backbone", "fpn"]),
        ("--waymo-train i", "train_data_path", "i"), ("--waymo-val i", "val_data_path", "i"),
        ("--waymo-train-annotation a", "train_annotations_file", "a"),
        ("--waymo-val-annotation a", "val_annotations_file", "a"), ("--use-ema", "use_ema", True),
        ("--use-soft-nms", "use_soft_nms", True), ("--checkpoint c.pt --results r.json", "results", "r.json"),
        ("--checkpoint c.pt --results r.json", "mode", "evaluate"),
        ("--inference --results r.json --checkpoint c.pt", "inference", True),
        ("--inference --checkpoint c.pt", "mode", "evaluate"),
        ("--inference --checkpoint c.pt", "results", "results.json"), ("--checkpoint c.pt --results=", "results", None),
        ("--anno val2017 --checkpoint c.pt", "mode", "evaluate"), ("--initial-checkpoint=", "checkpoint", None),
        ("--inference --mode benchmark-inference", "mode", "benchmark-inference"),
        ("--pretrained-backbone-path=", "weights", None), ("--interpolation bicubic", "interpolation", "bicubic"),
        ("--interpolation=", "interpolation", "bilinear"), ("", "train_interpolation", "bilinear"),
        ("--train-interpolation random", "train_interpolation", "random"),
        ("--train_interpolation bicubic", "train_interpolation", "bicubic"), ("", "interpolation", "bilinear"),
    ],
)  # fmt: skip
def test_flags_of_the_originals(line, name, value):
    loaded = read(line)
    assert to_dict(loaded.config)[name] == value and loaded.notices == []


@pytest.mark.parametrize(
    "line",
    [
        "--mixup 0.0", "--mixup-off-epoch 0", "--drop 0.0", "--dist-group-size 0", "--lr-noise-std 1.0",
        "--eval-metric map", "--dist-bn=", "--dist-bn broadcast", "--interpolation bilinear",
        "--train-interpolation bilinear", "--sched cosine",
    ],
)  # fmt: skip
def test_flags_that_change_nothing(line):
    assert read(line).config == Config()


@pytest.mark.parametrize(
    "line",
    [
        "--local_rank 0", "--local-rank 0", "--num-gpu 8", "--fused-focal-loss", "--torchscript",
        "--memory-format nhwc",
        "--no-prefetcher", "--no-pin-mem", "--pin-mem", "--patience-epochs 5",
    ],
)  # fmt: skip
def test_flags_that_have_no_effect_say_so(line):
    loaded = read(line)
    assert loaded.config == Config() and line.split()[0].replace("_", "-") in loaded.notices[0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--mixup 0.2", "never mixes"), ("--drop 0.1", "without dropout"),
        ("--dist-group-size 4", "never forms groups"),
        ("--lr-noise-std 2", "--lr-noise-pct"), ("--dist-bn reduce", "--sync-bn"),
        ("--interpolation random", "bilinear, bicubic"), ("--train-interpolation nearest", "bicubic, random"),
        ("--loader dali --train-interpolation random", "--loader torch or nvjpeg"),
        ("--loader dali --interpolation bicubic", "--loader torch or nvjpeg"),
        ("--anno test-dev2017", "--val-annotations-file"),
        ("--start-epoch 3", "--resume"), ("--no-resume-opt", "--initial-checkpoint"),
        ("--sched plateau", "cosine or step"),
        ("--opt lookahead_adam", "choose one of"), ("--opt radam", "choose one of"),
        ("--opt lookahead_adam", "adamw"),
        ("--eval-metric loss", "AP"), ("/a /b", "only the data folder"),
        ("--lrr 0.1 /a", "did you mean --lr?"), ("--model mixdet_m", "MixNet or MobileNet"),
        ("--model efficientdet_d9", "did you mean"), ("--fill-color blue", "grey value"),
        ("--input_size 100", "multiple"),
        ("--lr-noise 0.1 0.2 0.3", "one or two"), ("--lr-noise 0.9 0.4", "before it begins"),
        ("--inference", "--checkpoint"), ("--inference --checkpoint c.pt --results=", "--results FILE"),
        ("--modle x", "did you mean --mode?"),
        ("--division closed", "open"),
    ],
)  # fmt: skip
def test_what_is_refused_says_why(line, words):
    with pytest.raises(UserError, match=re.escape(words)):
        read(line)


def test_a_yaml_file_stands_before_the_environment_and_the_command_line(tmp_path):
    """As `args.yaml` of the original, whose false and null say nothing."""
    file = tmp_path / "args.yaml"
    file.write_text(
        "data: /coco\nmodel: efficientdet_d1\nlr: 0.5\nbatch_size: 8\nlr_noise: [0.4, 0.9]\nmodel_ema: true\n"
        "model_ema_decay: 0.999\npretrained: false\nmixup: 0.0\nlocal_rank: 0\nredundant_bias: null\nwarmup_epochs: 9\n"
        "freeze_layers: []\nopt: fusedmomentum\nmemory_format: nchw\ndist_bn: ''\n"
    )
    config = read(f"--lr 0.25 -c {file}", BATCHSIZE="16").config
    assert (str(config.dataset_path), config.model, config.lr) == ("/coco", "efficientdet_d1", 0.25)
    assert config.batch_size == 16 and config.lr_noise == (0.4, 0.9) and config.ema_decay == 0.999
    assert config.pretrained and config.warmup_epochs == 9 and config.opt == "fusedmomentum"
    file.write_text("seed: 0\nwarmup_epochs: 0\nworkers: 0\nclip_grad: 0.0\nweight_decay: 0\ncooldown_epochs: 0\n")
    config = read(f"-c {file}").config
    assert [config.seed, config.warmup_epochs, config.workers, config.clip_norm, config.weight_decay] == [0] * 5
    for content, words in (("- 1\n", "flag: value"), ("a: [", "YAML"), ("modle: x\n", "--modle")):
        file.write_text(content)
        with pytest.raises(UserError, match=re.escape(words)):
            read(f"--config {file}")
    with pytest.raises(UserError, match="can't be read"):
        read("-c nowhere.yaml")


@pytest.mark.parametrize(
    ("line", "dataset"),
    [
        ("--waymo", "waymo"), ("--waymo --dataset custom", "custom"), ("--dataset custom --waymo", "custom"),
        ("--dataset coco --waymo", "coco"), ("", "coco"),
    ],
)  # fmt: skip
def test_waymo_is_of_its_layout_unless_another_is_named(line, dataset):
    loaded = read(line)
    assert train.complete(loaded.config, loaded.sources).dataset == dataset


def test_a_checkpoint_knows_the_layout_of_its_waymo_set(tmp_path):
    """Trained from a set in another layout, it is evaluated on that; one that knows none, on the layout waymo."""
    words = ["--waymo", "--mode", "evaluate", "--checkpoint", str(tmp_path / "best.pt")]
    for known, dataset in (({"config": {"waymo": True, "dataset": "custom"}}, "custom"), ({}, "waymo")):
        torch.save({"model": {"weight": torch.zeros(1)}, **known}, tmp_path / "best.pt")
        loaded = load(Config, words, {})
        assert train.complete(loaded.config, loaded.sources).dataset == dataset


def test_classes_and_colours():
    assert read("").config.class_ids == tuple(range(1, 91)) and read("--waymo").config.class_ids == (1, 2, 3)
    assert read("--dataset custom").config.class_ids is None
    assert read("").config.fill == (124, 116, 104) and read("--fill-color 7").config.fill == (7, 7, 7)
    assert read("--model tf_efficientdet_lite0").config.fill == (128, 128, 128)
    assert read("--model tf_efficientdet_lite0").config.image_size == (320, 320)
    assert set(ADOPTED) <= set(to_dict(Config()))


def test_the_schedule_of_the_published_recipe():
    """310 epochs: 50 of warm-up, a re-entry at 93.3 % of the peak, the last ten at the lowest value."""
    config = read("--lr 1.63 --warmup-epochs 50").config
    rate = train.schedule(config, 0)
    assert config.total_epochs == 310 and rate(0, 1.63) == 1e-4
    assert rate(25, 1.63) == pytest.approx(1e-4 + (1.63 - 1e-4) / 2)
    assert rate(50, 1.63) / 1.63 == pytest.approx(0.933, abs=5e-4)
    assert rate(150, 1.63) == pytest.approx((1.63 + 1e-5) / 2) and rate(300, 1.63) == rate(309, 1.63) == 1e-5
    noisy = train.schedule(read("--lr 1.63 --warmup-epochs 50 --lr-noise 0.4 0.9").config, 12711)
    changed = [epoch for epoch in range(310) if noisy(epoch, 1.63) != rate(epoch, 1.63)]
    assert changed == list(range(120, 270))
    assert all(abs(noisy(epoch, 1.63) / rate(epoch, 1.63) - 1) < 0.67 for epoch in changed)
    step = train.schedule(read("--sched step --lr 0.1 --decay-epochs 4 --warmup-epochs 0").config, 0)
    assert [step(epoch, 0.1) for epoch in (0, 3, 4, 8)] == pytest.approx([0.1, 0.1, 0.01, 0.001])
    assert read("--sched step --epochs 9").config.total_epochs == 9
    assert read("--epochs 4 --lr-cycle-mul 2 --lr-cycle-limit 2").config.total_epochs == 22


def test_evaluations():
    config = read("--eval-after 2").config
    assert [config.evaluates(done, 5) for done in range(1, 6)] == [False, False, True, True, True]
    assert read("--eval-after 9").config.evaluates(5, 5)


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.class_net = torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    """By the original's names; biases and normalisation do not decay."""
    made = train.make_optimizer(read(f"--opt {name} --lr 0.5").config, Layers(), False)
    groups = [(len(g["params"]), g["weight_decay"], g["lr"], g[optim.BASE_LR]) for g in made.param_groups]
    assert groups == [(1, 4e-5, 0.5, 0.5), (3, 0.0, 0.5, 0.5)]
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "lamb": Lamb}
    kinds |= {"novograd": NovoGrad, "nvnovograd": NovoGrad}
    assert type(made) is kinds.get(OPTIMIZERS[name], torch.optim.SGD)
    own = made.param_groups[0]
    if type(made) is torch.optim.SGD:
        assert own["momentum"] == 0.9 and own["nesterov"] == (OPTIMIZERS[name] == "nesterov")
    else:
        assert own["eps"] == 1e-3
    if isinstance(made, NovoGrad):
        assert made.decoupled == (name == "fusednovograd") and own["betas"] == (0.95, 0.98)


@pytest.mark.parametrize("name", ["fusedlamb", "nvnovograd"])
def test_optimizers_that_can_not_leave_steps_out(name):
    with pytest.raises(UserError, match="not with fp16"):
        train.make_optimizer(read(f"--opt {name}").config, Layers(), True, scaled=True)


@pytest.mark.parametrize(("line", "momentum"), [("", 0.01), ("--bn-momentum 0.1", 0.1)])
def test_every_norm_has_the_momentum(line, momentum):
    model = train.build_model(read(f"--model tf_efficientdet_lite0 --no-pretrained {line}").config, 2)
    assert {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {momentum}


def test_frozen_layers():
    model = Layers()
    train.freeze(model, ("backbone",))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["class_net.weight", "class_net.bias"]
    with pytest.raises(UserError, match="no parameter is called so"):
        train.freeze(model, ("backbne",))
    with pytest.raises(UserError, match="nothing is left to train"):
        train.freeze(model, ("backbone", "class_net"))


@pytest.mark.parametrize(("name", "meant"), [("efficientdet_d9", "tf_efficientdet_d7"), ("efficientdet_d5",
                                             "tf_efficientdet_d5"), ("efficientdet_d7x", "tf_efficientdet_d7x"),
                                             ("efficientdet-d0", "efficientdet_d0")])  # fmt: skip
def test_an_unknown_model_is_told_the_nearest_of_its_size(name, meant):
    with pytest.raises(UserError, match=rf"did you mean {meant}(\?| \(d5 to d7x are there only as tf_)"):
        architecture(name)
