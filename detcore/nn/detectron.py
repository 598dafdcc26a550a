"""Where Detectron's weights are published, by the names of maskrcnn-benchmark's catalog. Imports nothing, so that tools
start without torch.

The md5 of R-50.pkl is published; of the others none is.
"""

from typing import NamedTuple

SERVER = "https://dl.fbaipublicfiles.com/detectron"


class Published(NamedTuple):
    """A file of weights: its path at the server, its name in torch's cache, its md5 where one is published."""

    path: str
    file: str
    md5: str | None = None


_IMAGENET = {
    "MSRA/R-50": Published("ImageNetPretrained/MSRA/R-50.pkl", "R-50.pkl", "b19105fdd7baafb40480251377de18f2"),
    "MSRA/R-101": Published("ImageNetPretrained/MSRA/R-101.pkl", "R-101.pkl"),
    "MSRA/R-50-GN": Published("ImageNetPretrained/47261647/R-50-GN.pkl", "R-50-GN.pkl"),
    "MSRA/R-101-GN": Published("ImageNetPretrained/47592356/R-101-GN.pkl", "R-101-GN.pkl"),
    "FAIR/20171220/X-101-32x8d": Published("ImageNetPretrained/20171220/X-101-32x8d.pkl", "X-101-32x8d.pkl"),
}
_COCO = {  # the training's number and name: the signature in its address
    "35857197/e2e_faster_rcnn_R-50-C4_1x": "01_33_49.iAX0mXvW",
    "35857345/e2e_faster_rcnn_R-50-FPN_1x": "01_36_30.cUF7QR7I",
    "35857890/e2e_faster_rcnn_R-101-FPN_1x": "01_38_50.sNxI7sX7",
    "36761737/e2e_faster_rcnn_X-101-32x8d-FPN_1x": "06_31_39.5MIHi1fZ",
    "35858791/e2e_mask_rcnn_R-50-C4_1x": "01_45_57.ZgkA7hPB",
    "35858933/e2e_mask_rcnn_R-50-FPN_1x": "01_48_14.DzEQe4wC",
    "35861795/e2e_mask_rcnn_R-101-FPN_1x": "02_31_37.KqyEK4tT",
    "36761843/e2e_mask_rcnn_X-101-32x8d-FPN_1x": "06_35_59.RZotkLKI",
}


def _trained(name: str) -> Published:
    number, _, kind = name.partition("/")
    sets = "coco_2014_train%3Acoco_2014_valminusminival"
    path = f"{number}/12_2017_baselines/{kind}.yaml.{_COCO[name]}/output/train/{sets}/generalized_rcnn/model_final.pkl"
    return Published(path, f"{kind}_{number}.pkl")


CATALOG = {f"ImageNetPretrained/{name}": found for name, found in _IMAGENET.items()} | {
    f"Caffe2Detectron/COCO/{name}": _trained(name) for name in _COCO
}
"""What may follow catalog:// in MODEL.WEIGHT."""
