"""Every --vllm-* flag of the installed vLLM is accepted, and checked before any model loads.

vLLM's own parser judges, in a process of its own, because importing it takes some 14 s on 2 cores.
Its verdicts are cached per version; the few flags that recipes use all the time need no parser.
"""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vime import platform
from vime.backends.vllm import dialect as dialects
from vime.backends.vllm import plugin_flags
from vime.config import Config
from vime.config.hf_config import hf_config
from vime.files import write_text

PARSER_TIMEOUT_S = 300.0
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)

OWNED = {  # set by vime: who to ask instead
    "model": "--hf-checkpoint",
    "tokenizer": "--hf-checkpoint",
    "served_model_name": "nothing: requests name no model",
    "tensor_parallel_size": "--rollout-num-gpus-per-engine",
    "seed": "--seed",
    "dtype": "--dtype",
    "host": "--vllm-router-ip",
    "port": "--vllm-router-port",
    "uds": "--vllm-router-ip",
    "logprobs_mode": "nothing: training needs processed_logprobs",
    "weight_transfer_config": "--colocate, which chooses the transport",
    "worker_extension_cls": "nothing: weight updates need vime's own",
    "tokens_only": "nothing: requests carry token ids already",
    "enable_scale_out": "nothing: it is on already",
    "enable_sleep_mode": "--colocate",
    "data_parallel_size": "--rollout-num-gpus, which adds engines",
}


def whole_number(text: Any) -> int | None:
    """vLLM's notation: "8192", "8k" (thousands), "8K" (1024s). None when it is not one."""
    scale = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
    text = str(text)
    try:
        if text[-1:] in scale:
            return int(float(text[:-1]) * scale[text[-1]])
        return int(text)
    except ValueError:
        return None


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


COMMON: dict[str, Callable[[Any], str | None]] = {  # what it must be, when it is not
    "gpu_memory_utilization": _share,
    "max_model_len": lambda v: None if v in ("auto", "-1") else _positive(v),
    "max_num_seqs": _positive,
    "max_num_batched_tokens": _positive,
    "enforce_eager": _switch,
}


def check_vllm_flags(cfg: Config) -> list[str]:
    """The problems of `cfg.engine.vllm_args`, in the user's words; [] when vLLM takes them all."""
    given = cfg.engine.vllm_args
    if cfg.debug.no_engines:
        return []
    problems = []
    rest: dict[str, Any] = {}
    for name, value in given.items():
        if name in OWNED:
            problems.append(f"{_spelled(name, value)} is set by vime. Use {OWNED[name]}.")
        elif name in COMMON:
            if wanted := COMMON[name](value):
                problems.append(f"{_spelled(name, value)} is not usable: give {wanted}.")
        else:
            rest[name] = value
    problems += _head_size(cfg)
    return problems + (_ask_vllm(rest) if rest else [])


def _head_size(cfg: Config) -> list[str]:
    """vLLM starts with any head size on CPU, and dies at the first request with most of them."""
    size = hf_config(cfg).get("head_dim")
    if platform.current().is_cuda or size is None or size in CPU_HEAD_SIZES:
        return []
    fitting = ", ".join(map(str, CPU_HEAD_SIZES))
    return [
        f"--hf-checkpoint {cfg.model.hf_checkpoint}: head_dim {size} in its config.json; vLLM on "
        f"CPU attends with {fitting} only. Use a model that has one of these, or a GPU."
    ]


def _spelled(name: str, value: Any) -> str:
    words = [] if value is True else value if isinstance(value, list) else [value]
    return " ".join([f"--vllm-{name.replace('_', '-')}", *map(str, words)])


def _ask_vllm(given: dict[str, Any]) -> list[str]:
    version = dialects.installed_version()
    if version is None:
        return [f"{_spelled(*next(iter(given.items())))}: vLLM is not installed to check it."]
    cache = Cache(version)
    unknown = [n for n in given if cache.names and n.split(".")[0] not in cache.names]
    asked = {n: v for n, v in given.items() if n not in unknown and not cache.accepted(n, v)}
    refused: dict[str, str] = {}
    if asked:
        answer = _run_parser(asked)
        cache.names = set(answer["names"])
        refused = answer["refused"]
        unknown += [n for n in asked if n.split(".")[0] not in cache.names]
        cache.accept({n: v for n, v in asked.items() if n not in unknown and n not in refused})
    return [_unknown(n, given[n], cache.names, version) for n in unknown] + [
        f"{_spelled(n, given[n])}: vLLM {version} refuses it: {why}"
        for n, why in refused.items()
        if n not in unknown
    ]


def _unknown(name: str, value: Any, names: set[str], version: str) -> str:
    near = difflib.get_close_matches(name, names | set(COMMON), n=1, cutoff=0.6)
    hint = f"Did you mean --vllm-{near[0].replace('_', '-')}?" if near else "See vllm serve --help."
    return f"{_spelled(name, value)}: vLLM {version} has no such flag. {hint}"


def _run_parser(given: dict[str, Any]) -> dict[str, Any]:
    """{"names": every flag, "refused": {flag: why}}, from vLLM's parser in a process of its own."""
    done = subprocess.run(
        [sys.executable, plugin_flags.__file__],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=PARSER_TIMEOUT_S,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
    )
    if done.returncode != 0:
        raise RuntimeError(f"vLLM's flags could not be read: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


class Cache:
    """What a version's parser said before: {"names": [...], "accepted": [[flag, value], ...]}."""

    def __init__(self, version: str) -> None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.file = home / "vime" / f"vllm-flags-{version}.json"
        try:
            held = json.loads(self.file.read_text())
        except (OSError, ValueError):
            held = {}
        self.names: set[str] = set(held.get("names", ()))
        self.known: list[list[Any]] = held.get("accepted", [])

    def accepted(self, name: str, value: Any) -> bool:
        return [name, value] in self.known

    def accept(self, given: dict[str, Any]) -> None:
        self.known += [[n, v] for n, v in given.items()]
        try:
            content = {"names": sorted(self.names), "accepted": self.known}
            write_text(self.file, json.dumps(content))
        except OSError:  # a home that cannot be written only costs time
            return
