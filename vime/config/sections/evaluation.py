"""When and what to evaluate: the --eval-* flags, and the data sets that --eval-config names.

    eval:
      defaults:                     # any key of a data set except name and path
        n_samples_per_eval_prompt: 4
      datasets:
        - name: aime
          path: data/aime.jsonl
          rm_type: math
        - name: mmlu
          path: data/mmlu.parquet@[:200]
          rm_type: gpqa
          temperature: 0

A key is the name of a flag that is declared `per_dataset`, without "eval_" or "rollout_" in front.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from vime.config.fields import Flag, Path, Section, default_of, flag, flag_of, flags_in
from vime.config.sections.prompts import DataConfig
from vime.config.sections.rollout import RewardConfig, RolloutConfig
from vime.config.spelling import as_flag, did_you_mean
from vime.config.yaml_file import read_yaml
from vime.errors import ConfigError
from vime.plugins.batch import EVAL_LOG
from vime.plugins.rollout import ROLLOUT


def read_eval_config(path: str) -> dict[str, Any]:
    """{"defaults": {..}, "datasets": [{..}, ..]} of a YAML file.

    Raises ConfigError with all problems of the file.
    """
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


def twin(section: type[Section], name: str) -> Any:
    """A flag --eval-X. It has the bounds of --rollout-X (or --X) and inherits its value if unset."""
    source = flags_in(section)[name]
    name = as_flag(source.dataset_key, "--eval-")
    spec = dataclasses.replace(source, name=name, inherits=source.name, per_dataset=True)
    return dataclasses.field(default=None, metadata={"flag": spec})


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig(Section):
    interval: int | None = flag(
        "--eval-interval", "evaluate after every N rollouts", default=None, at_least=1
    )
    prompt_data: list | None = flag(
        "--eval-prompt-data",
        "pairs of name and path, or one path without a name (its name is then aime)",
        default=None,
        nargs="+",
    )
    config: dict | None = flag(
        "--eval-config",
        "YAML file of data sets, in place of --eval-prompt-data: docs/data-generation.md",
        default=None,
        type=read_eval_config,
    )
    samples_per_prompt: int = flag(
        "--n-samples-per-eval-prompt",
        "responses per prompt",
        default=1,
        at_least=1,
        per_dataset=True,
    )
    concurrency: int | None = flag(
        "--eval-concurrency",
        "requests of an evaluation in flight per engine (default: --vllm-server-concurrency)",
        default=None,
        at_least=1,
    )
    max_response_len: int | None = twin(RolloutConfig, "max_response_len")
    temperature: float | None = twin(RolloutConfig, "temperature")
    top_p: float | None = twin(RolloutConfig, "top_p")
    top_k: int | None = twin(RolloutConfig, "top_k")
    max_prompt_len: int | None = twin(RolloutConfig, "max_prompt_len")
    max_context_len: int | None = twin(RolloutConfig, "max_context_len")
    min_new_tokens: int | None = flag(
        "--eval-min-new-tokens",
        "minimum number of new tokens per response",
        default=None,
        at_least=0,
        per_dataset=True,
    )
    input_key: str | None = twin(DataConfig, "input_key")
    label_key: str | None = twin(DataConfig, "label_key")
    tool_key: str | None = twin(DataConfig, "tool_key")
    function_path: str | None = flag(
        "--eval-function-path",
        "evaluates; it is called with evaluation=True",
        default=None,
        hook=ROLLOUT,
        inherits="--rollout-function-path",
    )
    log_path: str | None = flag(
        "--custom-eval-rollout-log-function-path",
        "changes the metrics of an evaluation before they are logged",
        default=None,
        hook=EVAL_LOG,
    )
    reward_key: str | None = twin(RewardConfig, "reward_key")
    skip_before_train: bool = flag(
        "--skip-eval-before-train", "do not evaluate before the first step", default=False
    )

    def due_before_train(self, start_step: int) -> bool:
        """A new run is evaluated once before its first step."""
        return self.interval is not None and start_step == 0 and not self.skip_before_train

    @property
    def datasets(self) -> dict[str, Path]:
        """{name: path}. `vime/config/evaluation.py` resolves the rest."""
        if self.config is not None:
            return {data["name"]: data["path"] for data in self.config["datasets"]}
        data = self.prompt_data or []
        return (
            {"aime": data[0]} if len(data) == 1 else dict(zip(data[::2], data[1::2], strict=False))
        )

    def problems(self) -> Iterator[str]:
        data = self.prompt_data or []
        name = f"--eval-prompt-data {' '.join(data)}"
        if len(data) > 1 and len(data) % 2:
            yield (
                f"{name} is not pairs of name and path. Give NAME PATH [NAME PATH ...], or one "
                "path."
            )
        names = data[::2] if len(data) > 1 else []
        if len(set(names)) < len(names):
            yield f"{name} uses a name twice. Name each data set differently."
        if self.interval is not None and not data and self.config is None:
            yield (
                f"--eval-interval {self.interval} has nothing to evaluate. Add --eval-prompt-data "
                "NAME PATH, or leave it out."
            )
        if data and self.config is not None:
            yield (
                f"{name} and --eval-config both name data sets. Move them all into the file, or "
                "drop it."
            )


@dataclass(frozen=True, slots=True)
class Place:
    """Where the value of a data set's key goes.

    section  of `Config`: "rollout"
    kinds    the types that a YAML file may hold there; null is allowed too and means `unset`
    """

    section: str
    field: str
    kinds: tuple[type, ...]
    unset: Any = None
    spec: Flag | None = None


PLACED = {"data": DataConfig, "rollout": RolloutConfig, "reward": RewardConfig, "eval": EvalConfig}
OWN = {"name": (str,), "path": (str,), "metadata_overrides": (dict,)}  # keys without a flag


@cache
def dataset_keys() -> dict[str, Place]:
    """{"temperature": its Place, ...}: the keys of a data set that flags declare."""
    places: dict[str, Place] = {}
    declared: list[Flag] = []
    for owner, section in PLACED.items():
        hints = typing.get_type_hints(section)
        for field in dataclasses.fields(section):
            if spec := flag_of(field):
                places[spec.name] = _place(owner, field, spec, hints[field.name])
                declared += [spec] * spec.per_dataset
    return {spec.dataset_key: places[spec.inherits or spec.name] for spec in declared}


def _place(owner: str, field: dataclasses.Field, spec: Flag, hint: Any) -> Place:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    has_default = type(None) not in kinds
    unset = default_of(field) if has_default else None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    return Place(owner, field.name, (int, float) if kinds == (float,) else kinds, unset, spec)


def _unknown(where: str, given: Mapping[str, Any], known: tuple[str, ...]) -> list[str]:
    everything = f"Known: {', '.join(known)}."
    return [
        f"{where} has the unknown key {key!r}. "
        + did_you_mean(str(key), known, otherwise=everything)
        for key in given
        if key not in known
    ]


def _wrong(
    where: str, given: Any, *, needs: tuple[str, ...] = (), not_here: tuple[str, ...] = ()
) -> list[str]:
    if not isinstance(given, dict):
        return [f"{where} is a {type(given).__name__}. Write keys and values."]
    places = {key: Place("", "", kinds) for key, kinds in OWN.items() if key not in not_here}
    places |= dataset_keys()
    problems = _unknown(where, given, tuple(places))
    problems += [f"{where} has no {key}. Add it." for key in needs if not given.get(key)]
    for key, place in places.items():
        if given.get(key) is not None and (problem := _misfit(f"{where}.{key}", given[key], place)):
            problems.append(problem)
    return problems


def _misfit(where: str, value: Any, place: Place) -> str | None:
    kinds, spec = place.kinds, place.spec
    if not _is_one(value, kinds):
        return f"{where} {value!r} is a {type(value).__name__}. Give {_named(kinds)}."
    if isinstance(value, list) and spec is not None:
        kinds = (spec.type or str,)
        other = next((item for item in value if not _is_one(item, kinds)), None)
        if other is not None:
            return f"{where} holds {other!r}, a {type(other).__name__}. Give {_named(kinds)}s."
    return None if spec is None else dataclasses.replace(spec, name=where).problem(value)


def _is_one(value: Any, kinds: tuple[type, ...]) -> bool:
    """YAML's true is not a number here, although Python's is."""
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _named(kinds: tuple[type, ...]) -> str:
    return " or ".join(kind.__name__ for kind in kinds)
