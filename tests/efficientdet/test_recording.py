"""Whether forward pass, losses and detection can be recorded: with tensors that only claim to lie on a GPU."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from detcore.data.synthetic import synthetic_batches
from efficientdet.loss import losses
from efficientdet.model import EfficientDet
from efficientdet.postprocess import postprocess
from tests.single_stage_detector.test_recording import OnDeviceOnly

SIZE, CLASSES = (128, 128), 5


@torch.no_grad()
def test_nothing_waits_for_the_device():
    """With TensorFlow's padding, weighted fusion, squeeze and excitation, and a normaliser over two processes."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_cpu = next(synthetic_batches(CLASSES, SIZE, 2, 10, 0))
        with torch.device("cuda"):
            model = EfficientDet("tf_efficientdet_d0", CLASSES, SIZE)
        batch = on_cpu.map(lambda t: torch.empty_like(t, device="cuda"))
        with OnDeviceOnly():
            outputs = model(batch.images)
            evaluated = model.eval()(batch.images)
            terms = losses(outputs, model.anchors, batch.boxes, batch.labels, 0.1, lambda count: count / 2, 2)
            found = [
                postprocess(*evaluated, model.anchors, batch.extent, detections=9, soft=soft) for soft in (False, True)
            ]
    assert {t.device.type for t in terms.values()} == {"cuda"}
    assert all(boxes.shape == (2, 9, 4) for boxes, _, _ in found)
