# A demonstration on two CPU cores: Mask R-CNN on ResNet-18 with group normalisation, 96 pixels, from random weights on
# generated scenes of six shapes with their polygons (make demo-maskrcnn). It stops at the published targets of COCO.
# No published result to compare it with.

source "$(dirname "${BASH_SOURCE[0]}")/systems/cpu.sh"
export BENCHMARK=maskrcnn DGXNNODES=1 WALLTIME_RUNANDTIME=20
export DATASET_DIR=${DATASET_DIR:-build/demo-data-maskrcnn} BATCHSIZE=${BATCHSIZE:-8} EVALBATCHSIZE=${EVALBATCHSIZE:-20}
export NUMEPOCHS=${NUMEPOCHS:-0} LR=${LR:-0.02} WARMUP_STEPS=${WARMUP_STEPS:-50} LOG_INTERVAL=${LOG_INTERVAL:-15}
export EXTRA_PARAMS=${EXTRA_PARAMS:-"--config-file maskrcnn/recipes/cpu_demo.yaml --dataset custom --no-pretrained \
--workers 1 --max-boxes 32 --drop-file-cache --gallery 12 --overwrite --device cpu --division open"}
export MLPERF_SUBMISSION_ORG=${MLPERF_SUBMISSION_ORG:-demonstration} MLPERF_RULESET=${MLPERF_RULESET:-3.1.0}
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
