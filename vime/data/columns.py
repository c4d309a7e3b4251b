"""Makes a `TrainBatch` from a user's columns: a list for each column, an entry for each sample.

`vime/plugins/batch.py` checks the columns. The first three are required. A sample has N tokens; the
last R tokens are the response:

    tokens             [N] token ids
    response_lengths   R
    rewards            the final score: no baseline is subtracted from it
    loss_masks         [R] 0 or 1 (default: all 1)
    rollout_log_probs  [R] log-probabilities of the engine (default: none)
    teacher_log_probs  [R] log-probabilities of a teacher (default: none)
    raw_reward         the reward for the metrics (default: rewards)
    sample_indices     Sample.index (default: the position)
    group_indices      Sample.group_index (default: -1)
    train_metadata     a dict (default: None)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vime.config import Config
from vime.data.sample_metrics import of_rewards
from vime.data.sequences import train_sequence
from vime.data.train_batch import Weigh, check_numbers, plan_batch, steps_of
from vime.types import TrainBatch, TrainSequence


def as_train_batch(
    made: TrainBatch | Mapping[str, Sequence[Any]],
    cfg: Config,
    rollout_id: int,
    *,
    weigh: Weigh | None = None,
) -> TrainBatch:
    """Returns a TrainBatch unchanged; makes a TrainBatch from columns.

    Raises ValueError for a number that the trainer cannot use.
    """
    if isinstance(made, TrainBatch):
        check_numbers(made.sequences, cfg)
        return made
    columns = {name: values for name, values in made.items() if values is not None}
    num = len(columns["tokens"])
    rows = [_sequence({name: values[i] for name, values in columns.items()}, i) for i in range(num)]
    members = steps_of(num, range(num), cfg.batch.steps_per_rollout)
    steps = [[rows[i] for i in step] for step in members]
    metrics = of_rewards([s.raw_reward for s in rows], [s.reward for s in rows])
    return plan_batch(steps, cfg, rollout_id, metrics, weigh=weigh)


def _sequence(row: Mapping[str, Any], i: int) -> TrainSequence:
    raw_reward = row.get("raw_reward")
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
