# The demonstration of config_cpu_demo.sh as 2 nodes x 2 ranks x 4 images: global batch 16. For trying a Slurm cluster.
# Expected: AP 0.2 after about 5 epochs, where config_cpu_demo.sh goes on to 0.42. No MLPerf result.
# Caches are dropped by run.sub.

source "$(dirname "${BASH_SOURCE[0]}")/systems/cpu.sh"
export DGXNNODES=2 DGXNGPU=2 WALLTIME_RUNANDTIME=20
export BATCHSIZE=${BATCHSIZE:-4} EVALBATCHSIZE=${EVALBATCHSIZE:-45} LR=${LR:-0.0007}
source "$(dirname "${BASH_SOURCE[0]}")/../single_stage_detector/recipes/demo.sh" --target-map 0.2 --workers 1
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
