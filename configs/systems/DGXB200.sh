# DGX B200: eight GPUs, two CPUs of 56 cores (NVIDIA's published config says 64).
export DGXNGPU=8 DGXNSOCKET=2 DGXSOCKETCORES=56 DGXHT=2
