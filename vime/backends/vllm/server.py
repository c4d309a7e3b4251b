"""The command line and the environment of one vLLM server, on CPU and on CUDA."""

from __future__ import annotations

import json
import os
import sys

from vime import platform
from vime.backends.vllm import plugin, plugin_patches
from vime.backends.vllm.dialect import Dialect
from vime.backends.vllm.flags import whole_number
from vime.backends.vllm.plugin_flags import words_of
from vime.config import Config
from vime.config.evaluation import eval_datasets
from vime.config.hf_config import hf_config
from vime.patches import Patch
from vime.platform import Platform
from vime.weight_sync.choice import engines_sleep, transport_name

MODEL_NAME = "policy"  # the `model` of every request
MIB = 1 << 20
GIB = 1 << 30
ONE_THREAD_PARAMETERS = 5_000_000  # 0.7M: 12.6k tok/s on one thread, 9.8k on two
MAX_NUM_SEQS = 256  # vLLM's own default for a server
UNSTATED_POSITIONS = 2048  # of a config.json that does not say
DEFAULT_CPU_KV_BYTES = (64 * MIB, 4 * GIB)  # at least, at most


def command(
    cfg: Config, index: int, *, host: str, port: int, dialect: Dialect, on: Platform
) -> list[str]:
    """The server's argv. The user's --vllm-* flags come last and win."""
    given = dict(cfg.engine.vllm_args)
    dtype = str(on.dtype(cfg.model.dtype)).removeprefix("torch.")
    transport = plugin.vllm_name(transport_name(cfg, on))
    ours: dict[str, object] = {
        "model": cfg.model.hf_checkpoint,
        "served_model_name": MODEL_NAME,
        "host": host,
        "port": port,
        "dtype": dtype,
        "seed": cfg.algorithm.seed + index,
        "tensor_parallel_size": cfg.cluster.gpus_per_engine,
        "logprobs_mode": "processed_logprobs",
        "weight_transfer_config": json.dumps({"backend": transport}),
        "worker_extension_cls": "vime.backends.vllm.plugin_worker.WorkerExtension",
        "disable_uvicorn_access_log": True,
        "uvicorn_log_level": "warning",
    }
    if (max_model_len := needed_model_len(cfg)) is not None:
        ours["max_model_len"] = max_model_len
    if on.is_cuda:
        ours["enable_sleep_mode"] = engines_sleep(cfg, on)
    else:
        given.pop("gpu_memory_utilization", None)  # a share of GPU memory; see `cpu_notice`
        ours["enforce_eager"] = True
        ours["disable_log_stats"] = True
        if text_config(cfg).get("kv_lora_rank"):
            # On a CPU with AMX vLLM prefers a latent attention that knows no float32.
            ours["attention_backend"] = "CPU_MLA"
        if dialect.kv_cache_bytes_flag:
            ours["kv_cache_memory_bytes"] = cpu_kv_cache_bytes(cfg)
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *dialect.generate_flags]
    if api_key(cfg) is None:  # vLLM asks for the key behind this middleware
        argv += ["--middleware", "vime.backends.vllm.plugin_route.PackedAnswers"]
    for name, value in {**ours, **given}.items():
        argv += words_of(name, value)
    return argv


def api_key(cfg: Config) -> str | None:
    """The key that generation requests must carry, found where vLLM finds it. None: no key."""
    given = cfg.engine.vllm_args.get("api_key") or os.environ.get("VLLM_API_KEY") or None
    return given[0] if isinstance(given, list) else given


