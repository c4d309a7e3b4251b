"""The user's functions that a configuration names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

from vime.config import Config
from vime.config.evaluation import eval_datasets
from vime.plugins.hook import Plugin


def plugins_named_in(cfg: Config) -> Iterator[Plugin]:
    """Functions that the flags name, then other functions that data sets of --eval-config name."""
    of_flags = list(_plugins_in(cfg))
    yield from of_flags
    for dataset in eval_datasets(cfg) if cfg.eval.config is not None else ():
        for plugin in _plugins_in(dataset.cfg):
            if plugin not in of_flags:
                yield replace(plugin, named_by=f"--eval-config, {dataset.name}: {plugin.named_by}")


def _plugins_in(cfg: Config) -> Iterator[Plugin]:
    for section in fields(cfg):
        yield from getattr(cfg, section.name).own_plugins()


def check_plugins(cfg: Config) -> list[str]:
    """A problem for each function that does not load or does not fit its hook."""
    return list(filter(None, (plugin.problem() for plugin in plugins_named_in(cfg))))
