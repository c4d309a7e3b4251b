"""The nouns of vime. Plugins write to a `Sample`; what follows batching is frozen."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

import numpy as np


class Status(StrEnum):
    """Where a sample stands. ABORTED may continue; FAILED has its reason in `Sample.failure`."""

    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"


FINISHED = (Status.COMPLETED, Status.TRUNCATED)  # a response that can be judged


@dataclass(slots=True, kw_only=True)
class Sample:
    """One prompt with one response. Lists marked [R] have one entry per response token."""

    group_index: int | None = None  # samples of one prompt share it; advantages are relative to it
    index: int | None = None  # unique over a whole run
    rollout_id: int | None = None  # the rollout that trains on it
    prompt: str | list[dict[str, Any]] = ""
    tokens: list[int] = field(default_factory=list)  # prompt ids, then response ids
    response: str = ""
    response_length: int = 0  # R
    label: str | None = None
    reward: float | dict[str, Any] | None = None
    loss_mask: list[int] | None = None  # [R], 1 = train on it; None = all ones
    rollout_log_probs: list[float] | None = None  # [R], natural log, as the engine sampled
    teacher_log_probs: list[float] | None = None  # [R], for --use-opd --opd-type vllm
    weight_versions: list[int] = field(
        default_factory=list
    )  # [R], the weights that made each token
    status: Status = Status.PENDING
    failure: str | None = None  # why it is FAILED, or why it has no reward
    metadata: dict[str, Any] = field(default_factory=dict)
    train_metadata: dict[str, Any] | None = None
    remove_sample: bool = False  # stays in its group's statistics, gets no loss
    custom_rm_path: str | None = None
    generate_function_path: str | None = None
    session_id: str | None = None  # requests that share it may go to one engine; None: its own
    non_generation_time: float = 0.0  # seconds spent on tools and the like; for the metrics
    apply_chat_template_kwargs: dict[str, Any] | None = None  # in place of the flag's, for messages
    # What functions of the user's own may carry along. vime keeps these and reads none of them.
    rollout_routed_experts: Any = None
    rollout_top_p_token_ids: list[int] | None = None
    rollout_top_p_token_offsets: list[int] | None = None
    multimodal_inputs: dict[str, Any] | None = None
    multimodal_train_inputs: dict[str, Any] | None = None
    spec_info: dict[str, Any] | None = None
    prefix_cache_info: dict[str, Any] | None = None

    @property
    def prompt_length(self) -> int:
        return len(self.tokens) - self.response_length

    @property
    def effective_response_length(self) -> int:
        """Response tokens that carry loss."""
        return self.response_length if self.loss_mask is None else sum(self.loss_mask)

    def get_reward_value(self, args: Any) -> float:
        """The scalar reward; `--reward-key` picks it from a dict. KeyError if there is none."""
        if self.reward is None:
            raise KeyError(f"sample {self.index} has no reward: {self.failure or 'not graded yet'}")
        if isinstance(self.reward, dict):
            return float(self.reward[args.reward_key])
        return float(self.reward)

    def to_dict(self) -> dict[str, Any]:
        """A copy that shares nothing mutable with the sample."""
        values = {f.name: _copied(getattr(self, f.name)) for f in fields(self)}
        return {**values, "status": self.status.value}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sample:
        """The inverse of `to_dict`. Raises KeyError on a field that `Sample` lacks."""
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            raise KeyError(f"unknown Sample fields: {sorted(unknown)}")
        return cls(**{**data, "status": Status(data.get("status", "pending"))})


def _copied(value: Any) -> Any:
    """A deep copy. A list of numbers, as long as a response, is copied without a look at each."""
    if type(value) is list and (not value or isinstance(value[0], (int, float))):
        return value.copy()
    return value if isinstance(value, (str, int, float, type(None))) else copy.deepcopy(value)


Sample.Status = Status  # type: ignore[attr-defined]  # the spelling that plugins of this field use

Group = list[Sample]  # the samples of one prompt


@dataclass(slots=True)
class RolloutFnTrainOutput:
    """What a rollout function returns: groups, in the order to train on them."""

    samples: list[Group]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class RolloutFnEvalOutput:
    """What an evaluation function returns.

    data  {dataset: {"rewards": [..], "truncated": [..], "samples": [..]}}
    """

    data: dict[str, dict[str, list]]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class DynamicFilterOutput:
    """A dynamic filter's verdict with its reason. A plain or tensor bool may stand in for it."""

    keep: bool
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSequence:
    """One sample as the trainer sees it. N tokens of which the last R are the response."""

    index: int  # Sample.index
    group: int  # Sample.group_index
    tokens: np.ndarray  # [N] int64
    response_length: int  # R
    loss_mask: np.ndarray  # [R] float32, 0 or 1
    weight: np.ndarray  # [R] float32, this token's share of its step's loss
    reward: float  # after group normalisation
    raw_reward: float
    rollout_logp: np.ndarray | None = None  # [R] float32
    teacher_logp: np.ndarray | None = None  # [R] float32
    train_metadata: dict[str, Any] | None = None

    @property
    def length(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One optimizer step: which sequences, on which data-parallel rank, in which micro-batch.

    micro_batches[dp_rank][i] is a tuple of positions in `TrainBatch.sequences`. Every rank has the
    same number of micro-batches; one may be empty and then contributes nothing.
    """

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def num_micro_batches(self) -> int:
        return len(self.micro_batches[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """All that one rollout gives to training."""

    rollout_id: int
    sequences: tuple[TrainSequence, ...]
    steps: tuple[StepPlan, ...]
    forward: StepPlan | None = None  # packing of forward-only passes; None = the steps' own
    weight_version: int | None = None  # the newest that made a token with loss; None = not known
    metrics: dict[str, float] = field(default_factory=dict)  # of the rollout and of the packing
