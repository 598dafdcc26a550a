# Mask R-CNN on COCO as the scripts published by NVIDIA train it (scripts/train.sh, train_benchmark.sh). A config sets LR
# and WARMUP_STEPS, which stand in its YAML file too, and sources it with options of the program as arguments:
# coco.sh --config-file configs/e2e_mask_rcnn_R_50_FPN_1x.yaml --precision fp16
export BENCHMARK=maskrcnn NUMEPOCHS=${NUMEPOCHS:-0} WARMUP_STEPS=${WARMUP_STEPS:-500} # epochs 0: SOLVER.MAX_ITER says it
export EXTRA_PARAMS=${EXTRA_PARAMS:-"$* --json-summary {output}/log.json"}
