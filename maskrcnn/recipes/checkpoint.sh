# A checkpoint of Mask R-CNN on the validation images, as the scripts published by NVIDIA do it (scripts/eval.sh,
# inference.sh, inference_benchmark.sh). Say which: ./run_and_time.sh --checkpoint FILE, or MODEL.WEIGHT FILE
# Arguments: options of the program, as checkpoint.sh --precision fp16 --skip-eval
export BENCHMARK=maskrcnn BATCHSIZE=${BATCHSIZE:-1} EVALBATCHSIZE=${EVALBATCHSIZE:-1}
export EXTRA_PARAMS=${EXTRA_PARAMS:-"--config-file configs/e2e_mask_rcnn_R_50_FPN_1x.yaml --mode evaluate $* \
--json-summary {output}/log.json"}
