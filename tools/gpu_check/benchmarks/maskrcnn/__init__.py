"""Mask R-CNN's part of a check."""

from tools.gpu_check.benchmarks.maskrcnn import table
from tools.gpu_check.parts import Benchmark, Part, Stage

BENCHMARK = Benchmark(
    parts=(Part("maskrcnn", f"{__name__}.steps", "maskrcnn", 90, cpu=True),),
    first=(Stage("maskrcnn", 20, first=2),),
    rest=(Stage("maskrcnn", 10),),
    ops=f"{__name__}.ops",
    published=table.PUBLISHED,
    targets=table.TARGETS,
    sections=(table.maskrcnn,),
)
