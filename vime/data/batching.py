"""Makes a frozen `TrainBatch` of groups of samples. Every token gets its final weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from vime.config import Config
from vime.data.packing import PackingRules, plan_step, repack
from vime.data.rewards import overlong_penalty, score_samples
from vime.data.sample_metrics import is_usable, of_groups, of_rewards, of_samples
from vime.data.sequences import train_sequence
from vime.errors import PluginError
from vime.types import Group, Sample, Status, StepPlan, TrainBatch, TrainSequence

# The usable samples of all groups -> (raw rewards, scores), one of each per sample.
PostProcess = Callable[[list[Sample]], tuple[Sequence[float], Sequence[float]]]

# (the loss masks [R] of a step's sequences, per_token) -> the weights [R] of their tokens.
Weigh = Callable[[list[np.ndarray], bool], Sequence[np.ndarray]]


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
    - A failed sample (`Status.FAILED`, or without a reward that the loss needs) has no loss and no
      part in its group's statistics. `rollout/failed_samples` counts it.
    - A removed sample (`remove_sample`) counts in its group's statistics and in its step's number
      of samples. Its tokens weigh 0.
    - A sample without a response token counts in its group's statistics and has no sequence.
      `rollout/empty_samples` counts it.
    A step is a run of consecutive samples. A step that lost all its samples is left out.
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
    wants_reward = cfg.algorithm.wants_reward
    _check_finished(samples)
    usable = [i for i, s in enumerate(samples) if is_usable(s, wants_reward)]
    if not usable:
        reasons = sorted({s.failure or "no reward" for s in samples})[:3]
        raise ValueError(
            f"rollout {rollout_id}: none of its {len(samples)} samples can be trained on: "
            + ("; ".join(reasons) or "it is empty")
        )
    raw, scores = [math.nan] * len(samples), [math.nan] * len(samples)
    metrics = of_samples(samples, wants_reward)
    if wants_reward:
        if post_process is None:
            values = [_reward(samples[i], cfg) for i in usable]
            shaped = _less_overlong(values, [samples[i] for i in usable], cfg)
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
        for members in _steps(len(samples), kept, cfg.batch.steps_per_rollout)
    ]
    batch = plan_batch(steps, cfg, rollout_id, metrics, weigh=weigh)
    newest = _newest_version([samples[i] for i in kept], batch.sequences)
    return replace(batch, weight_version=newest)


def plan_batch(
    steps: Sequence[Sequence[TrainSequence]],
    cfg: Config,
    rollout_id: int,
    metrics: dict[str, float],
    *,
    weigh: Weigh | None = None,
) -> TrainBatch:
    """Weighs and packs the sequences of each step. Raises ValueError if there is none."""
    sequences: list[TrainSequence] = []
    plans: list[StepPlan] = []
    rules = PackingRules.of(cfg)
    constant = cfg.rollout.max_response_len if cfg.algorithm.estimator.constant_weight else None
    _check_logps(steps, cfg)
    for members in steps:
        masks, per_token = [s.loss_mask for s in members], cfg.algorithm.per_token_loss
        if weigh is None:
            weights = token_weights(masks, per_token=per_token, constant=constant)
        else:
            weights = [  # what the mask leaves out stays out
                np.asarray(w, dtype=np.float32) * (m > 0)
                for w, m in zip(weigh(masks, per_token), masks, strict=True)
            ]
        first = len(sequences)
        sequences += [replace(s, weight=w) for s, w in zip(members, weights, strict=True)]
        positions = range(first, len(sequences))
        plans.append(plan_step(positions, [sequences[p].length for p in positions], rules))
    if not plans:
        raise ValueError(f"rollout {rollout_id}: no sample has a response to train on")

    forward = None
    forward_rules = PackingRules.of(cfg, forward_only=True)
    if forward_rules != rules:
        forward = repack(plans, [s.length for s in sequences], forward_rules)
    return TrainBatch(
        rollout_id=rollout_id,
        sequences=tuple(sequences),
        steps=tuple(plans),
        forward=forward,
        metrics={**metrics, **_packing_metrics(sequences, plans, rules)},
    )


def token_weights(
    masks: Sequence[np.ndarray], *, per_token: bool, constant: float | None = None
) -> list[np.ndarray]:
    """Each token's share of its step's loss. Masks and weights are [R] for each sequence.

    Sequence mean: mask / (the sequence's mask sum x sequences in the step).
    Token mean (per_token): mask / the step's mask sum.
    With a constant: mask / (constant x sequences in the step) for all lengths (Dr. GRPO,
    arXiv:2503.20783).
    A sequence whose mask is all 0 weighs 0.
    """
    sums = [float(m.sum()) for m in masks]
    if constant is not None:
        return [(m / (constant * len(masks))).astype(np.float32) for m in masks]
    if per_token:
        total = max(sum(sums), 1.0)
        return [(m / total).astype(np.float32) for m in masks]
    return [
        (m / (max(s, 1.0) * len(masks))).astype(np.float32)
        for m, s in zip(masks, sums, strict=True)
    ]


def _newest_version(samples: Sequence[Sample], sequences: Sequence[TrainSequence]) -> int | None:
    """The newest weight version of a token with loss. Versions below 0 are unknown."""
    known = [
        version
        for sample, sequence in zip(samples, sequences, strict=True)
        for version, m in zip(sample.weight_versions, sequence.loss_mask, strict=False)
        if m and version >= 0
    ]
    return max(known, default=None)


def _check_logps(steps: Sequence[Sequence[TrainSequence]], cfg: Config) -> None:
    """Checks that tokens with loss have the log-probabilities of engine and teacher it needs."""
    name = cfg.algorithm.needs_rollout_logp
    for s in chain.from_iterable(steps):
        if name and _lacks(s.rollout_logp, s):
            raise ValueError(
                f"sample {s.index} has no rollout_log_probs for some token of its loss, and {name} "
                "needs them. Let the rollout keep what the engine returned, mask those tokens, or "
                f"drop {name}."
            )
        if cfg.algorithm.needs_teacher_logp and _lacks(s.teacher_logp, s):
            raise ValueError(
                f"sample {s.index} has no teacher_log_probs for some token of its loss, and "
                "--opd-type vllm needs them. Add --opd-teacher-url, let your function set them, or "
                "mask those tokens."
            )


def _lacks(logp: np.ndarray | None, sequence: TrainSequence) -> bool:
    needed = sequence.loss_mask > 0
    return bool(needed.any()) and (logp is None or not np.isfinite(logp[needed]).all())


def _less_overlong(values: Sequence[float], samples: Sequence[Sample], cfg: Config) -> list[float]:
    """The rewards less DAPO's penalty for long responses, if the flags ask for it."""
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
            "or None for an answer that it cannot judge: such a sample is left out and counted."
        )
    return value


