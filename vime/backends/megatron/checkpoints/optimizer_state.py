"""State that torch's optimizers must have before Megatron can save or load it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


def allocate_optimizer_state(optimizer: Any) -> None:
    """Gives torch's optimizers their state before the first step; a sharded state dict needs it.

    `optimizer` comes from `get_megatron_optimizer`. Existing state stays as it is. A missing step
    counter is added: a checkpoint of step 0 has none.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if getattr(part, "init_state_fn", None) is None:
            part.init_state_fn = lambda *_: None  # loading calls it, and SGD has none
        is_adam = isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))
        moments = ("exp_avg", "exp_avg_sq") if is_adam else ("momentum_buffer",)
        if not is_adam and not isinstance(inner, torch.optim.SGD):
            continue
        for group in inner.param_groups:
            for p in group["params"]:
                state = inner.state[p]
                for name in moments:
                    if state.get(name) is None:
                        state[name] = torch.zeros_like(p)
                if is_adam and "step" not in state:
                    state["step"] = torch.tensor(0.0)


_NO_WEIGHT = "of no weight"  # a key of an optimizer's state, whose other keys are weights


@contextmanager
def shared_step_counters(optimizer: Any) -> Iterator[None]:
    """Gives an Adam that trains no weight on this rank the step counter of the other ranks.

    Megatron reads the counter from the state of any weight, and a checkpoint stores rank 0's
    counter for all ranks. Runs that freeze weights need this, because a rank may then train none.
    A collective.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    adams = [p.optimizer for p in parts if isinstance(p.optimizer, torch.optim.Adam)]
    states = [s for adam in adams for s in adam.state.values()]
    found: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(found, max((float(s["step"]) for s in states), default=0.0))
    lacking = [adam for adam in adams if not adam.state]
    for adam in lacking:
        adam.state[_NO_WEIGHT] = {"step": torch.tensor(max(found))}
    try:
        yield
    finally:
        forget_counters(optimizer)


def forget_counters(optimizer: Any) -> None:
    """Removes the counters that `shared_step_counters` added, now or before the loaded save."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is not None:  # None: the part has no weight on any rank
            part.optimizer.state.pop(_NO_WEIGHT, None)
