"""The GPU kernels of the training pass, each with a plain PyTorch twin; `chosen()` says which run.

VIME_KERNELS=plain            none of them: Megatron's own modules, for comparison
VIME_KERNELS=attention=cudnn  that attention; names are in `attention.py`
"""

from vime.backends.megatron.kernels.choice import Kernels, chosen
from vime.backends.megatron.kernels.dispatch import rms_norm, split_qkv, swiglu

__all__ = ["Kernels", "chosen", "rms_norm", "split_qkv", "swiglu"]
