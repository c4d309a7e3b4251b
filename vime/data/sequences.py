"""Makes a `TrainSequence` from one sample and checks the lengths of its lists."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from vime.types import TrainSequence

Values = Sequence[float] | np.ndarray


def train_sequence(
    where: str,
    *,
    index: int,
    group: int,
    tokens: Sequence[int] | np.ndarray,
    response_length: int,
    reward: float,
    raw_reward: float,
    loss_mask: Values | None = None,
    rollout_log_probs: Values | None = None,
    teacher_log_probs: Values | None = None,
    train_metadata: dict[str, Any] | None = None,
) -> TrainSequence:
    """A sequence without weights, because they depend on the other sequences of its step.

    The arrays of the sample are not copied if they have the right type.

    where      the name of the sample in errors
    loss_mask  None: all 1
    Raises ValueError when prompt or response has no token, or when a list does not have an entry
    for each response token.
    """
    if not 0 < response_length < len(tokens):
        raise ValueError(
            f"{where} has response_length {response_length} for {len(tokens)} tokens; at least one "
            "token must be the prompt and one the response."
        )
    lists = {
        "loss_mask": loss_mask,
        "rollout_log_probs": rollout_log_probs,
        "teacher_log_probs": teacher_log_probs,
    }
    arrays = {
        name: None if values is None else np.asarray(values, dtype=np.float32)
        for name, values in lists.items()
    }
    for name, array in arrays.items():
        if array is not None and array.shape != (response_length,):
            raise ValueError(
                f"{where}: {name} has {array.size} entries for a response of {response_length} "
                "tokens"
            )
    mask = arrays["loss_mask"]
    return TrainSequence(
        index=index,
        group=group,
        tokens=np.asarray(tokens, dtype=np.int32),
        response_length=response_length,
        loss_mask=_ones(1 << response_length.bit_length())[:response_length]
        if mask is None
        else mask,
        weight=np.zeros(0, dtype=np.float32),
        reward=reward,
        raw_reward=raw_reward,
        rollout_logp=arrays["rollout_log_probs"],
        teacher_logp=arrays["teacher_log_probs"],
        train_metadata=train_metadata,
    )


@cache
def _ones(size: int) -> np.ndarray:
    """Ones that many masks share, so nobody may write to them."""
    ones_N = np.ones(size, dtype=np.float32)
    ones_N.flags.writeable = False
    return ones_N
