# shellcheck disable=SC2034  # the launchers read the variables
# What the launchers need to know of this benchmark; sourced by configs/config_mounts.sh and tools/demo.sh.
container_data=/datasets/open-images-v6 # where a container has the data set
own_variables='WARMUP_EPOCHS'           # settings that the program alone reads from the environment: A|B
demo_scenes=()                          # options of tools/make_scenes.py
