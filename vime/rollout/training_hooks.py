"""Users' functions in the trainer, named by path flags: loaded for it, checked at start."""

from __future__ import annotations

from typing import Any

from vime.algorithms.hooks import TrainingHooks
from vime.config import Config
from vime.config.view import ArgsView
from vime.rollout.plugins import Hook, check_named, load_function

LOSS = Hook(
    "f(args, logp_T, *, old_logp_T, adv_T, entropy_T, ref_logp_T, rollout_logp_T, sequence_sum) "
    "-> TokenLoss or (loss_T, dict of [T])",
    2,
    ("old_logp_T", "adv_T", "entropy_T", "ref_logp_T", "rollout_logp_T", "sequence_sum"),
)
ADVANTAGE = Hook("f(args, sequences, old_logp, ref_logp) -> list of tensors [R]", 4)
TIS = Hook(
    "f(args, *, pg_loss, train_log_probs, rollout_log_probs, sequence_sum) "
    "-> (pg_loss [T], dict of [T])",
    1,
    ("pg_loss", "train_log_probs", "rollout_log_probs", "sequence_sum"),
)
REDUCER = Hook("f(args, loss_masks, per_token) -> list of weights [R]", 3)

INIT = Hook("f(args)", 1)
MODEL = Hook("f(args, model) -> GPTModel", 2)
BEFORE_LOG_PROBS = Hook("f(args, model, store_prefix)", 3)
BEFORE_TRAIN_STEP = Hook("f(args, rollout_id, step_id, model, optimizer, opt_param_scheduler)", 6)


def check_training_hooks(cfg: Config) -> list[str]:
    """Every function loads and can be called as vime calls it."""
    return check_named(_named(cfg))


def training_hooks(cfg: Config) -> TrainingHooks:
    """The functions that the trainer calls."""
    a = cfg.algorithm

    def load(path: str | None, hook: Hook) -> Any:
        return load_function(path, hook) if path else None

    return TrainingHooks(
        args=ArgsView(cfg),
        init=load(a.megatron_init_path, INIT),
        model=load(a.model_provider_path, MODEL),
        before_log_probs=load(a.before_log_probs_path, BEFORE_LOG_PROBS),
        before_train_step=load(a.before_train_step_path, BEFORE_TRAIN_STEP),
        loss=load(a.custom_loss_path, LOSS),
        advantage=load(a.custom_advantage_path, ADVANTAGE),
        correct=load(a.custom_tis_path, TIS),
    )


def _named(cfg: Config) -> list[tuple[str, str, Hook]]:
    a = cfg.algorithm
    named = [
        ("--custom-loss-function-path", a.custom_loss_path, LOSS),
        ("--custom-advantage-function-path", a.custom_advantage_path, ADVANTAGE),
        ("--custom-tis-function-path", a.custom_tis_path, TIS),
        ("--custom-pg-loss-reducer-function-path", a.custom_reducer_path, REDUCER),
        ("--custom-megatron-init-path", a.megatron_init_path, INIT),
        ("--custom-model-provider-path", a.model_provider_path, MODEL),
        (
            "--custom-megatron-before-log-prob-hook-path",
            a.before_log_probs_path,
            BEFORE_LOG_PROBS,
        ),
        (
            "--custom-megatron-before-train-step-hook-path",
            a.before_train_step_path,
            BEFORE_TRAIN_STEP,
        ),
    ]
    return [(flag, path, hook) for flag, path, hook in named if path]
