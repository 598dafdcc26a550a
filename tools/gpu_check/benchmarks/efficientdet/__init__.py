"""EfficientDet's part of a check."""

from tools.gpu_check.benchmarks.efficientdet import table
from tools.gpu_check.parts import Benchmark, Part, Stage

BENCHMARK = Benchmark(
    parts=(Part("efficientdet", f"{__name__}.steps", "efficientdet", 90, cpu=True),),
    first=(Stage("efficientdet", 20, first=2),),
    rest=(Stage("efficientdet", 10),),
    ops=f"{__name__}.ops",
    published=table.PUBLISHED,
    targets=table.TARGETS,
    sections=(table.efficientdet,),
)
