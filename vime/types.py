"""The nouns of vime. Plugins write to a `Sample`; everything after batching is frozen."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

import numpy as np

from vime.number_lists import listed, number_lists, stored


class Status(StrEnum):
    """The state of a sample. An ABORTED one may continue; `Sample.failure` says why one FAILED."""

    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"


FINISHED = (Status.COMPLETED, Status.TRUNCATED)  # the response can be graded


@number_lists("tokens", "rollout_log_probs", "weight_versions")
@dataclass(slots=True, kw_only=True)
class Sample:
    """One prompt with one response. Lists marked [R] have one entry for each response token.

    The engine's numbers are arrays until somebody reads their lists (`vime/number_lists.py`).
    """

    group_index: int | None = None  # shared by the samples of one prompt, which have one baseline
    index: int | None = None  # unique in a run
    rollout_id: int | None = None  # the rollout that trains on it
    prompt: str | list[dict[str, Any]] = ""
    tokens: list[int] = field(default_factory=list)  # prompt ids, then response ids
    response: str = ""
    response_length: int = 0  # R
    label: str | None = None
    reward: float | dict[str, Any] | None = None
    loss_mask: list[int] | None = None  # [R], 1: train on the token, 0: do not; None: all 1
    rollout_log_probs: list[float] | None = None  # [R], natural logarithms, from the engine
    teacher_log_probs: list[float] | None = None  # [R], for --use-opd --opd-type vllm
    weight_versions: list[int] = field(default_factory=list)  # [R], of the weights that made it
    status: Status = Status.PENDING
    failure: str | None = None  # why the sample FAILED or has no reward
    metadata: dict[str, Any] = field(default_factory=dict)
    train_metadata: dict[str, Any] | None = None
    remove_sample: bool = False  # counts in the statistics of its group, but has no loss
    custom_rm_path: str | None = None
    generate_function_path: str | None = None
    session_id: str | None = None  # one session may stay on one engine; None: the sample's own
    non_generation_time: float = 0.0  # seconds outside generation, such as in tools; for metrics
    apply_chat_template_kwargs: dict[str, Any] | None = None  # replaces the flag of this name
    # For the user's functions. vime keeps these fields and never reads them.
    rollout_routed_experts: Any = None
    rollout_top_p_token_ids: list[int] | None = None
    rollout_top_p_token_offsets: list[int] | None = None
    multimodal_inputs: dict[str, Any] | None = None
    multimodal_train_inputs: dict[str, Any] | None = None
    spec_info: dict[str, Any] | None = None
    prefix_cache_info: dict[str, Any] | None = None

    @property
    def prompt_length(self) -> int:
        return len(stored(self, "tokens")) - self.response_length

    @property
    def effective_response_length(self) -> int:
        """The number of response tokens with loss."""
        return self.response_length if self.loss_mask is None else sum(self.loss_mask)

    def get_reward_value(self, args: Any) -> float:
        """The reward as a number. --reward-key picks it from a dict. KeyError if there is none."""
        if self.reward is None:
            raise KeyError(f"sample {self.index} has no reward: {self.failure or 'not graded yet'}")
        if isinstance(self.reward, dict):
            return float(self.reward[args.reward_key])
        return float(self.reward)

    def to_dict(self) -> dict[str, Any]:
        """A copy that shares nothing mutable with the sample."""
        values = {f.name: _copied(listed(self, f.name)) for f in fields(self)}
        return {**values, "status": self.status.value}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sample:
        """The inverse of `to_dict`. Raises KeyError for a field that `Sample` does not have."""
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            raise KeyError(f"unknown Sample fields: {sorted(unknown)}")
        return cls(**{**data, "status": Status(data.get("status", "pending"))})


def _copied(value: Any) -> Any:
    """A deep copy. Lists of numbers are long, so their copy does not look at each number."""
    if type(value) is list and (not value or isinstance(value[0], (int, float))):
        return value.copy()
    return value if isinstance(value, (str, int, float, type(None))) else copy.deepcopy(value)


Sample.Status = Status  # type: ignore[attr-defined]  # plugins often write it like this

Group = list[Sample]  # the samples of one prompt


@dataclass(slots=True)
class RolloutFnTrainOutput:
    """The return value of a rollout function: groups, in the order of training."""

    samples: list[Group]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class RolloutFnEvalOutput:
    """The return value of an evaluation function.

    data  {dataset: {"rewards": [..], "truncated": [..], "samples": [..]}}
    """

    data: dict[str, dict[str, list]]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class DynamicFilterOutput:
    """Whether a dynamic filter keeps a group, and a reason if not. A bool is allowed, too."""

    keep: bool
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSequence:
    """One sample for the trainer: N tokens, of which the last R are the response.

    Arrays may be shared with samples and with other sequences, so nobody may write to them.
    """

    index: int  # Sample.index
    group: int  # Sample.group_index
    tokens: np.ndarray  # [N] int32
    response_length: int  # R
    loss_mask: np.ndarray  # [R] float32, 0 or 1
    weight: np.ndarray  # [R] float32, each token's share of its step's loss
    reward: float  # the score, after group normalisation
    raw_reward: float
    rollout_logp: np.ndarray | None = None  # [R] float32
    teacher_logp: np.ndarray | None = None  # [R] float32
    train_metadata: dict[str, Any] | None = None

    @property
    def length(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One optimizer step: its sequences by data-parallel rank and micro-batch.

    micro_batches[dp_rank][i] is a tuple of positions in `TrainBatch.sequences`. Every rank has the
    same number of micro-batches. An empty micro-batch contributes nothing to the loss.
    """

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def num_micro_batches(self) -> int:
        return len(self.micro_batches[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """The training data of one rollout."""

    rollout_id: int
    sequences: tuple[TrainSequence, ...]
    steps: tuple[StepPlan, ...]
    forward: StepPlan | None = None  # packing of forward-only passes; None: as in `steps`
    weight_version: int | None = None  # newest version that made a token with loss; None: unknown
    metrics: dict[str, float] = field(default_factory=dict)  # about samples and packing

    @property
    def lengths(self) -> np.ndarray:
        """[S] int32, the number of tokens of each sequence."""
        return np.array([s.length for s in self.sequences], np.int32)

    @property
    def indices(self) -> np.ndarray:
        """[S] int64, `Sample.index` of each sequence."""
        return np.array([s.index for s in self.sequences], np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBatch:
    """The part of a `TrainBatch` that one data-parallel rank needs, in place of the whole."""

    rollout_id: int
    sequences: dict[int, TrainSequence]  # those of this rank, by their position in the batch
    steps: tuple[StepPlan, ...]  # of all ranks
    forward: StepPlan | None
    weight_version: int | None
    lengths: np.ndarray  # of all sequences
    indices: np.ndarray  # of all sequences
