"""OpenImages the original way: fiftyone's zoo fetches the images, its exporter writes the COCO file.

    openimages_with_fiftyone.py --dataset-dir DIR [--splits train validation] [--classes NAME...] [--output-labels FILE]

DIR/<split>/labels/FILE gets fiftyone's own annotations plus iscrowd = IsGroupOf. fiftyone 1.2.0 numbers categories from
1, 0.15.1 from 0; both are read by this project. It takes many hours and needs MongoDB;
`download_openimages_mlperf.sh` alone needs neither.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from detcore import UserError
from detcore.cli import OK, run_main

VERSION = "1.2.0"  # the one that the benchmark's instructions name


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="openimages_with_fiftyone.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset-dir", type=Path, required=True)
    parser.add_argument("--splits", nargs="+", default=["train", "validation"], choices=["train", "validation", "test"])
    parser.add_argument("--classes", nargs="+", help="names; all classes without")
    parser.add_argument("--output-labels", default="openimages-mlperf.json")
    args = parser.parse_args(argv)
    os.environ.setdefault("FIFTYONE_DATASET_ZOO_DIR", str(args.dataset_dir.parent))
    try:
        import fiftyone
        import fiftyone.zoo
    except ImportError as error:
        raise UserError(
            f"{sys.executable} cannot import fiftyone ({error}); install it: pip install fiftyone=={VERSION}, or leave "
            "out --with-fiftyone, which is not needed"
        ) from error

    print(f"fiftyone {fiftyone.__version__}: downloading open-images-v6 to {args.dataset_dir}", flush=True)
    try:
        dataset = fiftyone.zoo.load_zoo_dataset(
            "open-images-v6",  # the parameter's name differs between versions
            classes=args.classes,
            splits=args.splits,
            label_types="detections",
            dataset_name="open-images",
            dataset_dir=str(args.dataset_dir),
        )
    except Exception as error:  # fiftyone's class for it differs between versions
        if "MongoDB" not in str(error):
            raise
        raise UserError(
            f"fiftyone has no MongoDB ({error}); start a mongod and set FIFTYONE_DATABASE_URI=mongodb://HOST, or leave "
            "out --with-fiftyone, which is not needed"
        ) from error
    field = "detections" if dataset.has_sample_field("detections") else "ground_truth"  # newer versions renamed it
    for split in args.splits:
        final = args.dataset_dir / split / "labels" / args.output_labels
        part = final.with_name(f"{final.stem}.part.json")  # fiftyone wants a name that ends in .json
        print(f"writing {final}", flush=True)
        dataset.match_tags(split).export(
            labels_path=str(part),
            dataset_type=fiftyone.types.COCODetectionDataset,
            label_field=field,
            classes=args.classes,
        )
        with open(part, encoding="utf-8") as file:
            labels = json.load(file)
        for annotation in labels["annotations"]:
            annotation["iscrowd"] = int(annotation["IsGroupOf"])
        with open(part, "w", encoding="utf-8") as file:
            json.dump(labels, file)
        os.replace(part, final)
    return OK


if __name__ == "__main__":
    sys.exit(run_main(main))
