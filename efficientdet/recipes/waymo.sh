# EfficientDet-D0 on Waymo's three classes as published by NVIDIA (scripts/waymo/train_waymo_AMP_8xA100-80G.sh), from a
# checkpoint trained on COCO: ./run_and_time.sh --initial-checkpoint FILE. Arguments: further options of the program.
# DATASET_DIR: the folder whose training/ and validation/ public-scripts/waymo_to_coco.py wrote; parts that lie elsewhere
# by --waymo-train, --waymo-train-annotation, --waymo-val, --waymo-val-annotation.
export BENCHMARK=efficientdet NUMEPOCHS=${NUMEPOCHS:-24} LR=${LR:-0.2} WARMUP_EPOCHS=${WARMUP_EPOCHS:-1}
export EXTRA_PARAMS=${EXTRA_PARAMS:-"--waymo --dataset waymo --input-size 1536 --remove-weights class_net,box_net,anchor \
--sync-bn --ema-decay 0.999 --eval-after 24 --save-checkpoint-interval 1 --dllogger-file {output}/log.json $*"}
