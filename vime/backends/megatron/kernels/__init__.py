"""The GPU kernels of the training pass, each with a plain PyTorch twin.

`choice.chosen()` says which kernels run. The environment can change the choice:
VIME_KERNELS=plain            no kernel: Megatron's own modules, for comparison
VIME_KERNELS=attention=cudnn  this attention; `attention.py` has the names
"""
