"""The matrix product of a weight's gradient, which adds its result to the gradient buffer.

Megatron calls these two functions of an extension module of apex. Without them every gradient is
first written in bfloat16 and then added to the buffer in a second pass.
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
    """The same sum for a buffer that has the gradients' type."""
    main_grad.addmm_(grad_output.t(), inputs)
