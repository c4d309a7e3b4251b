"""An engine on a machine without a GPU: its flags, its threads and the size of its KV cache."""

from __future__ import annotations

import os
from typing import Any

from vime import platform
from vime.backends.vllm.context import model_positions, needed_model_len, text_config
from vime.backends.vllm.dialect import Dialect
from vime.backends.vllm.spelling import whole_number
from vime.config import Config

MIB = 1 << 20
GIB = 1 << 30
ONE_THREAD_PARAMETERS = 5_000_000  # a 0.7M model: 12.6k tok/s on one thread, 9.8k on two
MAX_NUM_SEQS = 256  # vLLM's own default for a server
DEFAULT_POSITIONS = 2048  # if neither the flags nor config.json give a number
KV_CACHE_BOUNDS = (64 * MIB, 4 * GIB)
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def flags(cfg: Config, dialect: Dialect) -> dict[str, Any]:
    """The flags of vLLM that only an engine on CPU needs."""
    found: dict[str, Any] = {"enforce_eager": True, "disable_log_stats": True}
    if text_config(cfg).get("kv_lora_rank"):
        # On a CPU with AMX vLLM prefers a latent attention that cannot compute in float32.
        found["attention_backend"] = "CPU_MLA"
    if dialect.kv_cache_bytes_flag:
        found["kv_cache_memory_bytes"] = kv_cache_bytes(cfg)
    return found


def environment(cfg: Config, dialect: Dialect, workers: int | None = None) -> dict[str, str]:
    """
    workers  of all engines on this node; None: all engines are on it
    """
    found = {
        "VLLM_CPU_CI_ENV": "1",  # no warm-up
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": str(num_threads(cfg, workers)),
    }
    if not dialect.kv_cache_bytes_flag:
        found["VLLM_CPU_KVCACHE_SPACE"] = str(-(-kv_cache_bytes(cfg) // GIB))
    if cfg.cluster.gpus_per_engine == 1:
        # The only worker lives in EngineCore, which is forked: vLLM is imported once, not 3 times.
        found["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    else:
        found["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return found


def num_threads(cfg: Config, workers: int | None = None) -> int:
    """Threads of one engine's matrix products: the cores, divided among the node's workers.

    A tiny model is faster on one thread, with the server's own process on another core.
    """
    if num_parameters(cfg) < ONE_THREAD_PARAMETERS:
        return 1
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // (workers or cfg.cluster.num_engines * cfg.cluster.gpus_per_engine))


def num_parameters(cfg: Config) -> int:
    """Roughly the parameters of all layers: 4 h^2 for attention and 3 h f for the MLP in each."""
    hf = text_config(cfg)
    hidden = hf["hidden_size"]
    return hf["num_hidden_layers"] * hidden * (4 * hidden + 3 * hf.get("intermediate_size", 0))


def kv_cache_bytes(cfg: Config) -> int:
    """Size of an engine's KV cache: room for every sequence at full length, within bounds."""
    hf = text_config(cfg)
    heads = hf.get("num_key_value_heads") or hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    width = platform.CPU.dtype_bytes(cfg.model.dtype)
    token_bytes = 2 * hf["num_hidden_layers"] * heads * head_dim * width
    given = cfg.engine.vllm_args
    positions = (
        whole_number(given.get("max_model_len")) or needed_model_len(cfg) or model_positions(cfg)
    )
    positions = positions if positions and positions > 0 else DEFAULT_POSITIONS
    sequences = whole_number(given.get("max_num_seqs")) or MAX_NUM_SEQS
    at_least, at_most = KV_CACHE_BOUNDS
    one_sequence = -(-positions // 128) * 128 * token_bytes  # must always fit
    return max(one_sequence, at_least, min(sequences * one_sequence, at_most))


def memory_notice(cfg: Config) -> str | None:
    """A notice if --vllm-gpu-memory-utilization, from a GPU recipe, has no effect; else None."""
    share = cfg.engine.vllm_args.get("gpu_memory_utilization")
    if share is None or platform.current().is_cuda:
        return None
    size = kv_cache_bytes(cfg) / MIB
    return (
        f"--vllm-gpu-memory-utilization {share} is a share of GPU memory and has no effect on CPU: "
        f"an engine's KV cache takes {size:.0f} MiB. --vllm-kv-cache-memory-bytes sets this size."
    )


def head_size_problems(cfg: Config) -> list[str]:
    """A problem with the head size: on CPU, most sizes end vLLM at the first request."""
    size = text_config(cfg).get("head_dim")
    if platform.current().is_cuda or size is None or size in HEAD_SIZES:
        return []
    fitting = ", ".join(map(str, HEAD_SIZES))
    return [
        f"--hf-checkpoint {cfg.model.hf_checkpoint}: its config.json has head_dim {size}, but vLLM "
        f"on CPU supports only {fitting}. Use a model with one of these sizes, or a GPU."
    ]
