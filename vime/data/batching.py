"""Makes a frozen `TrainBatch` from groups of samples. Every token has its weight in the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from vime.config import Config
from vime.data.rewards import overlong_penalty, score_samples
from vime.data.sample_metrics import is_usable, of_groups, of_rewards, of_samples
from vime.data.sequences import train_sequence
from vime.data.train_batch import Weigh, plan_batch, steps_of
from vime.errors import PluginError
from vime.number_lists import Runs, array_of, stored
from vime.types import Group, Sample, Status, TrainBatch, TrainSequence

# The usable samples of all groups -> (raw rewards, scores), one of each per sample.
PostProcess = Callable[[list[Sample]], tuple[Sequence[float], Sequence[float]]]


def build_train_batch(
    groups: Sequence[Group],
    cfg: Config,
    rollout_id: int,
    *,
    post_process: PostProcess | None = None,
    weigh: Weigh | None = None,
) -> TrainBatch:
    """The training data of one rollout.

    Rules for special samples:
    - A failed sample (`Status.FAILED`, or without a reward that the loss needs) has no loss and
      does not count in its group's statistics. `rollout/failed_samples` counts it.
    - A removed sample (`remove_sample`) counts in its group's statistics and in its step's number
      of samples. Its tokens weigh 0.
    - A sample without a response token counts in its group's statistics and has no sequence.
      `rollout/empty_samples` counts it.
    A step has consecutive samples. A step that lost all its samples is left out.
    `post_process` replaces the rewards and their normalisation, `weigh` replaces `token_weights`.

    Raises ValueError when every sample failed, when one is unfinished, or when a sample's lists do
    not fit its response. Raises PluginError with the sample's index when --reward-key cannot read
    a reward, or when a reward is NaN or infinite.
    """
    samples = list(chain.from_iterable(groups))
    group_ids = [
        -1 - position if s.group_index is None else s.group_index
        for position, group in enumerate(groups)
        for s in group
    ]
    needs_reward = cfg.algorithm.needs_reward
    _check_finished(samples)
    usable = [i for i, s in enumerate(samples) if is_usable(s, needs_reward)]
    if not usable:
        reasons = sorted({s.failure or "no reward" for s in samples})[:3]
        raise ValueError(
            f"rollout {rollout_id}: none of its {len(samples)} samples can be trained on: "
            + ("; ".join(reasons) or "it is empty")
        )
    raw, scores = [math.nan] * len(samples), [math.nan] * len(samples)
    metrics = of_samples(samples, needs_reward)
    if needs_reward:
        if post_process is None:
            values = [_reward(samples[i], cfg) for i in usable]
            shaped = _minus_overlong_penalty(values, [samples[i] for i in usable], cfg)
            normalised = score_samples(shaped, [group_ids[i] for i in usable], cfg.algorithm)
        else:
            made = post_process([samples[i] for i in usable])
            values, normalised = ([float(value) for value in column] for column in made)
        for i, value, score in zip(usable, values, normalised, strict=True):
            raw[i], scores[i] = value, score
        metrics |= of_rewards(values, normalised)
        metrics |= of_groups(values, [group_ids[i] for i in usable])

    kept = [i for i in usable if samples[i].response_length > 0]
    steps = [
        [_sequence(samples[i], group_ids[i], scores[i], raw[i]) for i in members]
        for members in steps_of(len(samples), kept, cfg.batch.steps_per_rollout)
    ]
    batch = plan_batch(steps, cfg, rollout_id, metrics, weigh=weigh)
    newest = _newest_version([samples[i] for i in kept], batch.sequences)
    return replace(batch, weight_version=newest)


def _newest_version(samples: Sequence[Sample], sequences: Sequence[TrainSequence]) -> int | None:
    """The newest weight version of a token with loss. Versions below 0 are unknown."""
    newest = -1
    for sample, sequence in zip(samples, sequences, strict=True):
        versions = stored(sample, "weight_versions")
        if max(versions.values if isinstance(versions, Runs) else versions, default=-1) > newest:
            versions_R = np.asarray(array_of(sample, "weight_versions"))[: sequence.response_length]
            with_loss_R = sequence.loss_mask[: len(versions_R)] > 0
            newest = max(newest, int(versions_R[with_loss_R].max(initial=-1)))
    return None if newest < 0 else newest


def _minus_overlong_penalty(
    values: Sequence[float], samples: Sequence[Sample], cfg: Config
) -> list[float]:
    """The rewards minus DAPO's penalty for long responses, if the flags ask for the penalty."""
    a, longest = cfg.algorithm, cfg.rollout.max_response_len
    if a.overlong_buffer_len is None:
        return list(values)
    return [
        value
        - overlong_penalty(s.response_length, longest, a.overlong_buffer_len, a.overlong_penalty)
        for value, s in zip(values, samples, strict=True)
    ]


def _check_finished(samples: Sequence[Sample]) -> None:
    for sample in samples:
        if sample.status in (Status.PENDING, Status.ABORTED):
            raise ValueError(
                f"sample {sample.index} is {sample.status.value}: it cannot be trained on"
            )


def _reward(sample: Sample, cfg: Config) -> float:
    try:
        value = sample.get_reward_value(cfg.reward)
    except (KeyError, TypeError, ValueError) as e:
        raise PluginError(
            f"sample {sample.index}: --reward-key {cfg.reward.reward_key} cannot be read as a "
            f"number from the reward {sample.reward!r}"
        ) from e
    if not math.isfinite(value):
        raise PluginError(
            f"sample {sample.index} has the reward {value}. Let the grader return a finite number, "
            "or None for an answer that it cannot judge: that sample is left out and counted."
        )
    return value


def _sequence(sample: Sample, group_id: int, score: float, raw_reward: float) -> TrainSequence:
    removed = np.zeros(sample.response_length, np.float32) if sample.remove_sample else None
    return train_sequence(
        f"sample {sample.index}",
        index=-1 if sample.index is None else sample.index,
        group=group_id,
        tokens=array_of(sample, "tokens"),
        response_length=sample.response_length,
        reward=score,
        raw_reward=raw_reward,
        loss_mask=sample.loss_mask if removed is None else removed,
        rollout_log_probs=array_of(sample, "rollout_log_probs"),
        teacher_log_probs=sample.teacher_log_probs,
        train_metadata=sample.train_metadata,
    )
