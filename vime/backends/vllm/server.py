"""The command line and the environment of one vLLM server, on CPU and on CUDA."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vime.addresses import LOOPBACK, is_loopback
from vime.backends.vllm import cpu, plugin
from vime.backends.vllm import plugin_patches as patches
from vime.backends.vllm.context import needed_model_len
from vime.backends.vllm.dialect import Dialect
from vime.backends.vllm.local_http import without_proxies
from vime.backends.vllm.spelling import words_of
from vime.config import Config
from vime.patches import Patch
from vime.platform import LONGEST_SOCKET_PATH, Platform
from vime.rendezvous import interface_variables
from vime.weight_sync.choice import NODE, engines_sleep, transport_name

MODEL_NAME = "policy"  # the `model` of every request


@dataclass(frozen=True, slots=True)
class Part:
    """One node's part of an engine that spans `num` nodes. Part 0 has the HTTP server.

    master_host, master_port  where the workers of all parts meet, on the node of part 0
    """

    index: int
    num: int
    master_host: str
    master_port: int


def command(
    cfg: Config,
    index: int,
    *,
    host: str,
    port: int,
    dialect: Dialect,
    on: Platform,
    part: Part | None = None,
) -> list[str]:
    """The argv of an engine's server, or of a part without one.

    part  of an engine on several nodes; None: the engine is on one node

    The user's --vllm-* flags come last and win.
    """
    serves = part is None or part.index == 0
    ours: dict[str, Any] = {
        "model": cfg.model.hf_checkpoint,
        "served_model_name": MODEL_NAME,
        "dtype": on.dtype_name(cfg.model.dtype),
        "seed": cfg.algorithm.seed + index,
        "tensor_parallel_size": cfg.cluster.gpus_per_engine,
        "logprobs_mode": "processed_logprobs",
        "weight_transfer_config": json.dumps(
            {"backend": plugin.vllm_name(transport_name(cfg, on))}
        ),
        "worker_extension_cls": "vime.backends.vllm.plugin_worker.WorkerExtension",
        "disable_uvicorn_access_log": True,
        "uvicorn_log_level": "warning",
    }
    if serves:
        ours |= {"host": host, "port": port}
    if part is not None:
        ours |= {
            "nnodes": part.num,
            "node_rank": part.index,
            "master_addr": part.master_host,
            "master_port": part.master_port,
            "distributed_executor_backend": "mp",
        }
    if (max_model_len := needed_model_len(cfg)) is not None:
        ours["max_model_len"] = max_model_len
    given = dict(cfg.engine.vllm_args)
    if on.is_cuda:
        ours["enable_sleep_mode"] = engines_sleep(cfg, on)
    else:
        ours |= cpu.flags(cfg, dialect)
        given.pop("gpu_memory_utilization", None)  # a share of GPU memory: `cpu.memory_notice`
    if "api_key" in given and given["api_key"] in (api_key(cfg), [api_key(cfg)]):
        del given["api_key"]  # a single key is in the environment, where other users cannot see it
    module = (
        "vllm.entrypoints.openai.api_server" if serves else "vime.backends.vllm.plugin_headless"
    )
    argv = [sys.executable, "-m", module, *dialect.generate_flags]
    # A request would pass this middleware before vLLM checks its key.
    if serves and api_key(cfg) is None:
        argv += ["--middleware", "vime.backends.vllm.plugin_route.PackedAnswers"]
    for name, value in {**ours, **given}.items():
        argv += words_of(name, value)
    return argv


def api_key(cfg: Config) -> str | None:
    """The key that generation requests must carry, from the two places where vLLM looks for it."""
    given = cfg.engine.vllm_args.get("api_key") or os.environ.get("VLLM_API_KEY") or None
    return given[0] if isinstance(given, list) else given


def environment(
    cfg: Config,
    slots: list[int],
    *,
    host: str = LOOPBACK,
    dialect: Dialect,
    on: Platform,
    workers: int | None = None,
) -> dict[str, str]:
    """The server's environment.

    slots    the GPUs that the engine owns; not used on CPU
    host     address that the server listens on. Its groups, and those with the trainer, use the
             interface of this address
    workers  of all engines on this node; None: all engines are on it
    """
    env = {
        **without_proxies(os.environ, host),
        **interface_variables(host, os.environ),
        **short_socket_paths(os.environ),
        plugin.ENGINE_PATCHES: ",".join(patch.name for patch in needed_patches(cfg, on)),
        NODE: host,
        "VLLM_SERVER_DEV_MODE": "1",  # the control routes
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CONFIGURE_LOGGING": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if key := api_key(cfg):
        env["VLLM_API_KEY"] = key
    if not is_loopback(host):
        env["VLLM_HOST_IP"] = host
    if not on.is_cuda:
        return env | cpu.environment(cfg, dialect, workers)
    env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, slots))
    # A forked EngineCore inherits the server's imports, which take about 20 s. If CUDA is already
    # in use, vLLM spawns EngineCore anyway.
    env.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    return env


def short_socket_paths(env: Mapping[str, str]) -> dict[str, str]:
    """The variable that moves vLLM's sockets to /tmp if TMPDIR is too long: 107 bytes at most."""
    fits = len(os.fsencode(tempfile.gettempdir())) + len("/") + 36 <= LONGEST_SOCKET_PATH
    return {} if fits or "VLLM_RPC_BASE_PATH" in env else {"VLLM_RPC_BASE_PATH": "/tmp"}


def needed_patches(cfg: Config, on: Platform) -> list[Patch]:
    """The changes to vLLM that this server needs."""
    needed = [patches.INSPECT_MODELS_HERE]
    if not on.is_cuda:
        needed += [
            patches.FORK_PROCESSES,
            patches.SEEDS_OF_SPLIT_PROMPTS,
            patches.ROTARY_OF_EVERY_HEAD,
        ]
    return needed
