"""Means over a rollout's tokens, and the difference between trainer and engine."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from vime.algorithms.off_policy import divergences
from vime.backends.megatron.training.rollout_columns import RolloutColumns
from vime.backends.megatron.training.totals import on_last_stage, totals
from vime.config.sections.algorithm import AlgorithmConfig


def rollout_metrics(columns: RolloutColumns, cfg: AlgorithmConfig) -> dict[str, float]:
    """The metrics by name, equal on every rank. A collective."""
    mask_N = columns.table.mask_N * columns.owned_N
    own_N = columns.trainer_logp_N
    figures = {"rollout/log_probs": own_N, "rollout/advantages": columns.adv_N}
    if columns.ref_logp_N is not None:
        figures["rollout/ref_log_probs"] = columns.ref_logp_N
        figures["rollout/kl"] = own_N - columns.ref_logp_N  # the k1 estimate
    if columns.teacher_logp_N is not None:
        figures["rollout/teacher_log_probs"] = columns.teacher_logp_N
        figures["rollout/opd_kl"] = own_N - columns.teacher_logp_N
    metrics, _ = _means(figures, mask_N)
    if columns.value_N is not None and columns.return_N is not None:
        metrics |= _value_metrics(columns.value_N, columns.return_N, mask_N)
    return metrics | _engine_metrics(columns, mask_N, cfg)


def _engine_metrics(
    columns: RolloutColumns, mask_N: Tensor, cfg: AlgorithmConfig
) -> dict[str, float]:
    """Means over the loss tokens with a finite log-probability from the engine; {} without any."""
    engine_N = columns.table.rollout_logp_N
    mask_N = mask_N * engine_N.isfinite()
    engine_N = engine_N.nan_to_num()
    log_ratio_N = (columns.trainer_logp_N - engine_N) * mask_N
    apart_N = log_ratio_N.abs()
    figures = {
        "rollout/rollout_log_probs": engine_N,
        "train/train_rollout_logprob_abs_diff": apart_N,
    }
    if cfg.mismatch_metrics:
        for name, value_N in divergences(log_ratio_N).items():
            figures[f"train/mismatch_{name}"] = value_N
    metrics, count = _means(figures, mask_N)
    if not count:
        return {}
    worst = apart_N.max() if on_last_stage() else apart_N.new_zeros(())
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    metrics["train/train_rollout_logprob_abs_diff_max"] = float(worst)
    return metrics


def _value_metrics(value_N: Tensor, return_N: Tensor, mask_N: Tensor) -> dict[str, float]:
    """Mean value, mean return, and the share of the returns' variance that the values explain."""
    value_N, return_N = value_N.double(), return_N.double()
    error_N = return_N - value_N
    figures = {
        "value": value_N,
        "return": return_N,
        "squared_return": return_N.square(),
        "error": error_N,
        "squared_error": error_N.square(),
    }
    mean, _ = _means(figures, mask_N.double())
    metrics = {"rollout/values": mean["value"], "rollout/returns": mean["return"]}
    variance = mean["squared_return"] - mean["return"] ** 2
    if variance > 1e-6:  # below this the returns do not differ
        left = mean["squared_error"] - mean["error"] ** 2
        metrics["rollout/value_explained_variance"] = 1 - left / variance
    return metrics


def _means(figures: dict[str, Tensor], mask_N: Tensor) -> tuple[dict[str, float], float]:
    """({name: mean where the mask is 1}, number of tokens there), over all ranks; 0 without any."""
    sums = {name: (value_N * mask_N).sum() for name, value_N in figures.items()}
    found = totals({**sums, "count": mask_N.sum()}, mask_N.device)
    count = found.pop("count")
    return {name: total / max(count, 1.0) for name, total in found.items()}, count
