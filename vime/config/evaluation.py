"""The settings with which each data set is evaluated.

A value comes from the first of these that sets it: the data set's entry in --eval-config, the
defaults of that file, an --eval-* flag, the flag of the rollouts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vime.config import Config
from vime.config.fields import flags_in
from vime.config.sections.evaluation import OWN, EvalConfig, dataset_keys


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalDataset:
    """A data set to evaluate.

    cfg                 the run's configuration with the data set's sampling and rewards
    metadata_overrides  added to the metadata of every sample
    """

    name: str
    path: str
    cfg: Config
    metadata_overrides: dict[str, Any] | None = None


def eval_datasets(cfg: Config) -> tuple[EvalDataset, ...]:
    """Every data set to evaluate, with all its values."""
    flags = {
        spec.dataset_key: value
        for field, spec in flags_in(EvalConfig).items()
        if spec.inherits and (value := getattr(cfg.eval, field)) is not None
    }
    if cfg.eval.config is None:
        named = [{"name": name, "path": path} for name, path in cfg.eval.datasets.items()]
        return tuple(_resolved(cfg, flags | own) for own in named)
    defaults = cfg.eval.config["defaults"]
    return tuple(
        _resolved(cfg, _layered(flags, defaults, own)) for own in cfg.eval.config["datasets"]
    )


def evaluations_fit(cfg: Config) -> Iterator[str]:
    """Each data set's values must fit each other, even if the values of the rollouts do.

    `check_rewards` checks the graders.
    """
    for dataset in eval_datasets(cfg):
        where = "the evaluation of" if cfg.eval.config is None else "--eval-config,"
        for section in ("data", "rollout", "eval"):
            known = set(getattr(cfg, section).problems())
            for problem in getattr(dataset.cfg, section).problems():
                if problem not in known:
                    yield f"{where} {dataset.name}: {problem}"


def _layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merges layers; later ones win. A layer with either kind of grader decides on both kinds."""
    values: dict[str, Any] = {}
    for layer in layers:
        if "rm_type" in layer or "custom_rm_path" in layer:
            values |= {"rm_type": None, "custom_rm_path": None}
        values |= layer
    return values


def _resolved(cfg: Config, values: Mapping[str, Any]) -> EvalDataset:
    changes: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, place in dataset_keys().items():
        if key in values:
            value = place.unset if values[key] is None else values[key]
            changes[place.section][place.field] = value
    grader = changes["reward"].get("custom_rm_path", cfg.reward.custom_rm_path)
    changes["reward"]["group_rm"] = cfg.reward.group_rm and grader is not None
    sections = {name: getattr(cfg, name).changed(**new) for name, new in changes.items()}
    own = {key: values[key] for key in OWN if key in values}
    return EvalDataset(cfg=replace(cfg, **sections), **own)
