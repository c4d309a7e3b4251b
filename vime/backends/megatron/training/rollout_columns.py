"""What is known of each token of one rollout, on this rank: columns over one token table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from vime.algorithms.advantages import same_for_every_token, whiten
from vime.algorithms.critic import generalized_advantages
from vime.algorithms.kl import kl_estimate
from vime.backends.megatron.training.step import on_last_stage
from vime.backends.megatron.training.token_table import MicroBatch, lay_out, token_table
from vime.config import AlgorithmConfig, Config
from vime.plugins.hook import Plugin
from vime.types import StepPlan, TrainBatch

_OF_THE_ENGINE = (
    "rollout/rollout_log_probs",
    "train/train_rollout_logprob_abs_diff",
    "train/mismatch_kl",
    "train/mismatch_k3_kl",
    "train/mismatch_chi2",
)


class RolloutColumns:
    """The table of this data-parallel rank's sequences, with what passes and advantages add to it.

    Columns of log-probabilities hold what this rank computed: on the last pipeline stage, and under
    context parallelism only at the tokens it holds (`owned_N`); elsewhere 0.
    """

    def __init__(self, batch: TrainBatch, cfg: Config, device: torch.device) -> None:
        dp = mpu.get_data_parallel_world_size()
        for plan in batch.steps:
            if len(plan.micro_batches) != dp:
                raise ValueError(
                    f"rollout {batch.rollout_id} was planned for {len(plan.micro_batches)} "
                    f"data-parallel ranks; there are {dp}"
                )
        self.batch = batch
        self.dp_rank = mpu.get_data_parallel_rank()
        self.tp_shards = cfg.parallel.tp if cfg.parallel.sequence_parallel else 1
        self.steps = [
            [p for b in plan.micro_batches[self.dp_rank] for p in b] for plan in batch.steps
        ]
        mine = [p for positions in self.steps for p in positions]
        self.table = token_table(batch.sequences, mine, device)
        self.old_logp_N = self.table.column()
        # the trainer's own, where the old policy is the engine's
        self.own_logp_N: Tensor | None = None
        if cfg.algorithm.use_rollout_logprobs:
            self.old_logp_from_engine()
        self.mismatch_metrics = cfg.algorithm.mismatch_metrics
        self.ref_logp_N: Tensor | None = None
        self.teacher_logp_N: Tensor | None = None
        if cfg.algorithm.needs_teacher_logp:
            self.teacher_logp_N = self.table.teacher_logp_N.nan_to_num()
        self.value_N: Tensor | None = None  # of a critic, before the rollout's first step
        self.return_N: Tensor | None = None  # what the critic learns
        self.adv_N = self.table.column()
        self.laid_out: dict[int, list[MicroBatch]] = {}
        self.owned_N = self.table.column()
        for plan in batch.steps:
            for b in self.micro_batches(plan):
                self.owned_N[b.rows_T] = 1.0

    def lacking_logp(self) -> list[int]:
        """This rank's samples, by index, with a loss token that the engine gave no figure for."""
        lacking_N = self.table.rollout_logp_N.isnan() & (self.table.mask_N > 0)
        rows = self.table.responses.items()
        return [self.batch.sequences[p].index for p, r in rows if bool(lacking_N[r].any())]

    def old_logp_from_engine(self) -> None:
        """The old policy is the engine's; the trainer's own figures come with the passes."""
        self.old_logp_N = self.table.rollout_logp_N.nan_to_num()
        self.own_logp_N = self.table.column()

    def micro_batches(self, plan: StepPlan) -> list[MicroBatch]:
        """This rank's micro-batches of a plan; laid out once."""
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

    def set_advantages(self, cfg: AlgorithmConfig, args: Any = None) -> None:
        """From the scores, less --kl-coef times each token's KL; spread over tokens; whitened.

        What --use-opd takes from a token's advantage is that token's alone, whatever the estimator.
        """
        table, estimator = self.table, cfg.estimator
        penalty_N = table.column()
        if cfg.kl_coef and self.ref_logp_N is not None:
            kl_N = self._whole(kl_estimate(self.old_logp_N, self.ref_logp_N, "k1"))
            penalty_N = cfg.kl_coef * kl_N * table.mask_N
        if own := cfg.plugin("custom_advantage_path"):
            adv_N = self._users_advantages(own, args)
        elif estimator.critic:
            adv_N = self._generalized(penalty_N, cfg)
        elif estimator.spread is same_for_every_token:
            adv_N = estimator.spread(table.score_N, penalty_N, cfg.gamma)
        else:
            adv_N = table.column()
            for position, rows in table.responses.items():
                score = self.batch.sequences[position].reward
                adv_N[rows] = estimator.spread(score, penalty_N[rows], cfg.gamma)
        if self.teacher_logp_N is not None:
            apart_N = self._whole(kl_estimate(self.old_logp_N, self.teacher_logp_N, "k1"))
            adv_N = adv_N - cfg.opd_kl_coef * apart_N * table.mask_N
        if cfg.normalize_advantages or (estimator.whiten and own is None):
            whole_N = adv_N
            adv_N = table.column()
            for positions in self.steps:
                mask_N = self._mask_of(positions)
                adv_N += whiten(whole_N, mask_N, _sum_over_tokens)
        self.adv_N = adv_N

    def _generalized(self, penalty_N: Tensor, cfg: AlgorithmConfig) -> Tensor:
        """GAE over each sequence's loss tokens; also sets the returns.

        A token that the policy did not choose is no step: it belongs to the way from the token
        before it to the next state. The score comes with the last loss token.
        """
        assert self.value_N is not None
        self.value_N = self._whole(self.value_N)
        value_N, mask_N = self.value_N.cpu(), self.table.mask_N.cpu() > 0
        reward_N, adv_N = -penalty_N.double().cpu(), torch.zeros_like(value_N)
        return_N = torch.zeros_like(value_N)
        for position, response in self.table.responses.items():
            rows = torch.arange(response.start, response.stop)[mask_N[response]]
            if len(rows):
                reward_N[rows[-1]] += self.batch.sequences[position].reward
                adv_T, return_T = generalized_advantages(
                    reward_N[rows], value_N[rows], gamma=cfg.gamma, lambd=cfg.lambd
                )
                adv_N[rows], return_N[rows] = adv_T.float(), return_T.float()
        self.return_N = return_N.to(self.value_N.device)
        return adv_N.to(self.value_N.device)

    def _whole(self, column_N: Tensor) -> Tensor:
        """The column at every token of this rank's sequences, on the last pipeline stage."""
        column_N = column_N * self.owned_N
        if mpu.get_context_parallel_world_size() > 1:
            dist.all_reduce(column_N, group=mpu.get_context_parallel_group())
        return column_N

    def _users_advantages(self, own: Plugin, args: Any) -> Tensor:
        """Made where they are used, on the last pipeline stage; 0 elsewhere."""
        rows, adv_N = self.table.responses, self.table.column()
        old_N = self._whole(self.old_logp_N)
        ref_N = None if self.ref_logp_N is None else self._whole(self.ref_logp_N)
        if on_last_stage() and rows:
            made = own(
                args,
                [self.batch.sequences[p] for p in rows],
                [old_N[r] for r in rows.values()],
                None if ref_N is None else [ref_N[r] for r in rows.values()],
            )
            for r, adv_R in zip(rows.values(), made, strict=True):
                adv_N[r] = torch.as_tensor(adv_R).to(adv_N)
        return adv_N

    def _mask_of(self, positions: Sequence[int]) -> Tensor:
        mask_N = self.table.column()
        for p in positions:
            mask_N[self.table.responses[p]] = 1.0
        return mask_N * self.table.mask_N * self.owned_N

    def reduce(self, sums: dict[str, Tensor], names: Sequence[str]) -> dict[str, float]:
        """Sums over all ranks that hold tokens, the same on every rank; unknown names left out."""
        counts = mpu.get_tensor_model_parallel_rank() == 0 and on_last_stage()
        zero = self.table.weight_N.new_zeros(())
        values = [sums.get(name, zero) if counts else zero for name in names]
        known = [zero + float(counts and name in sums) for name in names]
        vector = torch.stack([*values, *known]).double()
        dist.all_reduce(vector)
        totals, num_ranks = vector.view(2, -1).tolist()
        return {n: t for n, t, r in zip(names, totals, num_ranks, strict=True) if r}

    def spoilt(self, plan: StepPlan, spoilt_N: Tensor) -> list[int]:
        """Positions of the step's sequences where the column is not finite. A collective."""
        found_S = spoilt_N.new_zeros(len(self.batch.sequences))
        for p in (p for b in plan.micro_batches[self.dp_rank] for p in b):
            found_S[p] = (~spoilt_N[self.table.responses[p]].isfinite()).any()
        dist.all_reduce(found_S, dist.ReduceOp.MAX)
        return found_S.nonzero()[:, 0].tolist()

    def metrics(self) -> dict[str, float]:
        """Means over the rollout's loss tokens, and how far trainer and engine are apart."""
        table = self.table
        mask_N = table.mask_N * self.owned_N
        sampled_N = mask_N * table.rollout_logp_N.isfinite()
        sampled_logp_N = table.rollout_logp_N.nan_to_num()
        own_logp_N = self.old_logp_N if self.own_logp_N is None else self.own_logp_N
        log_ratio_N = (own_logp_N - sampled_logp_N) * sampled_N
        apart_N = log_ratio_N.abs()
        columns = {
            "tokens": mask_N,
            "rollout/log_probs": own_logp_N * mask_N,
            "rollout/advantages": self.adv_N * mask_N,
            "sampled": sampled_N,
            "rollout/rollout_log_probs": sampled_logp_N * sampled_N,
            "train/train_rollout_logprob_abs_diff": apart_N,
        }
        if self.mismatch_metrics:
            columns |= _mismatch(log_ratio_N, sampled_N)
        if self.ref_logp_N is not None:
            columns["rollout/ref_log_probs"] = self.ref_logp_N * mask_N
            columns["rollout/kl"] = (own_logp_N - self.ref_logp_N) * mask_N  # as k1 has it
        if self.teacher_logp_N is not None:
            columns["rollout/teacher_log_probs"] = self.teacher_logp_N * mask_N
            columns["rollout/opd_kl"] = (own_logp_N - self.teacher_logp_N) * mask_N
        if self.value_N is not None and self.return_N is not None:
            columns |= _of_values(self.value_N, self.return_N, mask_N)
        sums = self.reduce({name: c.sum() for name, c in columns.items()}, list(columns))
        tokens, sampled = sums.pop("tokens"), sums.pop("sampled")
        engine = {name: sums.pop(name) for name in _OF_THE_ENGINE if name in sums}
        metrics = {name: total / max(tokens, 1.0) for name, total in sums.items()}
        if self.value_N is not None:
            error = metrics.pop("squared_error") - metrics.pop("error") ** 2
            spread = metrics.pop("squared_return") - metrics["rollout/returns"] ** 2
            if spread > 1e-6:  # else there is nothing to explain
                metrics["rollout/value_explained_variance"] = 1 - error / spread
        if sampled:
            metrics |= {name: total / sampled for name, total in engine.items()}
            worst = apart_N.max() if on_last_stage() else apart_N.new_zeros(())
            dist.all_reduce(worst, dist.ReduceOp.MAX)
            metrics["train/train_rollout_logprob_abs_diff_max"] = float(worst)
        return metrics


