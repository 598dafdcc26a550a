"""A small COCO data set of generated images, and the file it is described by."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detcore.data.coco import CocoIndex


class Coco:
    """A COCO file under construction: change `content`, then `write()` it."""

    def __init__(self, folder: Path) -> None:
        self.file, self.images = folder / "annotations.json", folder / "images"
        self.images.mkdir(parents=True)
        self.content = {"images": [], "annotations": [], "categories": []}

    def add_image(self, image_id: int, width: int, height: int, boxes=(), name=None, **save) -> Path:
        """boxes: (category_id, x, y, w, h) each."""
        name = name or f"{image_id:06d}.jpg"
        path = self.images / name
        rng = np.random.default_rng(image_id)
        pixels = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR).save(path, **save)
        self.content["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
        for category_id, *bbox in boxes:
            self.add_box(image_id, category_id, bbox)
        return path

    def add_box(self, image_id: int, category_id: int, bbox, **more) -> dict:
        box = {
            "id": len(self.content["annotations"]) + 1,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": list(bbox),
            "area": bbox[2] * bbox[3],
            "iscrowd": 0,
        } | more
        self.content["annotations"].append(box)
        return box

    def categories(self, *ids: int) -> None:
        self.content["categories"] = [{"id": k, "name": f"class {k}"} for k in ids]

    def write(self) -> None:
        self.file.write_text(json.dumps(self.content))

    def simple(self) -> "Coco":
        """Two images, 20 with two boxes and 10 without; categories 3, 5, 9. Written."""
        self.categories(3, 5, 9)
        self.add_image(20, 64, 48, [(3, 1.5, 2.25, 10, 20), (9, 30, 20, 8, 8)])
        self.add_image(10, 32, 40)
        self.write()
        return self

    def open(self, **more) -> CocoIndex:
        return CocoIndex.open(self.file, self.images, **more)


@pytest.fixture
def coco(tmp_path) -> Coco:
    return Coco(tmp_path / "set")


@pytest.fixture(scope="module")
def thirteen(tmp_path_factory) -> Coco:
    """Thirteen images of several sizes with 0 to 5 boxes each; ids 100, 107, ...; categories 3, 5, 9."""
    coco = Coco(tmp_path_factory.mktemp("thirteen"))
    coco.categories(9, 3, 5)
    rng = np.random.default_rng(5)
    for number in range(13):
        width, height = 40 + 7 * number, 90 - 3 * number
        boxes = []
        for _ in range(number % 6):
            x, y = rng.uniform(0, width - 12), rng.uniform(0, height - 12)
            boxes.append((int(rng.choice([3, 5, 9])), x, y, rng.uniform(4, width - x), rng.uniform(4, height - y)))
        coco.add_image(100 + 7 * number, width, height, boxes, quality=90)
    coco.content["annotations"][3]["iscrowd"] = 1
    coco.write()
    return coco
