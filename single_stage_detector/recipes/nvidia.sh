# RetinaNet as published by NVIDIA (v4.1, v5.0). 256 images a step: mAP .240 .295 .334 .346 after epochs 1 to 4; 4 epochs in
# 492 of 495 published runs. Arguments: as for reference.sh.
export LR=${LR:-0.000085} WARMUP_EPOCHS=${WARMUP_EPOCHS:-0}
source "$(dirname "${BASH_SOURCE[0]}")/reference.sh" "$@"
