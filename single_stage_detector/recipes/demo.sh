# A small RetinaNet from random weights on generated scenes of six shapes. Division open: the model, the image size and the
# data set are not the benchmark's. Arguments: more options of the program.
export BENCHMARK=single_stage_detector DATASET_DIR=${DATASET_DIR:-build/demo-data}
export NUMEPOCHS=${NUMEPOCHS:-14} WARMUP_EPOCHS=${WARMUP_EPOCHS:-0.4} LOG_INTERVAL=${LOG_INTERVAL:-10}
export EXTRA_PARAMS=${EXTRA_PARAMS:-"--dataset custom --backbone resnet18 --norm batch --trainable-backbone-layers 5 \
--no-pretrained --fpn-channels 64 --head-convs 1 --image-size 128 128 --anchor-sizes 16,32,64,128,256 --max-boxes 32 \
--ema-decay 0.98 $* --device cpu \
--precision $(grep -qsm1 amx_bf16 /proc/cpuinfo && echo bf16 || echo fp32)"} # bf16 where the processor multiplies it fast
export MLPERF_DIVISION=${MLPERF_DIVISION:-open} MLPERF_SUBMISSION_ORG=${MLPERF_SUBMISSION_ORG:-demonstration}
