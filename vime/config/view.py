"""`args` as plugins see it: every flag under its own name, flat, resolved and read-only."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from vime.config import Config
from vime.config.fields import flags_in
from vime.config.own_values import own_values
from vime.errors import PluginError

SECTIONS = tuple(Config.__dataclass_fields__)

# What --eval-* leaves unset is taken from the flag on the right.
INHERITED = {
    "eval_max_response_len": "rollout_max_response_len",
    "eval_temperature": "rollout_temperature",
    "eval_top_p": "rollout_top_p",
    "eval_top_k": "rollout_top_k",
    "eval_max_prompt_len": "rollout_max_prompt_len",
    "eval_max_context_len": "rollout_max_context_len",
    "eval_input_key": "input_key",
    "eval_label_key": "label_key",
    "eval_tool_key": "tool_key",
    "eval_reward_key": "reward_key",
    "eval_function_path": "rollout_function_path",
    "over_sampling_batch_size": "rollout_batch_size",
    "log_probs_max_tokens_per_gpu": "max_tokens_per_gpu",
}


class ArgsView:
    """`args.rollout_batch_size` and the like: the flag without dashes.

    Holds resolved values: `eps_clip_high` is never None, `eval_*` has inherited, MODEL_ARGS stand
    under their Megatron names and vLLM's under `vllm_*`, those of --custom-config-path beside them.
    `args.config` is the typed `Config`.
    runtime adds what only a running job knows (`vllm_router_ip`, `vllm_router_port`).

    Pickles. Reading an unknown name raises AttributeError; writing raises PluginError.
    """

    __slots__ = ("_config", "_runtime", "_values")

    def __init__(self, config: Config, **runtime: Any) -> None:
        object.__setattr__(self, "_config", config)
        object.__setattr__(self, "_runtime", runtime)
        own = own_values(config.rollout.custom_config_path)
        values = {**own, **resolved(config), **runtime}
        object.__setattr__(self, "_values", MappingProxyType(values))

    @property
    def config(self) -> Config:
        return self._config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the protocols that copy and pickle probe for
            raise AttributeError(name)
        try:
            return self._values[name]
        except KeyError:
            close = difflib.get_close_matches(name, self._values, n=1)
            hint = f" Did you mean args.{close[0]}?" if close else ""
            raise AttributeError(f"args has no {name!r}.{hint}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise PluginError(
            f"args.{name} = {value!r}: args is read-only. Set --{name.replace('_', '-')} on the "
            "command line if it is a flag; keep what a sample carries in sample.metadata and what "
            "a plugin remembers in its own module or data source."
        )

    def __delattr__(self, name: str) -> None:
        raise PluginError(f"del args.{name}: args is read-only. Leave it as it is.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __dir__(self) -> list[str]:
        return [*self._values, "config"]

    def __repr__(self) -> str:
        return "ArgsView(" + ", ".join(f"{k}={v!r}" for k, v in self._values.items()) + ")"

    def __reduce__(self):
        return _rebuild, (self._config, self._runtime)


def _rebuild(config: Config, runtime: Mapping[str, Any]) -> ArgsView:
    return ArgsView(config, **runtime)


def resolved(cfg: Config) -> dict[str, Any]:
    """{flag without dashes: value in force} over all sections, MODEL_ARGS and vLLM's flags."""
    values: dict[str, Any] = dict(cfg.model.args)
    values |= {f"vllm_{name}": value for name, value in cfg.engine.vllm_args.items()}
    values |= {f"router_{name}": value for name, value in cfg.engine.router_args.items()}
    for name in SECTIONS:
        section = getattr(cfg, name)
        for field, spec in flags_in(type(section)).items():
            values[spec.dest] = getattr(section, field)
            if spec.negated:
                values[spec.negated.lstrip("-").replace("-", "_")] = not getattr(section, field)
    for name, source in INHERITED.items():
        if values[name] is None:
            values[name] = values[source]
    steps = cfg.batch.steps_per_rollout
    return values | {
        "offload_train": cfg.cluster.offload_train,
        "no_offload_train": not cfg.cluster.offload_train,
        "offload_rollout": cfg.cluster.offload_rollout,
        "no_offload_rollout": not cfg.cluster.offload_rollout,
        "rollout_num_gpus": cfg.cluster.rollout_gpus,
        "rollout_num_engines": cfg.cluster.num_engines,
        "vllm_router_policy": cfg.router_policy,
        "num_steps_per_rollout": steps,
        "global_batch_size": cfg.batch.samples // steps,
        "eps_clip_high": cfg.algorithm.clip_high,
        "eval_datasets": cfg.eval.datasets,
        "data_parallel_size": cfg.dp,
        "world_size": cfg.cluster.trainer_gpus,
    }
