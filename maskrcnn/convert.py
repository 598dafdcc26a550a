"""`python -m maskrcnn.convert IN OUT`: weights of another program as a file of this one.

public-scripts/convert_weights.sh IN OUT [--config-file FILE] [KEY VALUE...]

IN   a .pkl of detectron2 or Detectron, a .pth of maskrcnn-benchmark or torchvision, or catalog://...; nothing in it is
     run. OUT  the .pth that MODEL.WEIGHT and --checkpoint can name. The configuration says which network it is; the
     number of classes is the file's own.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from detcore import UserError
from detcore.cli import OK, run_main
from detcore.config import load
from detcore.nn.weights import load_exactly
from detcore.training.checkpoint import save
from maskrcnn.config import IGNORED_FLAGS, Config
from maskrcnn.flags import translate_flags
from maskrcnn.model import MaskRCNN
from maskrcnn.weight_files import find, read, state_of
from maskrcnn.weights import converted, known_classes, provenance, source_of


def convert(weights: str, out: Path, words: Sequence[str]) -> list[str]:
    """Writes `out`, and returns what to know. words: of a command line, the network's configuration.

    The file holds {"model": state, "origin": the program, "advice": the settings that its networks want}, which
    `load_weights` says where a run has others. Raises UserError where the file can't be read or is not of this network,
    whole, and where `out` can't be written.
    """
    path = find(weights, "IN")
    content = read(path)
    state = state_of(content)
    source = source_of(state, path)
    origin, wanted = provenance(content, source)
    classes = known_classes(state, source)
    number = ["MODEL.ROI_BOX_HEAD.NUM_CLASSES", str(classes)] if classes else []
    config = load(Config, translate_flags([*words, *number]), os.environ, IGNORED_FLAGS).config
    model = MaskRCNN(config)
    load_exactly(model, converted(model, state, source, str(path)), str(path))
    out.parent.mkdir(parents=True, exist_ok=True)
    save(out, {"model": dict(model.state_dict()), "origin": origin, "advice": wanted})
    advice = f", whose networks want {wanted}" if wanted else ""
    number = f" of {classes - 1} classes" if classes else ""
    return [f"{path}: a network{number} of {origin}{advice}", f"written: {out}"]


def main(argv: Sequence[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(f"usage: convert_weights.sh IN OUT [--config-file FILE] [KEY VALUE...]\n\n{__doc__}")
        return OK
    if len(argv) < 2 or argv[0].startswith("-") or Path(argv[1]).suffix != ".pth":
        raise UserError("give the file to read and the .pth to write: convert_weights.sh IN OUT.pth; --help says more")
    print(*convert(argv[0], Path(argv[1]), argv[2:]), sep="\n")
    return OK


if __name__ == "__main__":
    sys.exit(run_main(main))
