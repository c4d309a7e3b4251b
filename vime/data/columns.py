"""Training data that a user's function made -> `TrainBatch`: one list a column, an entry a sample.

The first three columns must be there (N tokens, of which the last R are the response):

    tokens             [N] token ids
    response_lengths   R
    rewards            the score, final: no baseline is taken off any more
    loss_masks         [R] 0 or 1 (default: ones)
    rollout_log_probs  [R] of the engine (default: none)
    teacher_log_probs  [R] of a teacher (default: none)
    raw_reward         for the log (default: rewards)
    sample_indices     Sample.index (default: the position)
    group_indices      Sample.group_index (default: -1)
    train_metadata     a dict (default: None)
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vime.config import Config
from vime.data.batching import Weigh, plan_batch
from vime.errors import PluginError
from vime.types import TrainBatch, TrainSequence

REQUIRED = ("tokens", "response_lengths", "rewards")
OPTIONAL = (
    "loss_masks",
    "rollout_log_probs",
    "teacher_log_probs",
    "raw_reward",
    "sample_indices",
    "group_indices",
    "train_metadata",
)
HOOK = "--custom-convert-samples-to-train-data-path"


def as_train_batch(
    made: Any, cfg: Config, rollout_id: int, *, weigh: Weigh | None = None
) -> TrainBatch:
    """A TrainBatch as it is; columns as one. Raises PluginError, naming the column and the row."""
    if isinstance(made, TrainBatch):
        return made
    if not isinstance(made, Mapping):
        raise PluginError(f"{HOOK} returned {type(made).__name__}; return a TrainBatch or a dict.")
    columns = _checked(made)
    num = len(columns["tokens"])
    rows = [_sequence({name: values[i] for name, values in columns.items()}, i) for i in range(num)]
    num_steps = cfg.batch.steps_per_rollout
    steps = [[s for i, s in enumerate(rows) if i * num_steps // num == k] for k in range(num_steps)]
    metrics = {
        "rollout/num_samples": float(num),
        "rollout/raw_reward": statistics.fmean(s.raw_reward for s in rows),
        "rollout/rewards": statistics.fmean(s.reward for s in rows),
        "rollout/response_len/mean": statistics.fmean(s.response_length for s in rows),
    }
    return plan_batch([s for s in steps if s], cfg, rollout_id, metrics, weigh=weigh)


def _checked(made: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    missing = [name for name in REQUIRED if name not in made]
    unknown = [name for name in made if name not in REQUIRED + OPTIONAL]
    if missing or unknown:
        wrong = [f"lacks {', '.join(missing)}"] * bool(missing)
        wrong += [f"has unknown columns {', '.join(unknown)}"] * bool(unknown)
        raise PluginError(
            f"{HOOK}: the dict {' and '.join(wrong)}. Columns: {', '.join(REQUIRED)}; "
            f"optional: {', '.join(OPTIONAL)}."
        )
    columns = {name: values for name, values in made.items() if values is not None}
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1 or not lengths["tokens"]:
        raise PluginError(f"{HOOK}: the columns must be equally long and not empty: {lengths}.")
    return columns


def _sequence(row: Mapping[str, Any], i: int) -> TrainSequence:
    tokens, size = row["tokens"], int(row["response_lengths"])
    if not 0 < size < len(tokens):
        raise PluginError(
            f"{HOOK}: row {i} has response_lengths {size} for {len(tokens)} tokens; at least one "
            "token must be the prompt and one the response."
        )
    raw_reward = row.get("raw_reward")
    return TrainSequence(
        index=int(row.get("sample_indices", i)),
        group=int(row.get("group_indices", -1)),
        tokens=np.asarray(tokens, dtype=np.int64),
        response_length=size,
        loss_mask=_per_response(row, "loss_masks", size, i, default=1.0),
        weight=np.zeros(0, dtype=np.float32),
        reward=float(row["rewards"]),
        raw_reward=float(row["rewards"] if raw_reward is None else raw_reward),
        rollout_logp=_per_response(row, "rollout_log_probs", size, i),
        teacher_logp=_per_response(row, "teacher_log_probs", size, i),
        train_metadata=row.get("train_metadata"),
    )


def _per_response(
    row: Mapping[str, Any], name: str, size: int, i: int, default: float | None = None
) -> Any:
    values = row.get(name)
    if values is None:
        return None if default is None else np.full(size, default, dtype=np.float32)
    if len(values) != size:
        raise PluginError(
            f"{HOOK}: row {i} has {len(values)} {name} for a response of {size} tokens."
        )
    return np.asarray(values, dtype=np.float32)
