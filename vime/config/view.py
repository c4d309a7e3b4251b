"""`args`, which users' functions receive: every flag by its name, resolved and read-only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from vime.config import Config
from vime.config.fields import flags_in
from vime.config.secrets import without_secrets
from vime.config.spelling import as_flag, as_key, did_you_mean
from vime.errors import PluginError

SECTIONS = tuple(Config.__dataclass_fields__)


class ArgsView:
    """`args.rollout_batch_size` is the value of --rollout-batch-size.

    Values are resolved: a flag that inherits has its inherited value. MODEL_ARGS have Megatron's
    names, other flags of vLLM and its router begin with `vllm_` and `router_`, and the user's own
    values come from --custom-config-path. `args.config` is the typed `Config`.

    runtime  values that only a running job knows: `vllm_router_ip`, `vllm_router_port`, ...

    It can be pickled. Reading an unknown name raises AttributeError; writing raises PluginError.
    """

    __slots__ = ("_config", "_runtime", "_values")

    def __init__(self, config: Config, **runtime: Any) -> None:
        object.__setattr__(self, "_config", config)
        object.__setattr__(self, "_runtime", runtime)
        values = {**config.rollout.own_values, **resolved(config), **runtime}
        object.__setattr__(self, "_values", MappingProxyType(values))

    @property
    def config(self) -> Config:
        return self._config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask for methods that an object may have
            raise AttributeError(name)
        try:
            return self._values[name]
        except KeyError:
            hint = did_you_mean(name, self._values, shown="args.{}".format)
            raise AttributeError(f"args has no {name!r}. {hint}".rstrip()) from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise PluginError(
            f"args.{name} = {value!r}: args is read-only. Set {as_flag(name)} on the command line "
            "if it is a flag. Keep facts about a sample in sample.metadata, and a function's own "
            "state in its module or data source."
        )

    def __delattr__(self, name: str) -> None:
        raise PluginError(f"del args.{name}: args is read-only. Leave it as it is.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __dir__(self) -> list[str]:
        return [*self._values, "config"]

    def __repr__(self) -> str:
        shown = without_secrets(self._values)
        return "ArgsView(" + ", ".join(f"{k}={v!r}" for k, v in shown.items()) + ")"

    def __reduce__(self):
        return _rebuild, (self._config, self._runtime)


def _rebuild(config: Config, runtime: Mapping[str, Any]) -> ArgsView:
    return ArgsView(config, **runtime)


def resolved(cfg: Config) -> dict[str, Any]:
    """{name in `args`: value in force} of every flag."""
    values: dict[str, Any] = dict(cfg.model.args)
    values |= {f"vllm_{name}": value for name, value in cfg.engine.vllm_args.items()}
    values |= {f"router_{name}": value for name, value in cfg.engine.router_args.items()}
    inherited: dict[str, str] = {}
    for name in SECTIONS:
        section = getattr(cfg, name)
        for field, spec in flags_in(type(section)).items():
            value = values[spec.dest] = getattr(section, field)
            if spec.also:
                values[as_key(spec.also)] = value
            if spec.negated:
                values[as_key(spec.negated)] = not value
            if spec.inherits and value is None:
                inherited[spec.dest] = as_key(spec.inherits)
    values |= {name: values[source] for name, source in inherited.items()}
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
        "eval_datasets": cfg.eval.datasets,
        "data_parallel_size": cfg.dp,
        "world_size": cfg.cluster.trainer_gpus,
    }
