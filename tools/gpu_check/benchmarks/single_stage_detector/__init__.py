"""RetinaNet's parts of a check.

A process of `train` pays for cuDNN's trials: so all cases of one shape and precision are in one stage.
"""

from tools.gpu_check.benchmarks.single_stage_detector import table
from tools.gpu_check.parts import Benchmark, Part, Stage

BENCHMARK = Benchmark(
    parts=(
        Part("train", f"{__name__}.train", "train", 120, cpu=True),
        Part("probe", f"{__name__}.probe", "probe", 40),
        Part("inference", f"{__name__}.inference", "inference"),
        Part("peers", f"{__name__}.peers", "peers", 120),
        Part("losses", f"{__name__}.training", "losses", None),
        Part("bccd", f"{__name__}.training", "bccd", None),
    ),
    first=(Stage("probe", 40),),
    core_only=(Stage("train", 50, first=1),),
    # The first one begins with the core list's case; the compiler, which is slow, has its own, early.
    main=(
        Stage("train", 80, cases=("bf16 b32 graph *", "bf16 b32 eager *")),
        Stage("train", 90, cases=("bf16 b32 compiled+graph native",)),
    ),
    rest=(Stage("train", 10), Stage("inference", 10), Stage("losses", 30), Stage("peers", 10), Stage("bccd", 10)),
    ops=f"{__name__}.ops",
    published=table.PUBLISHED,
    targets=table.TARGETS,
    sections=(table.speed, table.variants, table.inference, table.probe, table.bccd),
)
