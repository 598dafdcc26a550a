# Mask R-CNN as the MLPerf 3.1 configs published by NVIDIA train it: COCO 2017, until boxes have AP .377 and masks .339.
# A config sets LR and WARMUP_STEPS and sources it with the rest of the schedule as arguments:
# mlperf.sh SOLVER.STEPS 12000,16000 SOLVER.MAX_ITER 40000 SOLVER.WARMUP_FACTOR 0.000192
export BENCHMARK=maskrcnn NUMEPOCHS=${NUMEPOCHS:-0} # 0: SOLVER.MAX_ITER says how many steps there may be
export MLPERF_RULESET=${MLPERF_RULESET:-3.1.0}      # the last rules that have it
export EXTRA_PARAMS=${EXTRA_PARAMS:-"--config-file configs/e2e_mask_rcnn_R_50_FPN_1x_bs96.yaml SOLVER.WARMUP_METHOD mlperf_linear \
PER_EPOCH_EVAL True MIN_BBOX_MAP 0.377 MIN_MASK_MAP 0.339 --precision fp16 $*"}
