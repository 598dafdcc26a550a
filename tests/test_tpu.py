"""The TPU path run for real on the CPU (marker `tpu`, minutes), and what docs/tpu.md says of an epoch's iterations."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from detcore.data.plan import steps_per_epoch
from detcore.training.task import Data
from tests.configs import FOLDER, ROOT, exports

COCO_2017 = 118_287  # training images
CORE = 128  # images of a micro-batch at most


@pytest.mark.tpu
def test_training_on_both_emulations_is_that_of_the_cpu():
    """TPU_CHECK: more words for tools.tpu_check, such as --python xla=FILE for an environment that is there."""
    words = shlex.split(os.environ.get("TPU_CHECK", ""))
    done = subprocess.run(
        [sys.executable, "-m", "tools.tpu_check", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    print(done.stdout)  # the table; make test-tpu shows it
    assert done.returncode == 0, done.stdout


def iterations(images: int, cores: int = 1) -> tuple[int, int, int, int]:
    """Micro-batches of an epoch, --accumulate, full steps, micro-batches of the step after them."""
    accumulate = max(images // CORE // cores, 1)
    micro_batches = steps_per_epoch(COCO_2017, images // accumulate // cores, cores, drop_last=True)
    steps = -(-micro_batches // accumulate)
    data = Data(COCO_2017, 0, steps, None, None, None, micro_batches=micro_batches)
    passes = [data.passes(step, accumulate) for step in range(steps)]
    assert sum(passes) == micro_batches and data.passes(steps, accumulate) == passes[0]
    return micro_batches, accumulate, passes.count(accumulate), sum(p for p in passes if p < accumulate)


def test_iterations_of_an_epoch_are_those_of_the_documentation():
    text = (ROOT / "docs" / "tpu.md").read_text().split("## Iterations of an epoch")[1].split("\n## ")[0]
    rows = [[int(cell) for cell in row] for row in re.findall(r"^\|" + r" (\d+) \|" * 5 + "$", text, re.MULTILINE)]
    assert [row[0] for row in rows] == [32, 64, 128, 1024, 2048]
    assert [tuple(row[1:]) for row in rows] == [iterations(row[0]) for row in rows]
    # The table of the original's fork has the full ones.
    assert [row[3] for row in rows] == [3696, 1848, 924, 115, 57]
    eight = re.search(r"Eight cores of 128 images: (\d+) iterations", text)
    assert iterations(8 * CORE, cores=8) == (int(eight[1]), 1, int(eight[1]), 0)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("config_SSD300_*CORE_*.sh")), ids=lambda path: path.stem)
def test_headers_of_the_tpu_configs_tell_the_iterations(path):
    header, exported = path.read_text().split("\n\n")[0], exports(path)
    options = exported["EXTRA_PARAMS"]
    cores, batch = map(int, re.search(r"_(\d+)CORE_BS(\d+)", path.stem).groups())
    _, accumulate, full, tail = iterations(batch, cores)
    assert f"global batch {batch}." in header and f"# {full} iterations" in header
    assert (f"then one of {tail}" in header) == bool(tail)
    assert (f"--accumulate {accumulate}" in options) == (accumulate > 1)
    assert (f"--num-cores {cores}" in options) == (cores > 1)
    assert exported["BATCHSIZE"] == str(batch // accumulate // cores) and "--device tpu" in options