def _of_values(value_N: Tensor, return_N: Tensor, mask_N: Tensor) -> dict[str, Tensor]:
    """Values and returns, and what the variance that values explain is made of."""
    value_N, return_N, mask_N = value_N.double(), return_N.double(), mask_N.double()
    error_N = return_N - value_N
    return {
        "rollout/values": value_N * mask_N,
        "rollout/returns": return_N * mask_N,
        "error": error_N * mask_N,
        "squared_error": error_N.square() * mask_N,
        "squared_return": return_N.square() * mask_N,
    }


def _mismatch(log_ratio_N: Tensor, sampled_N: Tensor) -> dict[str, Tensor]:
    """Estimates from the engine's samples, per token; log_ratio = log(trainer / engine).

    KL(engine || trainer) as k1 and k3, and the chi-squared divergence E[ratio**2] - 1.
    """
    ratio_N = log_ratio_N.clamp(max=20.0).exp()
    return {
        "train/mismatch_kl": -log_ratio_N * sampled_N,
        "train/mismatch_k3_kl": (ratio_N - 1 - log_ratio_N) * sampled_N,
        "train/mismatch_chi2": (ratio_N.square() - 1) * sampled_N,
    }


def _sum_over_tokens(total: Tensor) -> Tensor:
    """Adds up over the ranks that share a step's tokens."""
    dist.all_reduce(total, group=mpu.get_data_parallel_group(with_context_parallel=True))
    return total
