"""This rank's columns over the token table of one rollout: one value for each token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from vime.backends.megatron.training.token_table import MicroBatch, lay_out, token_table
from vime.config import Config
from vime.data.train_batch import lacks_logp
from vime.types import RankBatch, StepPlan


class RolloutColumns:
    """The table of this data-parallel rank's sequences, and the columns that passes fill.

    steps           positions in the batch of this rank's sequences, step by step
    owned_N         1 at the tokens that this rank holds; context parallelism spreads them
    old_logp_N      log-probabilities under the old policy
    own_logp_N      under the trainer's weights, if the engine is the old policy
    ref_logp_N      under the reference
    teacher_logp_N  under the teacher
    value_N         a critic's values before the rollout's first step
    return_N        the targets of the critic
    adv_N           advantages

    A column of log-probabilities or values is filled on the last pipeline stage, at the tokens that
    this rank holds. It is 0 elsewhere. `whole` adds the columns of all ranks.
    """

    def __init__(self, batch: RankBatch, cfg: Config, device: torch.device) -> None:
        self.batch = batch
        self.dp_rank = mpu.get_data_parallel_rank()
        self.tp_shards = cfg.parallel.tp if cfg.parallel.sequence_parallel else 1
        self.steps = [
            [p for b in plan.micro_batches[self.dp_rank] for p in b] for plan in batch.steps
        ]
        mine = [p for positions in self.steps for p in positions]
        self.table = token_table(batch.sequences, mine, device)
        self.laid_out: dict[int, list[MicroBatch]] = {}
        self.owned_N = self.table.column()
        for plan in batch.steps:
            for b in self.micro_batches(plan):
                self.owned_N[b.rows_T] = 1.0
        self.old_logp_N = self.table.column()
        self.own_logp_N: Tensor | None = None
        if cfg.algorithm.use_rollout_logprobs:
            self.old_logp_from_engine()
        self.ref_logp_N: Tensor | None = None
        self.teacher_logp_N: Tensor | None = None
        if cfg.algorithm.needs_teacher_logp:
            self.teacher_logp_N = self.table.teacher_logp_N.nan_to_num()
        self.value_N: Tensor | None = None
        self.return_N: Tensor | None = None
        self.adv_N = self.table.column()

    def micro_batches(self, plan: StepPlan) -> list[MicroBatch]:
        """This rank's micro-batches of a plan; each plan is laid out once."""
        if id(plan) not in self.laid_out:
            sequences = self.batch.sequences
            self.laid_out[id(plan)] = [
                lay_out(
                    self.table,
                    positions,
                    [sequences[p].length for p in positions],
                    cp=mpu.get_context_parallel_world_size(),
                    cp_rank=mpu.get_context_parallel_rank(),
                    tp_shards=self.tp_shards,
                )
                for positions in plan.micro_batches[self.dp_rank]
            ]
        return self.laid_out[id(plan)]

    def old_logp_from_engine(self) -> None:
        """Makes the engine the old policy. Later passes fill `own_logp_N`."""
        self.old_logp_N = self.table.rollout_logp_N.nan_to_num()
        self.own_logp_N = self.table.column()

    @property
    def trainer_logp_N(self) -> Tensor:
        """The trainer's log-probabilities before the rollout's first step."""
        return self.old_logp_N if self.own_logp_N is None else self.own_logp_N

    def lacking_logp(self) -> list[int]:
        """Indices of all ranks' samples that lack the engine's figure at a token with loss.

        A collective, because other ranks would wait if only some ranks raised an error.
        """
        sequences = self.batch.sequences
        mine = (p for positions in self.steps for p in positions)
        lacking = (p for p in mine if lacks_logp(sequences[p].rollout_logp, sequences[p]))
        return self.batch.indices[self._of_all_ranks(lacking)].tolist()

    def whole(self, column_N: Tensor) -> Tensor:
        """The column at all tokens of this rank's sequences, on the last pipeline stage."""
        column_N = column_N * self.owned_N
        if mpu.get_context_parallel_world_size() > 1:
            dist.all_reduce(column_N, group=mpu.get_context_parallel_group())
        return column_N

    def loss_mask_of(self, positions: Sequence[int]) -> Tensor:
        """1 at the loss tokens of these sequences that this rank holds."""
        mask_N = self.table.column()
        for p in positions:
            mask_N[self.table.responses[p]] = 1.0
        return mask_N * self.table.mask_N * self.owned_N

    def not_finite(self, plan: StepPlan, column_N: Tensor) -> list[int]:
        """Positions of the step's sequences where the column is not finite. A collective."""
        mine = (p for b in plan.micro_batches[self.dp_rank] for p in b)
        rows = self.table.responses
        return self._of_all_ranks(p for p in mine if not column_N[rows[p]].isfinite().all())

    def _of_all_ranks(self, positions: Iterable[int]) -> list[int]:
        """The positions that at least one rank gives, in order. A collective."""
        found_S = self.owned_N.new_zeros(len(self.batch.lengths))
        for p in positions:
            found_S[p] = 1
        dist.all_reduce(found_S, dist.ReduceOp.MAX)
        return found_S.nonzero()[:, 0].tolist()
