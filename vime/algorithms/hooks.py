"""Users' functions in place of parts of the algorithm, results checked, or called beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vime.algorithms.policy import TokenLoss
from vime.errors import PluginError


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingHooks:
    """Users' functions, each called with `args` first; None: vime's own.

    loss       the whole loss, called as `PolicyObjective` is
    advantage  f(args, sequences, old_logp, ref_logp) -> a tensor [R] for each sequence
    correct    f(args, *, pg_loss, train_log_probs, rollout_log_probs, sequence_sum)
    model      f(args, model) -> the chunk of Megatron's model to train

    Called at their moments on every rank, for what they do; their results are not looked at:
    init               f(args), once the ranks are connected
    before_log_probs   f(args, model, store_prefix), the model being a list of Megatron's chunks
    before_train_step  f(args, rollout_id, step_id, model, optimizer, opt_param_scheduler)
    """

    args: Any = None
    init: Callable | None = None
    before_log_probs: Callable | None = None
    before_train_step: Callable | None = None
    loss: Callable | None = None
    advantage: Callable | None = None
    correct: Callable | None = None
    model: Callable | None = None


def user_loss(hooks: TrainingHooks) -> Callable[..., TokenLoss]:
    """--custom-loss-function-path as an objective. It returns a `TokenLoss` or (loss_T, stats)."""
    name = "--custom-loss-function-path"

    def objective(logp_T: Tensor, **known: Any) -> TokenLoss:
        assert hooks.loss is not None
        made = hooks.loss(hooks.args, logp_T, **known)
        if isinstance(made, TokenLoss):
            made = (made.value_T, made.stats)
        return TokenLoss(*_loss_and_stats(made, logp_T, name))

    return objective


def user_correction(hooks: TrainingHooks) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """--custom-tis-function-path as `PolicyObjective.correct`. It returns (pg_loss, stats)."""
    name = "--custom-tis-function-path"

    def correct(*, pg_loss: Tensor, **known: Any) -> tuple[Tensor, dict[str, Tensor]]:
        assert hooks.correct is not None
        made = hooks.correct(hooks.args, pg_loss=pg_loss, **known)
        return _loss_and_stats(made, pg_loss, name)

    return correct


def user_advantages(
    hooks: TrainingHooks,
    sequences: Sequence[Any],
    old_logp: Sequence[Tensor],
    ref_logp: Sequence[Tensor] | None,
) -> list[Tensor]:
    """--custom-advantage-function-path: one advantage per response token of each sequence."""
    name = "--custom-advantage-function-path"
    assert hooks.advantage is not None
    made = [torch.as_tensor(a) for a in hooks.advantage(hooks.args, sequences, old_logp, ref_logp)]
    shapes = [tuple(a.shape) for a in made]
    wanted = [(s.response_length,) for s in sequences]
    if shapes != wanted:
        raise PluginError(f"{name} returned tensors of shapes {shapes}; expected {wanted}.")
    return made


def _loss_and_stats(made: Any, like_T: Tensor, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], dict)):
        raise PluginError(f"{name} returned {type(made).__name__}; return (loss [T], dict of [T]).")
    loss_T, stats = made
    for what, value_T in {"the loss": loss_T, **stats}.items():
        if not isinstance(value_T, Tensor) or value_T.shape != like_T.shape:
            raise PluginError(
                f"{name}: {what} is {getattr(value_T, 'shape', type(value_T).__name__)}; give one "
                f"value per token, {tuple(like_T.shape)}, and reduce nothing: the batch's weights "
                "do that."
            )
    return loss_T, {what: value_T.detach() for what, value_T in stats.items()}
