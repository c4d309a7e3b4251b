"""Replacements for functions of TransformerEngine and apex, which megatron-core may lack."""

from __future__ import annotations

from vime.patches import Patch


def _router_gemm() -> None:
    import megatron.core.transformer.moe.moe_utils as moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]


def _latent_attention() -> None:
    import megatron.core.transformer.multi_latent_attention as mla

    if not isinstance(mla.TELinear, type):
        mla.HAVE_TE = False


def _many_tensors() -> None:
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer

    from vime.backends.megatron.kernels import many_tensors

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = many_tensors.l2_norm
    for module in (clip_grads, optimizer):
        if module.multi_tensor_scale_impl is utils.local_multi_tensor_scale:
            module.multi_tensor_scale_impl = many_tensors.scale


def _weight_gradients() -> None:
    from megatron.core.tensor_parallel import layers

    from vime.backends.megatron.kernels import weight_gradient

    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = weight_gradient
        layers._grad_accum_fusion_available = True


EXTENSION_PATCHES = (
    Patch(
        "router gemm",
        "moe_utils reads te_general_gemm, but defines it only with TransformerEngine (0.16)",
        "megatron-core 0.16 is no longer supported",
        ("megatron.core.transformer.moe.moe_utils",),
        _router_gemm,
    ),
    Patch(
        "latent attention",
        "without TransformerEngine multi_latent_attention imports placeholders for its classes, "
        "sets HAVE_TE all the same, and calls isinstance with the placeholders (0.16)",
        "HAVE_TE is false without TransformerEngine",
        (
            "megatron.core.transformer.multi_latent_attention.HAVE_TE",
            "megatron.core.transformer.multi_latent_attention.TELinear",
        ),
        _latent_attention,
    ),
    Patch(
        "many tensors",
        "without apex the gradient norm waits for the device once per parameter; clipping and "
        "copying the main parameters launch two kernels and allocate a temporary for each",
        "Megatron's fallbacks use torch._foreach_*",
        (
            "megatron.core.optimizer.clip_grads.l2_norm_impl",
            "megatron.core.optimizer.clip_grads.multi_tensor_scale_impl",
            "megatron.core.optimizer.optimizer.multi_tensor_scale_impl",
            "megatron.core.utils.local_multi_tensor_l2_norm",
            "megatron.core.utils.local_multi_tensor_scale",
            "torch._foreach_norm",
            "torch._foreach_copy_",
        ),
        _many_tensors,
    ),
    Patch(
        "weight gradients",
        "--gradient-accumulation-fusion calls an extension module of apex",
        "Megatron accumulates with torch.addmm(out_dtype=...)",
        (
            "megatron.core.tensor_parallel.layers._grad_accum_fusion_available",
            "megatron.core.tensor_parallel.layers.LinearWithGradAccumulationAndAsyncCommunication",
        ),
        _weight_gradients,
    ),
)
