# shellcheck disable=SC2034  # the launchers read the variables
# What the launchers need to know of this benchmark; sourced by configs/config_mounts.sh and tools/demo.sh.
container_data=/datasets/data # where a container has the data set
own_variables='WARMUP_STEPS'  # settings that the program alone reads from the environment: A|B
demo_scenes=(--train 600 --val 60 --most 3 --radius 18 38)
