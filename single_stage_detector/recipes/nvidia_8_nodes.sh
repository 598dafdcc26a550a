# RetinaNet as published by NVIDIA for 8 nodes of DGX H100: that of reference.sh, with 4 images a GPU and 6 epochs at most.
# 4 images a GPU are little work: the processor that starts the kernels may well be the limit (not measured). --graphs on,
# untried on several GPUs, records the step: EXTRA_PARAMS="--workers 12 --graphs on". Arguments: as for reference.sh.
export BATCHSIZE=${BATCHSIZE:-4} NUMEPOCHS=${NUMEPOCHS:-6}
source "$(dirname "${BASH_SOURCE[0]}")/reference.sh" "$@"