def _steps(num_samples: int, kept: Sequence[int], num_steps: int) -> list[list[int]]:
    """The `kept` samples by step: sample i is in step i * num_steps // num_samples."""
    steps: list[list[int]] = [[] for _ in range(num_steps)]
    for i in kept:
        steps[i * num_steps // num_samples].append(i)
    return [s for s in steps if s]


def _sequence(sample: Sample, group_id: int, score: float, raw_reward: float) -> TrainSequence:
    removed = [0.0] * sample.response_length if sample.remove_sample else None
    return train_sequence(
        f"sample {sample.index}",
        index=-1 if sample.index is None else sample.index,
        group=group_id,
        tokens=sample.tokens,
        response_length=sample.response_length,
        reward=score,
        raw_reward=raw_reward,
        loss_mask=removed or sample.loss_mask,
        rollout_log_probs=sample.rollout_log_probs,
        teacher_log_probs=sample.teacher_log_probs,
        train_metadata=sample.train_metadata,
    )


def _packing_metrics(
    sequences: Sequence[TrainSequence], plans: Sequence[StepPlan], rules: PackingRules
) -> dict[str, float]:
    """packing_efficiency is tokens / room; the room of a micro-batch is the cap or the largest."""
    sizes = [
        sum(sequences[p].length for p in b)
        for plan in plans
        for owned in plan.micro_batches
        for b in owned
    ]
    ranks = [
        [sum(sequences[p].length for b in owned for p in b) for owned in plan.micro_batches]
        for plan in plans
    ]
    room = sum(max(n, rules.max_tokens or max(sizes)) for n in sizes)
    return {
        "rollout/total_tokens": float(sum(sizes)),
        "perf/num_micro_batches": float(sum(p.num_micro_batches for p in plans)),
        "perf/packing_efficiency": sum(sizes) / room,
        # tokens of the busiest rank over the mean of the ranks, in the worst step
        "perf/dp_imbalance": max(max(r) * len(r) / sum(r) for r in ranks),
    }
