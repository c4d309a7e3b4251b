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

from vime.config import Config
from vime.data.batching import Weigh, plan_batch
from vime.data.sequences import train_sequence
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
    raw_reward = row.get("raw_reward")
    try:
        return train_sequence(
            f"row {i}",
            index=int(row.get("sample_indices", i)),
            group=int(row.get("group_indices", -1)),
            tokens=row["tokens"],
            response_length=int(row["response_lengths"]),
            reward=float(row["rewards"]),
            raw_reward=float(row["rewards"] if raw_reward is None else raw_reward),
            loss_mask=row.get("loss_masks"),
            rollout_log_probs=row.get("rollout_log_probs"),
            teacher_log_probs=row.get("teacher_log_probs"),
            train_metadata=row.get("train_metadata"),
        )
    except ValueError as e:
        raise PluginError(f"{HOOK}: {e}") from e
