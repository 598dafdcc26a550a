# nvidia.sh for 1024 images a step. Arguments: as for nvidia.sh.
export LR=${LR:-0.0027} WARMUP_STEPS=${WARMUP_STEPS:-1200}
source "$(dirname "${BASH_SOURCE[0]}")/nvidia.sh" "$@"
