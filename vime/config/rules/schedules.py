"""Learning-rate schedules must fit the length of the run; the critic's flags need a critic."""

from __future__ import annotations

from collections.abc import Iterator

from vime.algorithms.advantages import estimators_where
from vime.config import Config
from vime.errors import ConfigError


def the_critic_has_a_part(cfg: Config) -> Iterator[str]:
    a, o, total = cfg.algorithm, cfg.optimizer, cfg.batch.num_rollout
    with_critic = f"--advantage-estimator {estimators_where(lambda e: e.critic)}"
    if a.needs_critic and total is not None and a.num_critic_only_steps >= total:
        yield (
            f"--num-critic-only-steps {a.num_critic_only_steps} leaves no rollout of --num-rollout "
            f"{total} for the actor. Lower the first, or raise the second."
        )
    for name, value in (
        ("--critic-lr", o.critic_lr),
        ("--critic-lr-warmup-iters", o.critic_lr_warmup_iters),
    ):
        if value is not None and not a.needs_critic:
            yield (
                f"{name} {value} has no effect without a critic. Add {with_critic}, or leave it "
                "out."
            )
    if not o.critic_overrides:
        return
    name = f"--megatron-config-path {o.role_file}"
    if not a.needs_critic:
        yield f"{name}: there is no critic. Add {with_critic}, or drop its entry."
    try:
        _ = o.of_critic
    except ConfigError as error:
        yield from (f"{name}: for the critic, {problem}" for problem in error.problems)


def schedules_fit_the_run(cfg: Config) -> Iterator[str]:
    if cfg.debug.rollout_only:
        return
    problem = _problem_of_schedule(cfg, "--lr-warmup-iters")
    if problem is not None:
        yield problem
    elif cfg.algorithm.needs_critic:
        own = cfg.optimizer.critic_lr_warmup_iters is not None
        try:
            critic = cfg.of_critic
        except ConfigError:  # `the_critic_has_a_part` reports it
            return
        flag = "--critic-lr-warmup-iters" if own else "--lr-warmup-iters"
        problem = _problem_of_schedule(critic, flag)
        if problem is not None:
            yield f"For the critic: {problem}"


def _problem_of_schedule(cfg: Config, warmup_flag: str) -> str | None:
    o, total = cfg.optimizer, cfg.decay_steps
    warmup = f"{warmup_flag} {o.lr_warmup_iters}"
    if o.lr_warmup_fraction:
        warmup = f"--lr-warmup-fraction {o.lr_warmup_fraction}"
    decay = f"--lr-decay-style {o.lr_decay_style}"
    if total is None and (o.decay_ends or o.lr_warmup_fraction):
        return (
            f"{decay if o.decay_ends else warmup} depends on the length of the run, and with "
            "--num-epoch only the data determines it. Give --num-rollout or --lr-decay-iters."
        )
    if total is not None and o.decay_ends and o.warmup_steps(total) >= total:
        longer = "--num-rollout" if o.lr_decay_iters is None else "--lr-decay-iters"
        return (
            f"{warmup} leaves none of {total} optimizer steps for {decay}. Lower it, or raise "
            f"{longer}."
        )
    return None
