"""Every function of the user's own that a configuration names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from vime.config import Config
from vime.config.evaluation import eval_datasets
from vime.plugins.hook import Plugin
from vime.plugins.rollout import GENERATE, GROUP_REWARD, REWARD


def plugins_named_in(cfg: Config) -> Iterator[Plugin]:
    """By its flags, then by the data sets of --eval-config."""
    for section in fields(cfg):
        yield from getattr(cfg, section.name).all_plugins()
    for dataset in eval_datasets(cfg) if cfg.eval.config is not None else ():
        named_by = f"--eval-config, {dataset.name}:"
        reward = GROUP_REWARD if cfg.reward.group_rm else REWARD
        if path := dataset.custom_generate_function_path:
            yield Plugin(named_by, path, GENERATE)
        if path := dataset.custom_rm_path:
            yield Plugin(named_by, path, reward)


def check_plugins(cfg: Config) -> list[str]:
    """A problem for each function that does not load or does not fit its hook."""
    return list(filter(None, (plugin.problem() for plugin in plugins_named_in(cfg))))
