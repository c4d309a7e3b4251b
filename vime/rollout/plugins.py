"""Users' functions, named by dotted path: loaded once, their signatures checked at start."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from vime.config import Config
from vime.config.evaluation import eval_datasets
from vime.errors import PluginError


@dataclass(frozen=True, slots=True)
class Hook:
    """How vime calls a user's function.

    shape       as a user would write it, for the error
    positional  arguments passed by position
    keywords    arguments passed by name
    methods     what a class must have
    """

    shape: str
    positional: int
    keywords: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()


ROLLOUT = Hook("f(args, rollout_id, data_source, evaluation=False)", 3, ("evaluation",))
GENERATE = Hook(
    "async f(args, sample, sampling_params[, evaluation]) -> Sample or list of Sample", 3
)
REWARD = Hook("async f(args, sample, **kwargs)", 2)
GROUP_REWARD = Hook("async f(args, samples, **kwargs) -> list", 2)
DYNAMIC_FILTER = Hook("f(args, samples, **kwargs) -> bool or DynamicFilterOutput", 2)
BUFFER_FILTER = Hook("f(args, rollout_id, buffer, num_samples) -> list of groups", 4)
SAMPLE_FILTER = Hook("f(args, groups)", 2)
ALL_SAMPLES = Hook("f(args, all_samples, data_source)", 3)
SAMPLE_HOOK = Hook("f(args, sample) -> None or Sample", 2)
POST_PROCESS = Hook("f(args, samples) -> (raw rewards, scores)", 2)
CONVERT = Hook("f(args, samples) -> TrainBatch or dict of columns", 2)
DATA_POSTPROCESS = Hook("f(args, rollout_id, batch) -> None or TrainBatch", 3)
LOG = Hook("f(rollout_id, args, samples, metrics, rollout_time) -> True to skip the default", 5)
EVAL_LOG = Hook("f(rollout_id, args, data, metrics) -> True to skip the default", 4)
DATA_SOURCE = Hook(
    "a class with get_samples, add_samples, save, load, __len__; built as C(args)",
    1,
    methods=("get_samples", "add_samples", "save", "load", "__len__"),
)


@cache
def load_function(path: str, hook: Hook | None = None) -> Any:
    """The function or class at `package.module.name`; with a hook, its signature is checked.

    The same object comes back on every call. Raises PluginError.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise PluginError(f"{path!r} is not a dotted path; write package.module.function.")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module does when it is imported
        raise PluginError(
            f"{path}: importing {module_name} failed: {type(error).__name__}: {error}. "
            "Is its folder on PYTHONPATH?"
        ) from error
    function = getattr(module, name, None)
    if function is None:
        have = {n: v for n, v in vars(module).items() if callable(v) and not n.startswith("_")}
        own = [n for n, v in have.items() if getattr(v, "__module__", None) == module_name]
        names = ", ".join(own or have) or "nothing to call"
        raise PluginError(f"{path}: {module_name} has no {name!r}; it has: {names}.")
    if not callable(function):
        raise PluginError(f"{path} is a {type(function).__name__}, not a function or class.")
    if hook is not None:
        check_signature(path, function, hook)
    return function


def check_signature(path: str, function: Callable, hook: Hook) -> None:
    """Raises PluginError when vime's call would not fit the function's parameters."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(*[None] * hook.positional, **dict.fromkeys(hook.keywords))
    except TypeError as error:
        raise PluginError(
            f"{path} has the signature {function.__name__}{signature}, which vime cannot call "
            f"({error}). Expected: {hook.shape}."
        ) from None


async def call(function: Callable[..., Any | Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
    """Awaits the function's result where it is awaitable: hooks may be plain or async."""
    result = function(*args, **kwargs)
    return await result if inspect.isawaitable(result) else result


@cache
def takes(function: Callable, name: str) -> bool:
    """Whether the function has a parameter of that name; hooks may leave optional ones out."""
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def hooks_in(cfg: Config) -> list[tuple[str, str, Hook]]:
    """(flag, path, hook) of every function that this configuration names."""
    reward = GROUP_REWARD if cfg.reward.group_rm else REWARD
    named = [
        ("--rollout-function-path", cfg.rollout.function_path, ROLLOUT),
        ("--eval-function-path", cfg.eval.function_path, ROLLOUT),
        ("--data-source-path", cfg.data.data_source_path, DATA_SOURCE),
        ("--custom-generate-function-path", cfg.rollout.custom_generate_path, GENERATE),
        ("--dynamic-sampling-filter-path", cfg.rollout.dynamic_filter_path, DYNAMIC_FILTER),
        ("--buffer-filter-path", cfg.rollout.buffer_filter_path, BUFFER_FILTER),
        ("--rollout-sample-filter-path", cfg.rollout.sample_filter_path, SAMPLE_FILTER),
        ("--rollout-all-samples-process-path", cfg.rollout.all_samples_path, ALL_SAMPLES),
        ("--custom-rollout-log-function-path", cfg.rollout.log_path, LOG),
        ("--custom-convert-samples-to-train-data-path", cfg.rollout.convert_path, CONVERT),
        ("--rollout-data-postprocess-path", cfg.rollout.data_postprocess_path, DATA_POSTPROCESS),
        ("--custom-rm-path", cfg.reward.custom_rm_path, reward),
        ("--custom-reward-post-process-path", cfg.reward.post_process_path, POST_PROCESS),
        ("--custom-eval-rollout-log-function-path", cfg.eval.log_path, EVAL_LOG),
    ]
    for dataset in eval_datasets(cfg) if cfg.eval.config is not None else ():
        flag, generate = f"--eval-config, {dataset.name}:", dataset.custom_generate_function_path
        named += [(flag, generate, GENERATE), (flag, dataset.custom_rm_path, reward)]
    for path in cfg.rollout.sample_hook_paths or ():
        named.append(("--rollout-sample-hook-path", path, SAMPLE_HOOK))
    return [(flag, path, hook) for flag, path, hook in named if path]


def check_hooks(cfg: Config) -> list[str]:
    """Every function named by a path flag loads and can be called as vime calls it."""
    return check_named(hooks_in(cfg))


def check_named(named: Iterable[tuple[str, str, Hook]]) -> list[str]:
    """One problem for each (flag, path, hook) that does not load or cannot be called."""
    problems = []
    for flag, path, hook in named:
        try:
            check_methods(path, load_function(path, hook), hook)
        except PluginError as error:
            problems.append(f"{flag} {error}")
    return problems


def check_methods(path: str, function: Any, hook: Hook) -> None:
    """Raises PluginError when a data source class lacks a method that vime calls."""
    missing = [name for name in hook.methods if not hasattr(function, name)]
    if missing and inspect.isclass(function):
        raise PluginError(f"{path} lacks {', '.join(missing)}. Expected: {hook.shape}.")
