"""What is evaluated and how: `--eval-config` and the flags as one resolved `EvalDataset` each.

    eval:
      defaults:                     # any field of a dataset but name and path
        n_samples_per_eval_prompt: 4
      datasets:
        - name: aime
          path: data/aime.jsonl
          rm_type: math
        - name: mmlu
          path: data/mmlu.parquet@[:200]
          rm_type: gpqa
          temperature: 0

What a dataset leaves out comes from the defaults, then from the `--eval-*` flags, then from the
`--rollout-*` flags and those of the prompts.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from vime.config.yaml_file import read_yaml
from vime.errors import ConfigError

if TYPE_CHECKING:
    from vime.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalDataset:
    """One dataset with everything in force. `None` stands for the engine's own default."""

    name: str
    path: str
    n_samples_per_eval_prompt: int = 1
    rm_type: str | None = None
    custom_rm_path: str | None = None
    reward_key: str | None = None
    input_key: str = "input"
    label_key: str | None = None
    metadata_key: str = "metadata"
    tool_key: str = "tools"
    apply_chat_template: bool = False
    apply_chat_template_kwargs: dict[str, Any] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_response_len: int = 1024
    max_prompt_len: int | None = None
    max_context_len: int | None = None
    min_new_tokens: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    custom_generate_function_path: str | None = None
    metadata_overrides: dict[str, Any] | None = None


# What each field takes in a YAML file; None also resets it to "not set".
_INT, _NUMBER, _TEXT, _DICT = (int,), (int, float), (str,), (dict,)
_KINDS: dict[str, tuple[type, ...]] = {
    "name": _TEXT,
    "path": _TEXT,
    "n_samples_per_eval_prompt": _INT,
    "rm_type": _TEXT,
    "custom_rm_path": _TEXT,
    "reward_key": _TEXT,
    "input_key": _TEXT,
    "label_key": _TEXT,
    "metadata_key": _TEXT,
    "tool_key": _TEXT,
    "apply_chat_template": (bool,),
    "apply_chat_template_kwargs": _DICT,
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "top_k": _INT,
    "max_response_len": _INT,
    "max_prompt_len": _INT,
    "max_context_len": _INT,
    "min_new_tokens": _INT,
    "stop": (list,),
    "stop_token_ids": (list,),
    "custom_generate_function_path": _TEXT,
    "metadata_overrides": _DICT,
}
_LEAST = {"n_samples_per_eval_prompt": 1, "temperature": 0, "top_k": -1, "max_response_len": 1}


def read_eval_config(path: str) -> dict[str, Any]:
    """{"defaults": {..}, "datasets": [{..}, ..]} of a YAML file. Raises ConfigError with all that
    is wrong with it."""
    name = f"--eval-config {path}"
    content = read_yaml(name, path)
    part = content.get("eval") if isinstance(content, dict) else None
    if not isinstance(part, dict) or not isinstance(part.get("datasets"), list):
        raise ConfigError(
            f"{name} has no eval.datasets. Write `eval:` with a list `datasets:` of name and path."
        )
    defaults, datasets = part.get("defaults") or {}, part["datasets"]
    problems = _unknown(f"{name}, eval", part, ("defaults", "datasets"))
    problems += _wrong(f"{name}, eval.defaults", defaults, not_here=("name", "path"))
    for i, dataset in enumerate(datasets):
        problems += _wrong(f"{name}, eval.datasets[{i}]", dataset, needs=("name", "path"))
    names = [d.get("name") for d in datasets if isinstance(d, dict)]
    problems += [
        f"{name} uses the name {n!r} twice. Name each dataset differently."
        for n in dict.fromkeys(names)
        if names.count(n) > 1
    ]
    if not datasets:
        problems.append(f"{name}: eval.datasets is empty. Name a dataset, or leave the flag out.")
    if problems:
        raise ConfigError(*problems)
    return {"defaults": defaults, "datasets": datasets}


def _unknown(where: str, given: Mapping[str, Any], known: tuple[str, ...]) -> list[str]:
    problems = []
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"Known: {', '.join(known)}."
            problems.append(f"{where} has the unknown key {key!r}. {hint}")
    return problems


def _wrong(
    where: str, given: Any, *, needs: tuple[str, ...] = (), not_here: tuple[str, ...] = ()
) -> list[str]:
    if not isinstance(given, dict):
        return [f"{where} is a {type(given).__name__}. Write keys and values."]
    known = tuple(key for key in _KINDS if key not in not_here)
    problems = _unknown(where, given, known)
    problems += [f"{where} has no {key}. Add it." for key in needs if not given.get(key)]
    for key in known:
        value = given.get(key)
        if value is None:
            continue
        kinds = _KINDS[key]
        is_other_bool = isinstance(value, bool) and bool not in kinds
        if not isinstance(value, kinds) or is_other_bool:
            wanted = " or ".join(kind.__name__ for kind in kinds)
            problems.append(f"{where}.{key} {value!r} is a {type(value).__name__}. Give {wanted}.")
        elif key in _LEAST and value < _LEAST[key]:
            problems.append(f"{where}.{key} {value} is too small. Give {_LEAST[key]} or more.")
    return problems


def eval_datasets(cfg: Config) -> tuple[EvalDataset, ...]:
    """Every dataset to evaluate, resolved: dataset > defaults > --eval-* > --rollout-*."""
    flags = _from_flags(cfg)
    if cfg.eval.config is None:
        return tuple(
            EvalDataset(name=name, path=path, **flags) for name, path in cfg.eval.datasets.items()
        )
    defaults = cfg.eval.config["defaults"]
    return tuple(
        EvalDataset(**_layered(flags, defaults, dataset)) for dataset in cfg.eval.config["datasets"]
    )


def _layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later layers win. One that names a grader of either kind decides on both kinds."""
    values: dict[str, Any] = {}
    for layer in layers:
        if "rm_type" in layer or "custom_rm_path" in layer:
            values |= {"rm_type": None, "custom_rm_path": None}
        values |= layer
    return values


def _from_flags(cfg: Config) -> dict[str, Any]:
    own, rollout, data, reward = cfg.eval, cfg.rollout, cfg.data, cfg.reward

    def first(*values: Any) -> Any:
        return next((value for value in values if value is not None), None)

    flags = {
        "n_samples_per_eval_prompt": own.samples_per_prompt,
        "rm_type": reward.rm_type,
        "custom_rm_path": reward.custom_rm_path,
        "reward_key": first(own.reward_key, reward.reward_key),
        "input_key": first(own.input_key, data.input_key),
        "label_key": first(own.label_key, data.label_key),
        "metadata_key": data.metadata_key,
        "tool_key": first(own.tool_key, data.tool_key),
        "apply_chat_template": data.apply_chat_template,
        "apply_chat_template_kwargs": data.apply_chat_template_kwargs,
        "min_new_tokens": own.min_new_tokens,
        "stop": rollout.stop,
        "stop_token_ids": rollout.stop_token_ids,
        "custom_generate_function_path": rollout.custom_generate_path,
    }
    for name in INHERITED:
        flags[name] = first(getattr(own, name), getattr(rollout, name))
    assert set(flags) <= {f.name for f in fields(EvalDataset)}
    return flags


# Fields that EvalConfig and RolloutConfig both have.
INHERITED = (
    "temperature",
    "top_p",
    "top_k",
    "max_response_len",
    "max_prompt_len",
    "max_context_len",
)
