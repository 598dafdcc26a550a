# A demonstration on two CPU cores: EfficientDet-Lite0 of 128 pixels from random weights on generated scenes of six shapes
# (make demo-efficientdet). Measured: AP 0.204 after 6 epochs, 226 s of processor time in all (docs/LOG.md).
# Ten epochs are short, so the norms' statistics and the average of the weights follow the weights sooner than usual.
# No published result to compare it with.

source "$(dirname "${BASH_SOURCE[0]}")/systems/cpu.sh"
export BENCHMARK=efficientdet DGXNNODES=1 WALLTIME_RUNANDTIME=20
export DATASET_DIR=${DATASET_DIR:-build/demo-data-efficientdet} BATCHSIZE=${BATCHSIZE:-8} EVALBATCHSIZE=${EVALBATCHSIZE:-20}
export NUMEPOCHS=${NUMEPOCHS:-10} LR=${LR:-0.003} WARMUP_EPOCHS=${WARMUP_EPOCHS:-1} LOG_INTERVAL=${LOG_INTERVAL:-10}
export EXTRA_PARAMS=${EXTRA_PARAMS:-"--dataset custom --model tf_efficientdet_lite0 --input-size 128 --no-pretrained --opt adam \
--opt-eps 1e-8 --weight-decay 0 --warmup-lr 0.001 --min-lr 0.0001 --cooldown-epochs 0 --bn-momentum 0.1 --ema-decay 0.95 \
--augmentation flip --max-boxes 32 --target-map 0.2 --workers 1 --drop-file-cache --gallery 12 --overwrite --device cpu"}
export MLPERF_SUBMISSION_ORG=${MLPERF_SUBMISSION_ORG:-demonstration}
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
