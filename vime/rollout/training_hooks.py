"""Users' functions in the loss, named by path flags: loaded for the trainer, checked at start."""

from __future__ import annotations

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


def check_training_hooks(cfg: Config) -> list[str]:
    """Every function loads and can be called as vime calls it."""
    return check_named(_named(cfg))


def training_hooks(cfg: Config) -> TrainingHooks:
    """The functions that the trainer calls."""
    a = cfg.algorithm
    return TrainingHooks(
        args=ArgsView(cfg),
        loss=load_function(a.custom_loss_path, LOSS) if a.custom_loss_path else None,
        advantage=(
            load_function(a.custom_advantage_path, ADVANTAGE) if a.custom_advantage_path else None
        ),
        correct=load_function(a.custom_tis_path, TIS) if a.custom_tis_path else None,
    )


def _named(cfg: Config) -> list[tuple[str, str, Hook]]:
    a = cfg.algorithm
    named = [
        ("--custom-loss-function-path", a.custom_loss_path, LOSS),
        ("--custom-advantage-function-path", a.custom_advantage_path, ADVANTAGE),
        ("--custom-tis-function-path", a.custom_tis_path, TIS),
        ("--custom-pg-loss-reducer-function-path", a.custom_reducer_path, REDUCER),
    ]
    return [(flag, path, hook) for flag, path, hook in named if path]
