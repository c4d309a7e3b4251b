"""What of a configuration can be checked before any model loads: data, hooks, rewards."""

from __future__ import annotations

from vime.config import Config
from vime.data.checks import data_problems
from vime.rollout.grading import check_rewards
from vime.rollout.plugins import check_hooks


def check_rollout(cfg: Config) -> list[str]:
    """Every problem, each naming flag, value and remedy; empty when there is none."""
    return [*data_problems(cfg), *check_hooks(cfg), *check_rewards(cfg)]
