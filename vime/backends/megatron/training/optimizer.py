"""Megatron's data-parallel wrapper, optimizer and learning-rate schedule, from the flags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import optimizer as mcore_optimizer
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

from vime import platform
from vime.config import Config

_WSD_DECAY = 0.1  # --lr-decay-style WSD: the last tenth of the run decays


def wrap_for_training(cfg: Config, chunks: Sequence[nn.Module]) -> list[DistributedDataParallel]:
    """The chunks with gradient buffers. Sets the hooks of Megatron's schedule in their config."""
    p = cfg.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=cfg.optimizer.accumulate_fp32,
        overlap_grad_reduce=p.overlap_grad_reduce,
        overlap_param_gather=p.overlap_param_gather,
        use_distributed_optimizer=p.use_distributed_optimizer,
    )
    wrapped = [
        DistributedDataParallel(
            chunk.config, ddp_config, chunk, disable_bucketing=i > 0 or not p.overlap_grad_reduce
        )
        for i, chunk in enumerate(chunks)
    ]
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    if p.overlap_grad_reduce:
        config.no_sync_func = _one_or_list([c.no_sync for c in wrapped])
        if p.pp > 1:
            config.grad_sync_func = _one_or_list([c.start_grad_sync for c in wrapped])
    return wrapped


def build_optimizer(
    cfg: Config, chunks: Sequence[DistributedDataParallel]
) -> tuple[Any, OptimizerParamScheduler]:
    """Optimizer, and the scheduler that counts its steps. Norms and biases do not decay."""
    o, dtype = cfg.optimizer, platform.current().dtype(cfg.model.dtype)
    config = OptimizerConfig(
        optimizer=o.optimizer,
        lr=o.lr,
        min_lr=o.min_lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.eps,
        clip_grad=o.clip_grad,
        bf16=dtype.itemsize == 2,
        params_dtype=dtype,
        use_distributed_optimizer=cfg.parallel.use_distributed_optimizer,
        overlap_param_gather=cfg.parallel.overlap_param_gather,
    )
    overrides = mcore_optimizer.get_standard_config_overrides(config)
    # This mark puts the value head into its own group and changes no rate. Megatron confuses the
    # optimizer states of a group with two precisions.
    overrides[mcore_optimizer.ParamKey(attr="is_value_head")] = {"is_decoupled_lr": True}
    optimizer = get_megatron_optimizer(config, list(chunks), config_overrides=overrides)
    if platform.current().is_cuda:
        _fuse(optimizer)
    return optimizer, _scheduler(cfg, optimizer)


def _fuse(optimizer: Any) -> None:
    """Makes torch's Adam update all parameters in a few kernels that read each tensor once."""

    def counters_on_device(inner: torch.optim.Optimizer, *_: Any) -> None:
        for parameter, state in inner.state.items():  # a checkpoint loads them on the host
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].to(parameter.device, torch.float32)

    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if isinstance(inner, (torch.optim.Adam, torch.optim.AdamW)):
            for group in inner.param_groups:
                group["fused"], group["foreach"] = True, False
            inner.register_step_pre_hook(counters_on_device)


def apply_flags_again(cfg: Config, optimizer: Any, scheduler: OptimizerParamScheduler) -> None:
    """After a checkpoint was loaded: keeps its counters and moments, sets the rest from the flags.

    The scheduler's step sets the weight decay.
    """
    o = cfg.optimizer
    for group in optimizer.param_groups:
        group["max_lr"], group["min_lr"] = o.lr, o.min_lr
        if "betas" in group:
            group["betas"], group["eps"] = (o.beta1, o.beta2), o.eps
    scheduler.step(0)


def _scheduler(cfg: Config, optimizer: Any) -> OptimizerParamScheduler:
    o = cfg.optimizer
    total = cfg.decay_steps or 1 << 40
    warmup = o.warmup_steps(total)
    return OptimizerParamScheduler(
        optimizer,
        # Megatron takes the first step at this rate; at 0 the first rollout would be wasted.
        init_lr=o.lr / (warmup + 1),
        max_lr=o.lr,
        min_lr=o.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(total, warmup + 1),
        lr_decay_style=o.lr_decay_style,
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=max(1, round(_WSD_DECAY * total)),
        lr_wsd_decay_style="linear",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def _one_or_list(functions: list) -> Any:
    return functions if len(functions) > 1 else functions[0]
