"""The hooks of the trainer, which calls them on every rank.

Axes: [T] tokens of a micro-batch, [R] response tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vime.plugins.hook import Hook, described, is_finite

INIT = Hook(shape="f(args)", returns="None", positional=1)
BEFORE_LOG_PROBS = Hook(shape="f(args, model, store_prefix)", returns="None", positional=3)
BEFORE_TRAIN_STEP = Hook(
    shape="f(args, rollout_id, step_id, model, optimizer, opt_param_scheduler)",
    returns="None",
    positional=6,
)


def _model(made: Any, args: Any, model: Any) -> str | None:
    is_model = hasattr(made, "named_parameters") and not isinstance(made, type)
    return None if is_model else f"returned {described(made)}"


MODEL = Hook(
    shape="f(args, model) -> GPTModel",
    returns="the chunk of Megatron's model to train",
    positional=2,
    check=_model,
)


def _advantages(made: Any, args: Any, sequences: Any, old_logp: Any, ref_logp: Any) -> str | None:
    if not isinstance(made, list | tuple):
        return f"returned {described(made)}"
    shapes = [tuple(np.shape(values)) for values in made]
    wanted = [(s.response_length,) for s in sequences]
    if shapes != wanted:
        return f"returned tensors of shapes {shapes}; expected {wanted}"
    return None if all(map(is_finite, made)) else "returned an advantage that is not finite"


ADVANTAGE = Hook(
    shape="f(args, sequences, old_logp, ref_logp) -> list of tensors [R]",
    returns="a list with one tensor [R] of finite numbers for each sequence",
    positional=4,
    check=_advantages,
)


def _loss_and_stats(made: Any, like_T: Any) -> str | None:
    """Does not check that the loss is finite: that would wait for the GPU. The step checks it."""
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], Mapping)):
        return f"returned {described(made)}"
    loss_T, stats = made
    for name, value_T in {"the loss": loss_T, **stats}.items():
        if not hasattr(value_T, "requires_grad"):
            return f"returned {described(value_T)} for {name}"
        if value_T.shape != like_T.shape:
            shape, wanted = tuple(value_T.shape), tuple(like_T.shape)
            return f"returned the shape {shape} for {name}, but the tokens have {wanted}"
    has_gradient = loss_T.requires_grad or not like_T.requires_grad
    return None if has_gradient else "returned a loss without a gradient"


def _token_loss(made: Any, args: Any, logp_T: Any, **known: Any) -> str | None:
    is_object = hasattr(made, "value_T") and hasattr(made, "stats")
    return _loss_and_stats((made.value_T, made.stats) if is_object else made, logp_T)


_PER_TOKEN = "one value per token, not reduced, because the batch's weights reduce them"

LOSS = Hook(
    shape="f(args, logp_T, *, old_logp_T, adv_T, entropy_T, ref_logp_T, rollout_logp_T, "
    "sequence_sum) -> TokenLoss or (loss_T, dict of [T])",
    returns=f"(loss [T], dict of [T]) or a TokenLoss, {_PER_TOKEN}",
    positional=2,
    keywords=("old_logp_T", "adv_T", "entropy_T", "ref_logp_T", "rollout_logp_T", "sequence_sum"),
    check=_token_loss,
)


def _corrected_loss(made: Any, args: Any, *, pg_loss: Any, **known: Any) -> str | None:
    return _loss_and_stats(made, pg_loss)


TIS = Hook(
    shape="f(args, *, pg_loss, train_log_probs, rollout_log_probs, sequence_sum) "
    "-> (pg_loss [T], dict of [T])",
    returns=f"(loss [T], dict of [T]), {_PER_TOKEN}",
    positional=1,
    keywords=("pg_loss", "train_log_probs", "rollout_log_probs", "sequence_sum"),
    check=_corrected_loss,
)