def environment(cfg: Config, slots: list[int], *, dialect: Dialect, on: Platform) -> dict[str, str]:
    """The server's environment.

    slots  the GPUs that the engine owns; on CPU their number says how many of the cores it gets
    """
    env = {
        **os.environ,
        plugin.ENGINE_PATCHES: ",".join(patch.name for patch in needed_patches(cfg, on)),
        "VLLM_SERVER_DEV_MODE": "1",  # the control routes
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CONFIGURE_LOGGING": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if on.is_cuda:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, slots))
        # EngineCore inherits the server's imports, some 20 s of them. vLLM spawns all the same
        # where CUDA is already in use.
        env.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "fork")
        return env
    env["VLLM_CPU_CI_ENV"] = "1"  # no warm-up
    env["TORCHDYNAMO_DISABLE"] = "1"
    env["OMP_NUM_THREADS"] = str(cpu_threads(cfg))
    if not dialect.kv_cache_bytes_flag:
        env["VLLM_CPU_KVCACHE_SPACE"] = str(-(-cpu_kv_cache_bytes(cfg) // GIB))
    if cfg.cluster.gpus_per_engine == 1:
        # The worker lives in EngineCore, which is forked: one import of vLLM instead of three.
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    else:
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return env


def needed_patches(cfg: Config, on: Platform) -> list[Patch]:
    """The changes to vLLM that this server needs."""
    needed = [plugin_patches.INSPECT_MODELS_HERE]
    if not on.is_cuda:
        needed += [plugin_patches.SEEDS_OF_SPLIT_PROMPTS, plugin_patches.ROTARY_OF_EVERY_HEAD]
        if cfg.cluster.gpus_per_engine == 1:
            needed.append(plugin_patches.FORK_ENGINE_CORE)
    return needed


def cpu_threads(cfg: Config) -> int:
    """Threads of one engine's matrix products on CPU: the cores, shared between the engines.

    A tiny model is faster on one thread, with the server's own process on another core.
    """
    if model_size(cfg) < ONE_THREAD_PARAMETERS:
        return 1
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // (cfg.cluster.num_engines * cfg.cluster.gpus_per_engine))


def model_size(cfg: Config) -> int:
    """Parameters of the model's layers, roughly: 4 h^2 of attention and 3 h f of MLP each."""
    hf = text_config(cfg)
    hidden = hf["hidden_size"]
    return hf["num_hidden_layers"] * hidden * (4 * hidden + 3 * hf.get("intermediate_size", 0))


def needed_model_len(cfg: Config) -> int | None:
    """--max-model-len from the lengths of rollout and evaluation; None leaves it to the model.

    A prompt has no known bound unless --rollout-max-prompt-len or -context-len gives one.
    """
    if "max_model_len" in cfg.engine.vllm_args:
        return None
    r = cfg.rollout
    lengths = [_context(r.max_context_len, r.max_prompt_len, r.max_response_len)]
    for d in eval_datasets(cfg) if cfg.eval.interval is not None else ():
        lengths.append(_context(d.max_context_len, d.max_prompt_len, d.max_response_len))
    if None in lengths:
        return None
    cap = model_positions(cfg)
    needed = max(lengths)
    return min(needed, cap) if cap else needed


def _context(context: int | None, prompt: int | None, response: int) -> int | None:
    if context is not None:
        return context
    return None if prompt is None else prompt + response


def text_config(cfg: Config) -> dict:
    """The language model's part of config.json."""
    found = hf_config(cfg)
    return found.get("text_config", found)


def model_positions(cfg: Config) -> int | None:
    """Positions that the model was made for."""
    return text_config(cfg).get("max_position_embeddings")


def cpu_kv_cache_bytes(cfg: Config) -> int:
    """KV cache of an engine on CPU: room for every sequence at full length, within bounds."""
    hf = text_config(cfg)
    heads = hf.get("num_key_value_heads") or hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    width = platform.CPU.dtype(cfg.model.dtype).itemsize
    token_bytes = 2 * hf["num_hidden_layers"] * heads * head_dim * width
    given = cfg.engine.vllm_args
    positions = (
        whole_number(given.get("max_model_len")) or needed_model_len(cfg) or model_positions(cfg)
    )
    positions = positions if positions and positions > 0 else UNSTATED_POSITIONS
    sequences = whole_number(given.get("max_num_seqs")) or MAX_NUM_SEQS
    at_least, at_most = DEFAULT_CPU_KV_BYTES
    full = -(-positions // 128) * 128 * token_bytes  # one sequence must always fit
    return max(full, at_least, min(sequences * full, at_most))


def cpu_notice(cfg: Config) -> str | None:
    """What a GPU recipe's memory flag means on this machine; None where there is nothing to say."""
    share = cfg.engine.vllm_args.get("gpu_memory_utilization")
    if share is None or platform.current().is_cuda:
        return None
    size = cpu_kv_cache_bytes(cfg) / MIB
    return (
        f"--vllm-gpu-memory-utilization {share} is about GPU memory and does nothing on CPU: "
        f"an engine's KV cache takes {size:.0f} MiB. --vllm-kv-cache-memory-bytes sets it."
    )
