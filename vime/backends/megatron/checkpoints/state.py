"""The state of a model in training, as Megatron's sharded state dict."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from torch import nn

from vime.backends.megatron.checkpoints.optimizer_state import (
    allocate_optimizer_state,
    forget_counters,
    shared_step_counters,
)
from vime.backends.megatron.chunks import unwrap

CRITIC = "critic"  # the critic's entry; the keys of its tensors begin with it


def sharded_state(
    chunks: Sequence[nn.Module],
    optimizer: Any,
    scheduler: Any,
    *,
    loading: bool,
    freezes: bool = False,
) -> dict[str, Any]:
    """Weights, and the optimizer and scheduler where given. A collective.

    loading  the values will be overwritten
    freezes  some weights do not train. Megatron stacks the layers of a model, and the experts of a
             layer, into one tensor, and every part of it must be in the file. The optimizer has no
             state for frozen weights, so its state is then named layer by layer.
    """
    state: dict[str, Any] = {key: chunk.sharded_state_dict() for key, chunk in keyed(chunks)}
    if optimizer is not None:
        allocate_optimizer_state(optimizer)
        weights = dict(state)
        if freezes:
            alone = {"singleton_local_shards": True}
            weights = {k: c.sharded_state_dict(metadata=alone) for k, c in keyed(chunks)}
        with shared_step_counters(optimizer) if freezes else nullcontext():
            state["optimizer"] = optimizer.sharded_state_dict(
                weights,
                is_loading=loading,
                metadata={
                    "distrib_optim_sharding_type": "fully_reshardable",  # reshards TP and PP too
                    "chained_optim_avoid_prefix": True,
                },
            )
    if scheduler is not None:
        state["opt_param_scheduler"] = scheduler.state_dict()
    return state


def fill(
    state: dict[str, Any], chunks: Sequence[nn.Module], optimizer: Any, scheduler: Any
) -> None:
    """Copies a loaded `sharded_state` into the chunks, and the optimizer and scheduler if given."""
    for key, chunk in keyed(chunks):
        chunk.load_state_dict(state[key])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
        forget_counters(optimizer)
        allocate_optimizer_state(optimizer)
    if scheduler is not None:
        scheduler.num_steps = 0  # Megatron adds the saved steps to it
        scheduler.load_state_dict(state["opt_param_scheduler"])


def keyed(chunks: Sequence[nn.Module]) -> list[tuple[str, nn.Module]]:
    """Chunks by Megatron's names: "model", or "model0", "model1", ... under virtual pipelining."""
    if len(chunks) == 1:
        return [("model", unwrap(chunks[0]))]
    return [(f"model{i}", unwrap(chunk)) for i, chunk in enumerate(chunks)]


def critic_state(critic: Any, *, with_optimizer: bool, loading: bool) -> dict[str, Any]:
    """The `sharded_state` of a `Critic`, its tensors named apart from the actor's."""
    optimizer = critic.optimizer if with_optimizer else None
    state = sharded_state(critic.chunks, optimizer, critic.scheduler, loading=loading)
    add_prefix_for_sharding(state, f"{CRITIC}.")
    return state
