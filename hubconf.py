"""The entry points of torch.hub, with the names and the calls of NVIDIA's DeepLearningExamples.

  model = torch.hub.load(REPOSITORY, "nvidia_ssd", checkpoint="epoch_64.pt")       # a file or a URL
  utils = torch.hub.load(REPOSITORY, "nvidia_ssd_processing_utils")
  tensor = utils.prepare_tensor([utils.prepare_input(uri) for uri in ("a.jpg", "https://example.org/b.jpg")])
  with torch.no_grad():
      results = utils.decode_results(model(tensor))
  best = [utils.pick_best(result, 0.4) for result in results]        # boxes, classes and scores of each image

  demo = torch.hub.load(REPOSITORY, "maskrcnn", checkpoint="best.pt", confidence_threshold=0.5)
  found = demo.compute_prediction(image)                             # boxes, scores, names and masks
  picture = demo.run_on_opencv_image(image)                          # with all of them drawn

Tensors hold uint8 pixels here, and the model normalises them. The weights that NVIDIA published have no address that is
known to work, so nothing is fetched but from an address that you give.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import numpy as np
import torch

from detcore import UserError
from detcore.data.transforms import read_image
from detcore.torch_file import cached
from ssd300 import inference
from ssd300.model import SSD300

if TYPE_CHECKING:
    from maskrcnn.inference import COCODemo

dependencies = ["torch", "torchvision", "numpy", "PIL", "msgspec", "pycocotools", "urllib3", "yaml"]


def nvidia_ssd(
    pretrained: bool = True,
    *,
    checkpoint: str | Path | None = None,
    map_location: str | torch.device | None = None,
    backbone: str | None = None,
    num_classes: int = 80,
    model_math: str = "fp32",
) -> SSD300:
    """SSD300 in evaluation mode: uint8 images [N, 3, 300, 300] -> what decode_results of the utils takes.

    pretrained: with the weights of `checkpoint`, a file or a URL, of this program or of the original; False: random
    weights for num_classes classes. map_location: the device (default: the CPU); images follow the model. backbone:
    resnet18 to resnet152 (default: the checkpoint's own, else resnet50). model_math: the original's fp32 or fp16; has
    no effect, which is said: call the model under torch.autocast instead. Raises UserError where pretrained is asked
    for and no checkpoint named.
    """
    if model_math != "fp32":
        print(f"model_math={model_math!r} has no effect: call the model under torch.autocast instead", file=sys.stderr)
    if not pretrained:
        model = SSD300(backbone or "resnet50", num_classes)
    elif checkpoint is None:
        raise UserError(
            "nvidia_ssd(pretrained=True): say which weights with checkpoint=FILE_OR_URL. Those that NVIDIA published "
            "are no longer at their old address; pretrained=False gives random ones"
        )
    else:
        model, _ = inference.load_model(_fetched(checkpoint), backbone)
    model.register_forward_pre_hook(lambda module, given: (given[0].to(module.priors.device), *given[1:]))
    return model.to(map_location or "cpu").eval()


def nvidia_ssd_processing_utils() -> type["Utils"]:
    """The steps around the model."""
    return Utils


def maskrcnn(checkpoint: str | Path, *configuration: str, **how: Any) -> "COCODemo":
    """Mask R-CNN or Faster R-CNN for images at hand: see `maskrcnn.inference.COCODemo`. checkpoint: a file or a URL."""
    from maskrcnn.inference import COCODemo  # SSD300's users need not have what it wants

    return COCODemo(_fetched(checkpoint), *configuration, **how)


class Utils:
    """Reading images for `nvidia_ssd`, and its outputs."""

    @staticmethod
    def prepare_input(uri: str | Path) -> np.ndarray:
        """The image of a path or URL, uint8 [300, 300, 3], resized as in validation."""
        return inference.prepare(read_image(uri))

    @staticmethod
    def prepare_tensor(inputs: list[np.ndarray], fp16: bool = False) -> torch.Tensor:
        """uint8 [N, 3, 300, 300]. fp16 changes nothing: the model takes pixels, and computes in its own type."""
        return torch.from_numpy(np.stack(inputs)).permute(0, 3, 1, 2)

    @staticmethod
    def decode_results(predictions: tuple[torch.Tensor, torch.Tensor]) -> list[inference.Detections]:
        """Boxes (left, top, right, bottom of 0..1), classes from 1 on and scores of each image, the 20 best."""
        return inference.decode(predictions)

    @staticmethod
    def pick_best(detections: inference.Detections, threshold: float = 0.3) -> inference.Detections:
        """Those of one image above the threshold; none is no error."""
        return inference.pick_best(detections, threshold)

    @staticmethod
    def get_coco_object_dictionary() -> list[str]:
        """Names of the classes; class k is at k - 1."""
        return list(inference.COCO_NAMES)


def _fetched(checkpoint: str | Path) -> Path:
    """The file; a URL's is fetched into torch.hub's folder once."""
    url = urlparse(str(checkpoint))
    if url.scheme not in ("http", "https", "file"):
        return Path(checkpoint)
    path = cached(str(checkpoint))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(str(checkpoint), str(path), progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{checkpoint} can't be fetched: {error}") from error
    return path
