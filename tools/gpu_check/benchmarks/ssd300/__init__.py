"""SSD300's part of a check."""

from tools.gpu_check.benchmarks.ssd300 import table
from tools.gpu_check.parts import Benchmark, Part, Stage

BENCHMARK = Benchmark(
    parts=(Part("ssd300", f"{__name__}.steps", "ssd300", 90, cpu=True),),
    first=(Stage("ssd300", 20, first=1),),
    rest=(Stage("ssd300", 10),),
    ops=f"{__name__}.ops",
    published=table.PUBLISHED,
    targets=table.TARGETS,
    sections=(table.ssd300,),
)
