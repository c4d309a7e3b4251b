"""The product that gives a weight's gradient, added to the gradient buffer as it is made.

Megatron calls these two of an extension module of apex. Without it every gradient is first written
in bfloat16 and then added to the buffer in a pass of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wgrad_gemm_accum_fp32(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """main_grad [N, K] float32 += grad_output [T, N]^T inputs [T, K], in float32."""
    left = grad_output.t()
    if not main_grad.is_cuda or inputs.dtype == torch.float32:
        main_grad.addmm_(left.float(), inputs.float())
        return
    torch.addmm(main_grad, left, inputs, out_dtype=torch.float32, out=main_grad)


def wgrad_gemm_accum_fp16(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """The same where the buffer has the gradients' type."""
    main_grad.addmm_(grad_output.t(), inputs)
