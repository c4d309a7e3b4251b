"""The hooks between a rollout and the trainer: scores, batch, log. Axis: [R] response tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vime.plugins.hook import Hook, described, is_finite
from vime.types import Sample, TrainBatch

# The columns that training data may have; `vime/data/columns.py` says what they hold.
REQUIRED = ("tokens", "response_lengths", "rewards")
PER_RESPONSE = ("loss_masks", "rollout_log_probs", "teacher_log_probs")
OPTIONAL = (*PER_RESPONSE, "raw_reward", "sample_indices", "group_indices", "train_metadata")


def _batch_or_columns(made: Any, args: Any, samples: list[Sample]) -> str | None:
    if isinstance(made, TrainBatch):
        return _batch_problem(made)
    return _columns_problem(made) if isinstance(made, Mapping) else f"returned {described(made)}"


def _columns_problem(made: Mapping[str, Any]) -> str | None:
    columns = {name: values for name, values in made.items() if values is not None}
    missing = [name for name in REQUIRED if name not in columns]
    unknown = [str(name) for name in columns if name not in REQUIRED + OPTIONAL]
    if missing or unknown:
        wrong = [f"lacks {', '.join(missing)}"] * bool(missing)
        wrong += [f"has unknown columns {', '.join(unknown)}"] * bool(unknown)
        return f"returned a dict that {' and '.join(wrong)}"
    lengths = {n: len(v) if hasattr(v, "__len__") else described(v) for n, v in columns.items()}
    num = lengths["tokens"]
    if not isinstance(num, int) or set(lengths.values()) != {num} or not num:
        return f"returned columns that are empty or not equally long: {lengths}"
    for i in range(num):
        try:
            problem = _row_problem({name: values[i] for name, values in columns.items()})
        except (TypeError, ValueError) as error:
            problem = f"values of another kind ({error})"
        if problem:
            return f"returned columns whose row {i} has {problem}"
    return None


def _row_problem(row: Mapping[str, Any]) -> str | None:
    tokens, size = row["tokens"], int(row["response_lengths"])
    if not 0 < size < len(tokens):
        return (
            f"response_lengths {size} for {len(tokens)} tokens; at least one token must be the "
            "prompt and one the response"
        )
    for name in PER_RESPONSE:
        values = row.get(name)
        if values is not None and len(values) != size:
            return f"{len(values)} {name} for a response of {size} tokens"
    score = float(row["rewards"])
    return None if math.isfinite(score) else f"the reward {score}"


def _batch_problem(batch: TrainBatch) -> str | None:
    count = len(batch.sequences)
    named = [p for step in batch.steps for rank in step.micro_batches for b in rank for p in b]
    if not named or not set(named) <= set(range(count)) or len(set(named)) < len(named):
        return f"returned a TrainBatch whose steps do not name positions below {count} once each"
    for s in batch.sequences:
        for name in ("loss_mask", "weight"):
            if (length := len(getattr(s, name))) != s.response_length:
                return (
                    f"returned a TrainBatch whose sample {s.index} has {length} entries of {name} "
                    f"for a response of {s.response_length} tokens"
                )
        if not is_finite(s.weight):
            return f"returned a TrainBatch whose sample {s.index} has a weight that is not finite"
    return None


CONVERT = Hook(
    shape="f(args, samples) -> TrainBatch or dict of columns",
    returns=f"a TrainBatch or a dict of the columns {', '.join(REQUIRED)} (optional: "
    f"{', '.join(OPTIONAL)})",
    positional=2,
    check=_batch_or_columns,
)


def _rewards_and_scores(made: Any, args: Any, samples: list[Sample]) -> str | None:
    if not isinstance(made, list | tuple) or len(made) != 2:
        return f"returned {described(made)}"
    try:
        raw, scores = ([float(value) for value in column] for column in made)
    except (TypeError, ValueError) as error:
        return f"returned {described(made)} ({error})"
    if not len(raw) == len(scores) == len(samples):
        count = len(samples)
        return f"returned {len(raw)} raw rewards and {len(scores)} scores for {count} samples"
    bad = next((value for value in raw + scores if not math.isfinite(value)), None)
    return None if bad is None else f"returned {bad}, which is not finite"


POST_PROCESS = Hook(
    shape="f(args, samples) -> (raw rewards, scores)",
    returns="(raw rewards, scores), two lists with one finite number for each sample",
    positional=2,
    check=_rewards_and_scores,
)


def _weights(made: Any, args: Any, masks: list[np.ndarray], per_token: bool) -> str | None:
    if not isinstance(made, list | tuple):
        return f"returned {described(made)}"
    try:
        weights = [np.asarray(w, dtype=np.float32) for w in made]
    except (TypeError, ValueError) as error:
        return f"returned {described(made)} ({error})"
    shapes, wanted = [w.shape for w in weights], [m.shape for m in masks]
    if shapes != wanted:
        return f"returned weights of shapes {shapes} for masks of shapes {wanted}"
    return None if all(map(is_finite, weights)) else "returned a weight that is not finite"


REDUCER = Hook(
    shape="f(args, loss_masks, per_token) -> list of weights [R]",
    returns="a list of arrays: the weights [R] of each sequence, finite numbers",
    positional=3,
    check=_weights,
)


def _batch_or_none(made: Any, args: Any, rollout_id: int, batch: TrainBatch) -> str | None:
    if made is None:
        return None
    return _batch_problem(made) if isinstance(made, TrainBatch) else f"returned {described(made)}"


DATA_POSTPROCESS = Hook(
    shape="f(args, rollout_id, batch) -> None or TrainBatch",
    returns="a TrainBatch (dataclasses.replace makes one), or None to keep the given one",
    positional=3,
    check=_batch_or_none,
)


def _skips(made: Any, *given: Any) -> str | None:
    is_plain = made is None or isinstance(made, bool | np.bool_)
    return None if is_plain else f"returned {described(made)}"


LOG = Hook(
    shape="f(rollout_id, args, samples, metrics, rollout_time) -> None, or True to log nothing",
    returns="None, or True to log nothing of the rollout; `metrics` may change in place",
    positional=5,
    check=_skips,
)
EVAL_LOG = Hook(
    shape="f(rollout_id, args, data, metrics) -> None, or True to log nothing",
    returns="None, or True to log nothing of the evaluation; `metrics` may change in place",
    positional=4,
    check=_skips,
)
