"""Corrections of optimizers and their checkpoints in megatron-core 0.16 to 0.19 without apex."""

from __future__ import annotations

import functools
from typing import Any

import torch

from vime.patches import Patch


def _adam_step() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    stock = DistributedOptimizer._set_main_param_and_optimizer_states

    @torch.no_grad()
    def keep_step(self: Any, model_param: torch.nn.Parameter, tensors: dict) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        step = state.pop("step", None)
        stock(self, model_param, tensors)
        if step is not None:
            state["step"] = step.clone()

    DistributedOptimizer._set_main_param_and_optimizer_states = keep_step


def _bucket_padding() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    stock = DistributedOptimizer.sharded_param_state_fully_reshardable

    def with_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        gather = self.get_parameter_state_dp_zero

        def padded(**options: Any) -> dict | None:
            state = gather(**options)
            for buffer_id, buffer in enumerate(self.buffers if state else ()):
                for tensors in state[buffer_id].values():
                    _spread(tensors, buffer)
            return state

        self.get_parameter_state_dp_zero = padded
        try:
            return stock(self, *args, **kwargs)
        finally:
            del self.get_parameter_state_dp_zero

    DistributedOptimizer.sharded_param_state_fully_reshardable = with_padding


def _spread(tensors: dict[str, Any], buffer: Any) -> None:
    """Moves each bucket from its position without padding to its offset in the buffer."""
    for key, packed in tensors.items():
        if torch.is_tensor(packed):
            tensors[key] = packed.new_zeros(buffer.numel)
            first = 0
            for bucket in buffer.buckets:
                length = bucket.numel_unpadded
                end = bucket.offset + length
                tensors[key][bucket.offset : end] = packed[first : first + length]
                first += length


def _float32_beside_bfloat16() -> None:
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    stock = Float16OptimizerWithFloat16Params.sharded_state_dict
    stock_load = Float16OptimizerWithFloat16Params.load_state_dict
    main = "fp32_from_fp16_params"

    @functools.wraps(stock)
    def with_float32(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain = self.float16_groups
        self.float16_groups = [
            a + b for a, b in zip(plain, self.fp32_from_fp32_groups, strict=True)
        ]
        try:
            state = stock(self, *args, **kwargs)
        finally:
            self.float16_groups = plain
        state[main] = [group for group in state[main] if group]  # empty lists are not saved
        return state

    @functools.wraps(stock_load)
    def load(self: Any, state_dict: dict[str, Any]) -> Any:
        saved = iter(state_dict[main])
        groups = [next(saved) if group else [] for group in self.fp32_from_float16_groups]
        return stock_load(self, {**state_dict, main: groups})

    Float16OptimizerWithFloat16Params.sharded_state_dict = with_float32
    Float16OptimizerWithFloat16Params.load_state_dict = load


def _match_groups_without_learning_rates() -> None:
    from megatron.core.optimizer import distrib_optimizer, optimizer

    for module in (optimizer, distrib_optimizer):
        known = module.param_group_identifier_keys
        set_by_flags = ("max_lr", "min_lr", "start_wd", "end_wd")
        module.param_group_identifier_keys = tuple(key for key in known if key not in set_by_flags)


_HALF = "megatron.core.optimizer.optimizer.Float16OptimizerWithFloat16Params"
_DISTOPT = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"

OPTIMIZER_PATCHES = (
    Patch(
        "adam step",
        "without apex, all parameters of a loaded DistributedOptimizer share one step tensor, "
        "so AdamW increments it once per parameter and the next update is silently wrong",
        "DistributedOptimizer.load_state_dict clones the step",
        (
            f"{_DISTOPT}._set_main_param_and_optimizer_states",
            f"{_DISTOPT}.__init__",
        ),
        _adam_step,
    ),
    Patch(
        "bucket padding",
        "the DistributedOptimizer's resharding checkpoint finds parameters by their position in a "
        "padded buffer, but the gathered tensors lack the padding between buckets: after the first "
        "padded bucket (tied embeddings on a last pipeline stage always have one) it saves wrong "
        "values (0.16 to 0.19)",
        "sharded_param_state_fully_reshardable and get_parameter_state_dp_zero agree",
        (
            f"{_DISTOPT}.sharded_param_state_fully_reshardable",
            f"{_DISTOPT}.get_parameter_state_dp_zero",
        ),
        _bucket_padding,
    ),
    Patch(
        "float32 beside bfloat16",
        "a checkpoint of the plain bfloat16 optimizer omits parameters that are float32, such as a "
        "critic's head, and cannot be loaded when a group has no others (0.16 to 0.19)",
        "sharded_state_dict and load_state_dict include fp32_from_fp32_groups",
        (f"{_HALF}.sharded_state_dict", f"{_HALF}.load_state_dict"),
        _float32_beside_bfloat16,
    ),
    Patch(
        "groups without learning rates",
        "a checkpoint's parameter groups are matched by their learning rate too, so a run cannot "
        "resume with another --lr (0.19)",
        "groups are matched only by values that no flag sets",
        (
            "megatron.core.optimizer.optimizer.param_group_identifier_keys",
            "megatron.core.optimizer.distrib_optimizer.param_group_identifier_keys",
        ),
        _match_groups_without_learning_rates,
    ),
)
