"""Gives tokens their weights and packs sequences into a `TrainBatch`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from vime.config import Config
from vime.data.packing import PackingRules, plan_step, repack
from vime.types import RankBatch, StepPlan, TrainBatch, TrainSequence

_LARGEST = float(np.finfo(np.float32).max)

# (the loss masks [R] of a step's sequences, per_token) -> the weights [R] of their tokens.
Weigh = Callable[[list[np.ndarray], bool], Sequence[np.ndarray]]


def steps_of(num_samples: int, kept: Sequence[int], num_steps: int) -> list[list[int]]:
    """The `kept` samples by step: sample i is in step i * num_steps // num_samples."""
    steps: list[list[int]] = [[] for _ in range(num_steps)]
    for i in kept:
        steps[i * num_steps // num_samples].append(i)
    return [s for s in steps if s]


def plan_batch(
    steps: Sequence[Sequence[TrainSequence]],
    cfg: Config,
    rollout_id: int,
    metrics: dict[str, float],
    *,
    weigh: Weigh | None = None,
) -> TrainBatch:
    """Gives tokens their weights and packs the sequences of each step.

    Raises ValueError if there are no sequences, or if `check_numbers` does.
    """
    sequences: list[TrainSequence] = []
    plans: list[StepPlan] = []
    rules = PackingRules.of(cfg)
    constant = cfg.rollout.max_response_len if cfg.algorithm.estimator.constant_weight else None
    check_numbers(list(chain.from_iterable(steps)), cfg)
    for members in steps:
        masks, per_token = [s.loss_mask for s in members], cfg.algorithm.per_token_loss
        if weigh is None:
            weights = token_weights(masks, per_token=per_token, constant=constant)
        else:
            weights = [  # a masked token stays without loss
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


def parts_of(batch: TrainBatch, num_ranks: int) -> list[RankBatch]:
    """The batch in parts, one for each data-parallel rank.

    Raises ValueError if the batch was planned for another number of ranks.
    """
    for plan in batch.steps:
        if len(plan.micro_batches) != num_ranks:
            raise ValueError(
                f"rollout {batch.rollout_id} was planned for {len(plan.micro_batches)} "
                f"data-parallel ranks; there are {num_ranks}"
            )
    lengths, indices = batch.lengths, batch.indices
    return [
        RankBatch(
            rollout_id=batch.rollout_id,
            sequences={
                p: batch.sequences[p]
                for plan in batch.steps
                for b in plan.micro_batches[rank]
                for p in b
            },
            steps=batch.steps,
            forward=batch.forward,
            weight_version=batch.weight_version,
            lengths=lengths,
            indices=indices,
        )
        for rank in range(num_ranks)
    ]


def token_weights(
    masks: Sequence[np.ndarray], *, per_token: bool, constant: float | None = None
) -> list[np.ndarray]:
    """Each token's share of its step's loss. Masks and weights are [R] for each sequence.

    Sequence mean: mask / (the sequence's mask sum x sequences in the step).
    Token mean (per_token): mask / the step's mask sum.
    A constant, for all lengths: mask / (constant x sequences in the step) (Dr. GRPO,
    arXiv:2503.20783).
    A sequence whose mask is all 0 weighs 0.
    """
    sums = [float(m.sum()) for m in masks]
    if constant is not None:
        return [(m / (constant * len(masks))).astype(np.float32, copy=False) for m in masks]
    if per_token:
        total = max(sum(sums), 1.0)
        return [(m / total).astype(np.float32, copy=False) for m in masks]
    return [
        (m / (max(s, 1.0) * len(masks))).astype(np.float32, copy=False)
        for m, s in zip(masks, sums, strict=True)
    ]


def check_numbers(sequences: Sequence[TrainSequence], cfg: Config) -> None:
    """Raises ValueError for a number that the trainer cannot use, and names its sample.

    Rewards and scores must be finite in float32 if the loss uses them. Loss masks must be finite
    and not negative. Tokens with loss must have the log-probabilities of engine and teacher that
    the flags need.
    """
    name = cfg.algorithm.needs_rollout_logp
    for s in sequences:
        if cfg.algorithm.needs_reward:
            for kind, value in (("score", s.reward), ("reward", s.raw_reward)):
                if not np.abs(value) <= _LARGEST:
                    raise ValueError(
                        f"sample {s.index} has the {kind} {value}, which is not a finite number in "
                        "float32. Correct the function that makes it."
                    )
        if not (s.loss_mask.min(initial=0) >= 0 and s.loss_mask.max(initial=0) <= _LARGEST):
            wrong = s.loss_mask[~((s.loss_mask >= 0) & np.isfinite(s.loss_mask))]
            raise ValueError(
                f"sample {s.index} has a loss_mask with {wrong[0]}. Give 0 or 1 for each response "
                "token."
            )
        if name and lacks_logp(s.rollout_logp, s):
            raise ValueError(
                f"sample {s.index} has no rollout_log_probs for some token of its loss, and {name} "
                "needs them. Let the rollout keep the engine's values, mask those tokens, or "
                f"drop {name}."
            )
        if cfg.algorithm.needs_teacher_logp and lacks_logp(s.teacher_logp, s):
            raise ValueError(
                f"sample {s.index} has no teacher_log_probs for some token of its loss, and "
                "--opd-type vllm needs them. Add --opd-teacher-url, let your function set them, or "
                "mask those tokens."
            )


def lacks_logp(logp: np.ndarray | None, sequence: TrainSequence) -> bool:
    """Whether a token with loss has no finite log-probability."""
    needed = sequence.loss_mask > 0
    return bool(needed.any()) and (logp is None or not np.isfinite(logp[needed]).all())


def _packing_metrics(
    sequences: Sequence[TrainSequence], plans: Sequence[StepPlan], rules: PackingRules
) -> dict[str, float]:
    """packing_efficiency is tokens / room. A micro-batch's room is the cap or the largest size."""
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
        # tokens of the busiest rank divided by the mean of the ranks, in the worst step
        "perf/dp_imbalance": max(max(r) * len(r) / sum(r) for r in ranks),
    }
