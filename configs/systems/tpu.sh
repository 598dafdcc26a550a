# The host of a TPU, two CPUs of 48 cores. One process: the program itself starts those of the TPU's cores.
export DGXNGPU=1 DGXNSOCKET=2 DGXSOCKETCORES=48 DGXHT=2
