#!/usr/bin/env bash
# Fetches ImageNet weights of backbones from torchvision's or Detectron's server, checks them and puts them where torch
# looks.
#
#   public-scripts/download_backbone.sh [-d DIR] [NAME...] [OPTION...]        -h lists the options
#
# NAME: resnet18, resnet34, resnet50, resnet101, resnet152, resnext50_32x4d (the default), resnext101_32x8d, "all", or
#       any other file of that server whose name ends in its hash, such as resnet50-11ad3fa6.pth; or what stands
#       after catalog:// in a configuration of Mask R-CNN, such as ImageNetPretrained/MSRA/R-50.
# DIR:  the weights go to DIR/hub/checkpoints. Default: $BACKBONE_DIR, else $TORCH_HOME, else
#       /workspace/ssd_dataset/torch-home. Training finds them with TORCH_HOME=DIR.
# An interrupted download goes on where it stopped. A file gets its final name only after its hash was right.
set -euo pipefail

exec "$(dirname "${BASH_SOURCE[0]}")/start_download.sh" backbone backbone "$@"
