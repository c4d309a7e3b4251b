"""Every flag of the installed vLLM is accepted as --vllm-*, and checked before any model loads.

vLLM's own parser checks a flag in another process, because importing the parser takes about 14 s on
2 cores. `verdicts.py` keeps its answers. The flags in `COMMON` are checked without the parser.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from vime.backends.vllm import dialect as dialects
from vime.backends.vllm import plugin_flags
from vime.backends.vllm.cpu import head_size_problems
from vime.backends.vllm.spelling import whole_number, words_of
from vime.backends.vllm.verdicts import Verdicts
from vime.config import Config
from vime.config.spelling import as_flag, did_you_mean

PARSER_TIMEOUT_S = 300.0

OWNED = {  # flags that vime sets: the remedy
    "model": "Use --hf-checkpoint",
    "tokenizer": "Use --hf-checkpoint",
    "served_model_name": "Leave it out: requests name no model",
    "tensor_parallel_size": "Use --rollout-num-gpus-per-engine",
    "seed": "Use --seed",
    "dtype": "Use --dtype",
    "host": "Use --vllm-router-ip",
    "port": "Use --vllm-router-port",
    "uds": "Use --vllm-router-ip",
    "logprobs_mode": "Leave it out: training needs processed_logprobs",
    "weight_transfer_config": "Use --colocate, which chooses the transport",
    "worker_extension_cls": "Leave it out: weight updates need vime's own class",
    "tokens_only": "Leave it out: requests carry token ids already",
    "enable_scale_out": "Leave it out: vime turns it on",
    "enable_sleep_mode": "Use --colocate",
    "data_parallel_size": "Use --rollout-num-gpus, which adds engines",
    **dict.fromkeys(
        ("nnodes", "node_rank", "master_addr", "master_port", "headless"),
        "Use --rollout-num-gpus-per-engine: an engine larger than a node spans nodes",
    ),
}


def _positive(value: Any) -> str | None:
    number = whole_number(value)
    return None if number is not None and number > 0 else "a whole number above 0, such as 8192"


def _share(value: Any) -> str | None:
    try:
        return None if 0 < float(value) <= 1 else "a number in (0, 1], such as 0.7"
    except (TypeError, ValueError):
        return "a number in (0, 1], such as 0.7"


def _switch(value: Any) -> str | None:
    return None if value is True else "no value"


COMMON: dict[str, Callable[[Any], str | None]] = {  # None, or the values that are allowed
    "gpu_memory_utilization": _share,
    "max_model_len": lambda v: None if v in ("auto", "-1") else _positive(v),
    "max_num_seqs": _positive,
    "max_num_batched_tokens": _positive,
    "enforce_eager": _switch,
}


def check_vllm_flags(cfg: Config) -> list[str]:
    """The problems of `cfg.engine.vllm_args`, for the user; [] if vLLM accepts all of them."""
    given = cfg.engine.vllm_args
    if cfg.debug.no_engines:
        return []
    problems = []
    rest: dict[str, Any] = {}
    for name, value in given.items():
        if name in OWNED:
            problems.append(f"{_spelled(name, value)} is set by vime. {OWNED[name]}.")
        elif name in COMMON:
            if wanted := COMMON[name](value):
                problems.append(f"{_spelled(name, value)} is not usable: give {wanted}.")
        else:
            rest[name] = value
    problems += head_size_problems(cfg)
    return problems + (_ask_vllm(rest) if rest else [])


def _spelled(name: str, value: Any) -> str:
    words = [] if value is True else value if isinstance(value, list) else [value]
    return " ".join([as_flag(name, "--vllm-"), *map(str, words)])


def _ask_vllm(given: dict[str, Any]) -> list[str]:
    version = dialects.installed_version()
    if version is None:
        flag = _spelled(*next(iter(given.items())))
        return [f"{flag}: vLLM is not installed, so its flags cannot be checked."]
    verdicts = Verdicts(version)
    asked = {
        name: value
        for name, value in given.items()
        if (verdicts.has(name) or not verdicts.names) and not verdicts.knows(name, value)
    }
    if asked:
        answer = _run_parser(asked)
        verdicts.names = set(answer["names"])
        verdicts.learn(asked, answer["refused"])
    problems = []
    for name, value in given.items():
        if not verdicts.has(name):
            problems.append(_unknown(name, value, verdicts.names, version))
        elif why := verdicts.why(name, value):
            problems.append(f"{_spelled(name, value)}: vLLM {version} refuses it: {why}")
    return problems


def _unknown(name: str, value: Any, names: set[str], version: str) -> str:
    shown, known = partial(as_flag, prefix="--vllm-"), names | set(COMMON)
    hint = did_you_mean(name, known, shown=shown, otherwise="See vllm serve --help.")
    return f"{_spelled(name, value)}: vLLM {version} has no such flag. {hint}"


def _run_parser(given: dict[str, Any]) -> dict[str, Any]:
    """{"names": every flag, "refused": {flag: why}}, from vLLM's parser in another process."""
    done = subprocess.run(
        [sys.executable, plugin_flags.__file__],
        input=json.dumps({name: words_of(name, value) for name, value in given.items()}),
        capture_output=True,
        text=True,
        timeout=PARSER_TIMEOUT_S,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
    )
    if done.returncode != 0:
        raise RuntimeError(f"vLLM's flags could not be read: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
